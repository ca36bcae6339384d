import { invalidArgument, MerfError } from '../errors.js';
import type { NativeLoss, NativeLossStatistics } from '../native.js';
import type { PackedForest, Target, TrainTarget } from './forest.js';

export type PolicyLossType = 'grpo' | 'dapo' | 'dr_grpo' | 'bnpo' | 'cispo' | 'gspo';

/**
 * What is minimised, summed over tokens t of completions c with advantage A and ratio r = exp(logprob - old
 * logprob):
 *
 * - `grpo`, `dapo`, `bnpo`, `dr_grpo`: -min(r A, clip(r, 1 - clipLow, 1 + clipHigh) A)
 * - `gspo`: the same with one ratio a completion, exp(mean over its tokens of (logprob - old logprob))
 *   (arXiv:2507.18071)
 * - `cispo`: -stop_gradient(min(r, 1 + clipHigh)) A logprob (arXiv:2506.13585)
 * - `cross_entropy`: -logprob
 *
 * plus `kl` times the k3 estimate exp(d) - d - 1, d = reference logprob - logprob, minus `entropy` times the
 * entropy. Tokens are weighted as TRL names it:
 *
 * - `grpo`, `gspo`: the mean over a completion of its tokens, then the mean over completions
 *   (arXiv:2402.03300)
 * - `bnpo`, `dapo`, `cispo`, `cross_entropy`: the sum over all tokens divided by their number (DAPO:
 *   arXiv:2503.14476)
 * - `dr_grpo`: the sum divided by completions times `maxTokens` (arXiv:2503.20783)
 *
 * over the whole forest of one call. A completion whose mask is all 0 counts among the completions.
 */
export type Loss =
  | { type: 'cross_entropy' }
  | {
      type: PolicyLossType;
      /** At least 0. Default 0.2; gspo 3e-4; unused by cispo. */
      clipLow?: number | undefined;
      /**
       * At least 0. Default 0.2; gspo 4e-4; cispo 4, which caps the ratio at 5 (TRL's `epsilon_high` for
       * cispo is the cap itself).
       */
      clipHigh?: number | undefined;
      /** Coefficient of the KL penalty; not 0 needs `referenceLogprobs`. Default 0. */
      kl?: number | undefined;
      /** Coefficient of the entropy bonus. Default 0. */
      entropy?: number | undefined;
      /** dr_grpo's constant, in tokens: the most that a completion may have. */
      maxTokens?: number | undefined;
      temperature?: number | undefined;
      klRatio?: boolean | undefined;
      normalizer?: { completions?: number | undefined; tokens?: number | undefined } | undefined;
    };

/**
 * What one call of `forwardBackward` found. Where the loss is not finite `finite` is false, the call has
 * ended at the first such row, the gradients are zero and the means are NaN.
 */
export interface LossStats extends LossStatistics {
  /** The loss, weighted as `Loss` says. */
  loss: number;
  finite: boolean;
  /** For each segment with a target in depth-first order, its tokens' log-probabilities; 0 where not scored. */
  logprobs: Float32Array[];
}

/** Statistics of a loss, computed in float64. */
export type LossStatistics = NativeLossStatistics;

export interface ResolvedLoss {
  type: Loss['type'];
  kind: NativeLoss['kind'];
  aggregation: NativeLoss['aggregation'];
  clipLow: number;
  clipHigh: number;
  kl: number;
  entropy: number;
  maxTokens: number | undefined;
}

/** How each loss treats a row, and how it joins the rows; the two are independent of each other. */
const forms: Readonly<Record<Loss['type'], Pick<NativeLoss, 'kind' | 'aggregation'>>> = {
  cross_entropy: { kind: 'cross_entropy', aggregation: 'token_mean' },
  grpo: { kind: 'policy_gradient_clip', aggregation: 'sequence_mean' },
  dapo: { kind: 'policy_gradient_clip', aggregation: 'token_mean' },
  dr_grpo: { kind: 'policy_gradient_clip', aggregation: 'constant' },
  bnpo: { kind: 'policy_gradient_clip', aggregation: 'token_mean' },
  cispo: { kind: 'cispo', aggregation: 'token_mean' },
  gspo: { kind: 'gspo', aggregation: 'sequence_mean' },
};

