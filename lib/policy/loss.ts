import { invalidArgument, MerfError } from '../errors.js';
import type { NativeLoss } from '../native.js';
import type { ForestPlan, PackedBatch, Target } from './forest.js';

export type PolicyLossType = 'grpo' | 'dapo' | 'dr_grpo' | 'bnpo' | 'cispo' | 'gspo';

/**
 * What is minimised, summed over tokens t of completions c with advantage A and ratio r = exp(logprob - old logprob):
 *
 * - `grpo`, `dapo`, `bnpo`, `dr_grpo`: -min(r A, clip(r, 1 - clipLow, 1 + clipHigh) A)
 * - `gspo`: the same with one ratio a completion, exp(mean over its tokens of (logprob - old logprob))
 *   (arXiv:2507.18071)
 * - `cispo`: -stop_gradient(min(r, 1 + clipHigh)) A logprob (arXiv:2506.13585)
 * - `cross_entropy`: -logprob
 *
 * plus `kl` times the k3 estimate exp(d) - d - 1, d = reference logprob - logprob, minus `entropy` times the entropy.
 * Tokens are weighted as TRL names it:
 *
 * - `grpo`, `gspo`: the mean over a completion of its tokens, then the mean over completions (arXiv:2402.03300)
 * - `bnpo`, `dapo`, `cispo`, `cross_entropy`: the sum over all tokens divided by their number (DAPO: arXiv:2503.14476)
 * - `dr_grpo`: the sum divided by completions times `maxTokens` (arXiv:2503.20783)
 *
 * over the forest of one call, not over its batches. A completion whose mask is all 0 counts among the completions.
 */
export type Loss =
  | { type: 'cross_entropy' }
  | {
      type: PolicyLossType;
      /** At least 0. Default 0.2; gspo 3e-4; unused by cispo. */
      clipLow?: number | undefined;
      /**
       * At least 0. Default 0.2; gspo 4e-4; cispo 4, which caps the ratio at 5 (TRL's `epsilon_high` for cispo is the
       * cap itself).
       */
      clipHigh?: number | undefined;
      /** Coefficient of the KL penalty; not 0 needs `referenceLogprobs`. Default 0. */
      kl?: number | undefined;
      /** Coefficient of the entropy bonus. Default 0. */
      entropy?: number | undefined;
      /** dr_grpo's constant, in tokens: the most that a completion may have. */
      maxTokens?: number | undefined;
    };

export interface LossStats {
  /** The loss, weighted as `Loss` says. */
  loss: number;
  /** Active tokens, which all means below are over. */
  tokens: number;
  /** Mean k3 estimate of KL(policy || reference), in nats; 0 where no reference was given. */
  kl: number;
  /** Share of tokens whose ratio is clipped so that no gradient flows: below with A < 0, or above with A > 0. */
  clipFraction: number;
  clipLowFraction: number;
  clipHighFraction: number;
  /** Of the importance ratio: by token, for gspo by completion. 1 where the loss has none. */
  ratio: { mean: number; min: number; max: number };
  /** Mean entropy of the next-token distribution, in nats. */
  entropy: number;
  /** For each segment with a target in depth-first order, its tokens' log-probabilities; 0 where not scored. */
  logprobs: Float32Array[];
}

export interface ResolvedLoss {
  type: Loss['type'];
  kind: NativeLoss['kind'];
  clipLow: number;
  clipHigh: number;
  kl: number;
  entropy: number;
  maxTokens: number | undefined;
}

const kinds: Readonly<Record<Loss['type'], NativeLoss['kind']>> = {
  cross_entropy: 'cross_entropy',
  grpo: 'policy_gradient_clip',
  dapo: 'policy_gradient_clip',
  dr_grpo: 'policy_gradient_clip',
  bnpo: 'policy_gradient_clip',
  cispo: 'cispo',
  gspo: 'gspo',
};

