import {
  cancellable,
  type NativeLossAggregation,
  type NativeLossKind,
  type NativeLossStatistics,
  native,
} from '../native.js';
import { type FloatDType, kernelCall, type Tensor } from './device.js';

/**
 * How a row's log-probability becomes loss, with ratio = exp(logprob - oldLogprob):
 * - `policy_gradient_clip` (default): -min(ratio A, clip(ratio, 1 - clipLow, 1 + clipHigh) A), as in PPO and
 *   GRPO (arXiv:1707.06347, arXiv:2402.03300)
 * - `cispo`: -stop_gradient(min(ratio, 1 + clipHigh)) A logprob (arXiv:2506.13585)
 * - `gspo`: as policy_gradient_clip, with one ratio for a sequence, exp of the mean of its rows' differences
 *   (arXiv:2507.18071)
 * - `cross_entropy`: -logprob
 *
 * plus klCoefficient (exp(d) - d - 1) with d = referenceLogprob - logprob, the k3 estimator, minus
 * entropyCoefficient times the entropy. The loss is the sum over rows r of these three terms, times weights[r],
 * klWeights[r] and entropyWeights[r].
 */
export interface PolicyLossOptions {
  kind?: NativeLossKind | undefined;
  /** Default 0.2. */
  clipLow?: number | undefined;
  /** Default 0.2. */
  clipHigh?: number | undefined;
  /** Default 0. */
  klCoefficient?: number | undefined;
  /** Whether the KL term is multiplied by the ratio, through which gradient flows, too. Default false. */
  klRatio?: boolean | undefined;
  /** Default 0. */
  entropyCoefficient?: number | undefined;
  /**
   * [R] f32, as `lossWeights` gives them: the normalisation of grpo, dapo, dr_grpo or bnpo lies in them. What a
   * row has for a term of weight 0 may be anything.
   */
  weights: Tensor<FloatDType>;
  /** [R] f32, what the KL term is multiplied by beside klCoefficient. Default: `weights`. */
  klWeights?: Tensor<FloatDType> | undefined;
  /** [R] f32, what the entropy term is multiplied by beside entropyCoefficient. Default: `weights`. */
  entropyWeights?: Tensor<FloatDType> | undefined;
  /** [R] f32, not for cross_entropy. */
  advantages?: Tensor<FloatDType> | undefined;
  /** [R] f32, not for cross_entropy. NaN: the row's own log-probability stands in, and its ratio is 1. */
  oldLogprobs?: Tensor<FloatDType> | undefined;
  /** [R] f32, needed where klCoefficient is above 0. */
  referenceLogprobs?: Tensor<FloatDType> | undefined;
  /** [R], which sequence a row belongs to, rising from 0 by at most 1; gspo only. */
  sequences?: Int32Array | undefined;
}

export interface PolicyLossArguments extends PolicyLossOptions {
  /** [R] f32 */
  logprobs: Tensor<FloatDType>;
  /** [R] f32, needed where entropyCoefficient is not 0. */
  entropies?: Tensor<FloatDType> | undefined;
  /** Whether to compute statistics, for which the rows are read back from the device. Default false. */
  statistics?: boolean | undefined;
}

export interface FusedPolicyLossArguments extends PolicyLossOptions {
  /** [T, H] f32 or bf16, what the head multiplies. */
  hidden: Tensor<FloatDType>;
  /** [vocabulary, H] of the same dtype, the head's weight. */
  weight: Tensor<FloatDType>;
  /** [R], rows of `hidden`; a row may be named more than once. */
  rows: Int32Array;
  /** [R], the token ids they are to predict. */
  targets: Int32Array;
  /** Divides the logits; 0 (greedy) stands for 1. Default 1. */
  temperature?: number | undefined;
  /** Ends the kernel early: on the CPU in its midst, on other devices before it begins. */
  signal?: AbortSignal | undefined;
}

type Call = ReturnType<typeof kernelCall>;

function lossTensors(call: Call, args: PolicyLossOptions) {
  return {
    kind: args.kind ?? 'policy_gradient_clip',
    clipLow: args.clipLow ?? 0.2,
    clipHigh: args.clipHigh ?? 0.2,
    klCoefficient: args.klCoefficient ?? 0,
    entropyCoefficient: args.entropyCoefficient ?? 0,
    weights: call.handle(args.weights, 'weights'),
    advantages: call.optional(args.advantages, 'advantages'),
    oldLogprobs: call.optional(args.oldLogprobs, 'oldLogprobs'),
    referenceLogprobs: call.optional(args.referenceLogprobs, 'referenceLogprobs'),
    sequences: args.sequences,
    klRatio: args.klRatio,
    klWeights: call.optional(args.klWeights, 'klWeights'),
    entropyWeights: call.optional(args.entropyWeights, 'entropyWeights'),
  };
}

/**
 * The weights [R] of rows, by which their losses become one:
 * - `token_mean`: the mean over all rows (bnpo; DAPO, arXiv:2503.14476)
 * - `sequence_mean`: the mean over a completion's rows, then the mean over completions (GRPO,
 *   arXiv:2402.03300)
 * - `constant`: the sum over rows, divided by completions times `maxTokens` (Dr. GRPO, arXiv:2503.20783)
 *
 * `normalizer` stands in for the number of rows or of completions, where these rows are a part of what is averaged.
 * @throws MerfError INVALID_ARGUMENT
 */
export function lossWeights(args: NativeLossAggregation): Float32Array {
  return native().lossWeights(args);
}

/**
 * The loss of given log-probabilities, and coefficients [R] f32: its derivative by each of them.
 * @throws MerfError INVALID_ARGUMENT, DISPOSED, OUT_OF_MEMORY
 */
export async function policyLoss(
  args: PolicyLossArguments,
): Promise<{ loss: number; coefficients: Tensor<'f32'>; statistics?: NativeLossStatistics }> {
  const call = kernelCall(args.logprobs, 'logprobs');
  const { loss, coefficients, statistics } = await call.device.policyLoss({
    ...lossTensors(call, args),
    logprobs: call.handle(args.logprobs, 'logprobs'),
    entropies: call.optional(args.entropies, 'entropies'),
    statistics: args.statistics ?? false,
  });
  return { loss, coefficients: call.tensor(coefficients), ...(statistics && { statistics }) };
}

/**
 * Head, log-softmax(logits / temperature), loss and their backward in one, without ever holding rows x vocabulary.
 * @returns the loss, logprobs and entropies [R] f32, and the gradients dhidden (as hidden) and dweight (as
 *   weight, f32)
 * @throws MerfError INVALID_ARGUMENT, DISPOSED, OUT_OF_MEMORY, ABORTED
 */
export async function fusedPolicyLoss(args: FusedPolicyLossArguments): Promise<{
  loss: number;
  logprobs: Tensor<'f32'>;
  entropies: Tensor<'f32'>;
  dhidden: Tensor<FloatDType>;
  dweight: Tensor<'f32'>;
}> {
  const call = kernelCall(args.hidden, 'hidden');
  const result = await cancellable('fusedPolicyLoss', args.signal, (cancel) =>
    call.device.fusedPolicyLoss(
      {
        ...lossTensors(call, args),
        hidden: call.handle(args.hidden, 'hidden'),
        weight: call.handle(args.weight, 'weight'),
        rows: args.rows,
        targets: args.targets,
        temperature: args.temperature,
      },
      cancel,
    ),
  );
  return {
    loss: result.loss,
    logprobs: call.tensor(result.logprobs),
    entropies: call.tensor(result.entropies),
    dhidden: call.tensor(result.dhidden),
    dweight: call.tensor(result.dweight),
  };
}