/** The loss with its defaults. @throws MerfError INVALID_ARGUMENT */
export function resolveLoss(loss: Loss): ResolvedLoss {
  const form = Object.hasOwn(forms, loss?.type ?? '') ? forms[loss.type] : undefined;
  if (form === undefined) throw invalidArgument('loss.type', Object.keys(forms).join(', '), loss?.type);
  if (loss.type === 'cross_entropy') {
    return { type: loss.type, ...form, clipLow: 0, clipHigh: 0, kl: 0, entropy: 0, maxTokens: undefined };
  }
  const gspo = loss.type === 'gspo';
  const resolved = {
    type: loss.type,
    ...form,
    clipLow: loss.clipLow ?? (gspo ? 3e-4 : 0.2),
    clipHigh: loss.clipHigh ?? (gspo ? 4e-4 : loss.type === 'cispo' ? 4 : 0.2),
    kl: loss.kl ?? 0,
    entropy: loss.entropy ?? 0,
    maxTokens: loss.maxTokens,
  };
  for (const key of ['clipLow', 'clipHigh', 'kl'] as const) {
    if (!Number.isFinite(resolved[key]) || resolved[key] < 0) {
      throw invalidArgument(`loss.${key}`, 'a non-negative number', resolved[key]);
    }
  }
  if (!Number.isFinite(resolved.entropy))
    throw invalidArgument('loss.entropy', 'a finite number', resolved.entropy);
  if (loss.type === 'dr_grpo' && !(Number.isInteger(loss.maxTokens) && (loss.maxTokens as number) > 0)) {
    throw invalidArgument('loss.maxTokens', 'a positive integer (dr_grpo divides by it)', loss.maxTokens);
  }
  return resolved;
}

/** @throws MerfError INVALID_ARGUMENT where a target lacks what the loss needs */
export function checkTargets(loss: ResolvedLoss, targets: readonly Target[]): void {
  if (loss.kind === 'cross_entropy') return;
  targets.forEach(({ train }, i) => {
    if (train.advantage === undefined) {
      throw new MerfError(
        'INVALID_ARGUMENT',
        `Expected an advantage for trained segment ${i}: loss ${loss.type} needs it`,
      );
    }
    if (loss.kl > 0 && train.referenceLogprobs === undefined) {
      throw new MerfError(
        'INVALID_ARGUMENT',
        `Expected referenceLogprobs for trained segment ${i}: kl is ${loss.kl}`,
      );
    }
  });
}

/** The native loss over a forest's rows. NaN stands for an old or reference log-probability that was not given. */
export function nativeLoss(loss: ResolvedLoss, forest: PackedForest): NativeLoss {
  const byRow = (value: (train: TrainTarget, token: number) => number | undefined) =>
    Float32Array.from(forest.rowTarget, (target, row) => {
      const { train } = forest.targets[target] as Target;
      return value(train, forest.rowToken[row] as number) ?? Number.NaN;
    });
  const common = {
    kind: loss.kind,
    clipLow: loss.clipLow,
    clipHigh: loss.clipHigh,
    klCoefficient: loss.kl,
    entropyCoefficient: loss.entropy,
    aggregation: loss.aggregation,
    sequences: forest.sequences,
    completions: forest.completions,
    maxTokens: loss.maxTokens,
    ...(forest.targets.some(({ train }) => train.referenceLogprobs !== undefined) && {
      referenceLogprobs: byRow((train, token) => train.referenceLogprobs?.[token]),
    }),
  };
  if (loss.kind === 'cross_entropy') return common;
  return {
    ...common,
    advantages: byRow((train, token) =>
      typeof train.advantage === 'object' ? train.advantage[token] : train.advantage,
    ),
    oldLogprobs: byRow((train, token) => train.logprobs?.[token]),
  };
}

/** The statistics of a forest in which no token is active. */
export function emptyStatistics(): LossStatistics & { loss: number; finite: boolean } {
  return {
    loss: 0,
    finite: true,
    tokens: 0,
    kl: 0,
    clipFraction: 0,
    clipLowFraction: 0,
    clipHighFraction: 0,
    ratio: { mean: 1, min: 1, max: 1 },
    entropy: 0,
  };
}