/** The loss with its defaults. @throws MerfError INVALID_ARGUMENT */
export function resolveLoss(loss: Loss): ResolvedLoss {
  const kind = Object.hasOwn(kinds, loss?.type ?? '') ? kinds[loss.type] : undefined;
  if (kind === undefined) throw invalidArgument('loss.type', Object.keys(kinds).join(', '), loss?.type);
  if (loss.type === 'cross_entropy') {
    return { type: loss.type, kind, clipLow: 0, clipHigh: 0, kl: 0, entropy: 0, maxTokens: undefined };
  }
  const gspo = loss.type === 'gspo';
  const resolved = {
    type: loss.type,
    kind,
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

/**
 * The weight of each active token of a completion, by completion, as `Loss` describes.
 * @param lengths active tokens of each completion
 */
export function sequenceWeights(
  loss: Pick<ResolvedLoss, 'type' | 'maxTokens'>,
  lengths: ArrayLike<number>,
): Float64Array {
  const completions = lengths.length;
  const counts = Array.from(lengths);
  const tokens = counts.reduce((sum, n) => sum + n, 0);
  switch (loss.type) {
    case 'grpo':
    case 'gspo':
      return Float64Array.from(counts, (n) => 1 / (completions * Math.max(n, 1)));
    case 'dr_grpo':
      return new Float64Array(completions).fill(1 / (completions * (loss.maxTokens as number)));
    default:
      return new Float64Array(completions).fill(1 / Math.max(tokens, 1));
  }
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

/** The native loss over one batch's rows. `old` has the old log-probabilities by target. */
export function nativeLoss(
  loss: ResolvedLoss,
  plan: ForestPlan,
  batch: PackedBatch,
  weights: Float64Array,
  old: readonly ArrayLike<number>[],
): NativeLoss {
  const rows = batch.rowTarget.length;
  const byRow = (value: (target: Target, token: number, index: number) => number) => {
    const values = new Float32Array(rows);
    for (let row = 0; row < rows; ++row) {
      const index = batch.rowTarget[row] as number;
      values[row] = value(plan.targets[index] as Target, batch.rowToken[row] as number, index);
    }
    return values;
  };
  const common = {
    kind: loss.kind,
    clipLow: loss.clipLow,
    clipHigh: loss.clipHigh,
    klCoefficient: loss.kl,
    entropyCoefficient: loss.entropy,
    weights: byRow((target) => weights[target.sequence] as number),
  };
  if (loss.kind === 'cross_entropy') return common;
  return {
    ...common,
    advantages: byRow((target) => target.train.advantage as number),
    oldLogprobs: byRow((_, token, index) => (old[index] as ArrayLike<number>)[token] as number),
    ...(loss.kl > 0
      ? { referenceLogprobs: byRow((target, token) => target.train.referenceLogprobs?.[token] as number) }
      : {}),
    ...(loss.kind === 'gspo' ? { sequences: batch.sequences } : {}),
  };
}

/** The statistics of `LossStats` from what the batches returned, by target. */
export function lossStats(
  loss: ResolvedLoss,
  plan: ForestPlan,
  old: readonly ArrayLike<number>[],
  result: { loss: number; logprobs: Float32Array[]; entropies: Float32Array[] },
): LossStats {
  const { logprobs, entropies } = result;
  const hasRatio = loss.kind !== 'cross_entropy';
  const sequenceLogRatios = new Float64Array(plan.sequenceLengths.length);
  let tokens = 0;
  let kl = 0;
  let entropy = 0;
  plan.targets.forEach((target, i) => {
    for (const token of target.active) {
      const logprob = logprobs[i]?.[token] as number;
      const reference = target.train.referenceLogprobs?.[token];
      if (reference !== undefined) kl += Math.exp(reference - logprob) - (reference - logprob) - 1;
      entropy += entropies[i]?.[token] as number;
      ++tokens;
      if (!hasRatio) continue;
      const length = plan.sequenceLengths[target.sequence] as number;
      const logRatio = logprob - (old[i]?.[token] as number);
      sequenceLogRatios[target.sequence] = (sequenceLogRatios[target.sequence] as number) + logRatio / length;
    }
  });

  const ratio = { sum: 0, count: 0, min: Number.POSITIVE_INFINITY, max: Number.NEGATIVE_INFINITY };
  const count = (value: number) => {
    ratio.sum += value;
    ++ratio.count;
    ratio.min = Math.min(ratio.min, value);
    ratio.max = Math.max(ratio.max, value);
  };
  let low = 0;
  let high = 0;
  if (hasRatio) {
    plan.targets.forEach((target, i) => {
      const advantage = target.train.advantage as number;
      for (const token of target.active) {
        const own = (logprobs[i]?.[token] as number) - (old[i]?.[token] as number);
        const value = Math.exp(loss.kind === 'gspo' ? (sequenceLogRatios[target.sequence] as number) : own);
        if (loss.kind !== 'gspo') count(value);
        if (loss.kind !== 'cispo' && value < 1 - loss.clipLow && advantage < 0) ++low;
        if (value > 1 + loss.clipHigh && advantage > 0) ++high;
      }
    });
    if (loss.kind === 'gspo') {
      plan.sequenceLengths.forEach((length, s) => {
        if (length > 0) count(Math.exp(sequenceLogRatios[s] as number));
      });
    }
  }
  const share = (n: number) => (tokens === 0 ? 0 : n / tokens);
  return {
    loss: result.loss,
    tokens,
    kl: share(kl),
    clipFraction: share(low + high),
    clipLowFraction: share(low),
    clipHighFraction: share(high),
    ratio:
      ratio.count === 0
        ? { mean: 1, min: 1, max: 1 }
        : { mean: ratio.sum / ratio.count, min: ratio.min, max: ratio.max },
    entropy: share(entropy),
    logprobs,
  };
}
