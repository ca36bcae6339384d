import { invalidArgument, MerfError } from '../errors.js';
import type { NativeLoss, NativeLossStatistics } from '../native.js';
import type { PackedForest, Target, TrainTarget } from './forest.js';

export type PolicyLossType = 'grpo' | 'dapo' | 'dr_grpo' | 'bnpo' | 'cispo' | 'gspo';

/**
 * What is minimised, summed over tokens t of completions c with advantage A and ratio r = exp(logprob - old
 * logprob), log-probabilities and entropies being those of softmax(logits / `temperature`):
 *
 * - `grpo`, `dapo`, `bnpo`, `dr_grpo`: -min(r A, clip(r, 1 - clipLow, 1 + clipHigh) A)
 * - `gspo`: the same with one ratio a completion, exp(mean over its tokens of (logprob - old logprob))
 *   (arXiv:2507.18071)
 * - `cispo`: -stop_gradient(min(r, 1 + clipHigh)) A logprob (arXiv:2506.13585)
 * - `cross_entropy`: -logprob
 *
 * plus `kl` times the k3 estimate exp(d) - d - 1, d = reference logprob - logprob, which `klRatio` multiplies by r.
 * Tokens are weighted as TRL names it:
 *
 * - `grpo`, `gspo`: the mean over a completion of its tokens, then the mean over completions
 *   (arXiv:2402.03300)
 * - `bnpo`, `dapo`, `cispo`, `cross_entropy`: the sum over all tokens divided by their number (DAPO:
 *   arXiv:2503.14476)
 * - `dr_grpo`: the sum divided by completions times `maxTokens` (arXiv:2503.20783)
 *
 * over the whole forest of one call, or by what `normalizer` says. A completion whose mask is all 0 counts among the
 * completions. From that goes, whatever the type, `entropy` times the mean entropy over all tokens.
 */
export type Loss =
  | { type: 'cross_entropy'; normalizer?: LossNormalizer | undefined }
  | {
      type: PolicyLossType;
      /** At least 0. Default 0.2; gspo 3e-4; unused by cispo. */
      clipLow?: number | undefined;
      /**
       * At least 0. Default 0.2; gspo 4e-4; cispo 4, which caps the ratio at 5 (TRL's `epsilon_high` for
       * cispo is the cap itself).
       */
      clipHigh?: number | undefined;
      /** Coefficient of the KL penalty; not 0 needs `referenceLogprobs`. Default 0. A target may have its own. */
      kl?: number | undefined;
      /**
       * Whether the KL penalty is multiplied by the ratio, whose gradient it then has too (TRL's
       * `use_bias_correction_kl`, arXiv:2512.02556; of gspo the ratio of the completion, of cispo without its cap). That
       * makes it an unbiased estimate where tokens were drawn from an older policy. Default false.
       */
      klRatio?: boolean | undefined;
      /** Coefficient of the entropy bonus. Default 0. A target may have its own. */
      entropy?: number | undefined;
      /** dr_grpo's constant, in tokens: the most that a completion may have. */
      maxTokens?: number | undefined;
      normalizer?: LossNormalizer | undefined;
      /**
       * At least 0. Divides the logits wherever the loss has a log-probability or an entropy: the temperature that the
       * tokens were drawn at, where ratios are to compare what they were drawn from. 0 (greedy) stands for 1. Default 1.
       */
      temperature?: number | undefined;
    };

/**
 * What sums are divided by in place of what the forest itself has. A trainer gives it where a forest is a part of a
 * batch, or where it leaves out what has no gradient. `dapo` and `cispo` are divided in TRL by the tokens of the whole
 * batch, `bnpo` by those of the mini-batch itself.
 */
export interface LossNormalizer {
  /** Above 0; divides `grpo`, `gspo` and `dr_grpo`. Default: the forest's completions. */
  completions?: number | undefined;
  /** Above 0; divides the other types, and the entropy bonus of all. Default: the forest's tokens that count. */
  tokens?: number | undefined;
}

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
  normalizer: LossNormalizer | undefined;
  temperature: number;
  klRatio: boolean;
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
  const { normalizer } = loss;
  for (const key of ['completions', 'tokens'] as const) {
    const value = normalizer?.[key];
    if (value !== undefined && !(Number.isFinite(value) && value > 0)) {
      throw invalidArgument(`loss.normalizer.${key}`, 'a positive number', value);
    }
  }
  const { klRatio = false } = loss as { klRatio?: unknown };
  if (typeof klRatio !== 'boolean') throw invalidArgument('loss.klRatio', 'true or false', klRatio);
  if (loss.type === 'cross_entropy') {
    if (klRatio) throw invalidArgument('loss.klRatio', 'a loss with a ratio', 'cross_entropy');
    const none = {
      clipLow: 0,
      clipHigh: 0,
      kl: 0,
      entropy: 0,
      maxTokens: undefined,
      temperature: 1,
      klRatio: false,
    };
    return { type: loss.type, ...form, ...none, normalizer };
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
    normalizer,
    temperature: checkTemperature('loss.temperature', loss.temperature),
    klRatio,
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

/** The temperature, 1 where there is none. @throws MerfError INVALID_ARGUMENT */
export function checkTemperature(name: string, temperature: number | undefined): number {
  const chosen = temperature ?? 1;
  if (typeof chosen !== 'number' || !(chosen >= 0 && chosen <= 1e6)) {
    throw invalidArgument(name, 'a non-negative number', temperature);
  }
  return chosen;
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
    const kl = train.kl ?? loss.kl;
    if (kl > 0 && train.referenceLogprobs === undefined) {
      throw new MerfError(
        'INVALID_ARGUMENT',
        `Expected referenceLogprobs for trained segment ${i}: kl is ${kl}`,
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
    normalizer: loss.normalizer,
    temperature: loss.temperature,
    klRatio: loss.klRatio,
    ...(forest.targets.some(({ train }) => train.referenceLogprobs !== undefined) && {
      referenceLogprobs: byRow((train, token) => train.referenceLogprobs?.[token]),
    }),
  };
  if (loss.kind === 'cross_entropy') return common;
  const some = (key: 'kl' | 'entropy') => forest.targets.some(({ train }) => train[key] !== undefined);
  return {
    ...common,
    advantages: byRow(({ advantage }, token) =>
      typeof advantage === 'object' ? advantage[token] : advantage,
    ),
    oldLogprobs: byRow((train, token) => train.logprobs?.[token]),
    ...(some('kl') && { klCoefficients: byRow((train) => train.kl ?? loss.kl) }),
    ...(some('entropy') && { entropyCoefficients: byRow((train) => train.entropy ?? loss.entropy) }),
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
