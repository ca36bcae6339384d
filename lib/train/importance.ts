import { invalidArgument } from '../errors.js';

export interface ImportanceWeightOptions {
  /** Whether each token has a weight of its own, or all of a completion the product of theirs. Default `token`. */
  level?: 'token' | 'sequence' | undefined;
  /** What becomes of a ratio outside [floor, cap]: it is cut off there, or its tokens weigh 0. Default `truncate`. */
  mode?: 'truncate' | 'mask' | undefined;
  /** The most that a ratio may be; may be Infinity. Default 3, TRL's. */
  cap?: number | undefined;
  /** The least that a ratio may be. Default 0. */
  floor?: number | undefined;
  /** [tokens] 0 leaves a token out of a sequence's ratio, as those of an environment. Default: all 1. */
  mask?: ArrayLike<number> | undefined;
}

/**
 * The weights that make up for tokens having been drawn by another engine, other weights or another prompt than the ones
 * that are trained: the importance ratio p(trained) / p(sampler), kept within bounds and without gradient (truncated
 * importance sampling, Ionides 2008; masked: arXiv:2510.18855). They are those of TRL's `vllm_importance_sampling_mode`:
 * `token_truncate`, `token_mask`, `sequence_truncate`, `sequence_mask`.
 *
 * A trainer of one's own scores what was drawn elsewhere before its first update, and gives the loss the products of
 * weights and advantage, and those scores as old log-probabilities:
 *
 *     const { logprobs } = await policy.score(forestOf(branches));
 *     const weights = importanceWeights(logprobs[i], drawn.logprobs, { level: 'sequence', mode: 'mask' });
 *     target.advantage = weights.map((weight) => weight * advantage);
 *     target.logprobs = logprobs[i];
 *
 * @param trained [tokens] log-probabilities of a completion's tokens under the policy that is trained, before the update
 * @param sampler [tokens] those that they were drawn with; NaN where they are not known, which counts as a ratio of 1
 * @returns [tokens]
 * @throws MerfError INVALID_ARGUMENT
 */
export function importanceWeights(
  trained: ArrayLike<number>,
  sampler: ArrayLike<number>,
  options: ImportanceWeightOptions = {},
): Float32Array {
  const { level = 'token', mode = 'truncate', cap = 3, floor = 0, mask } = options;
  const tokens = trained.length;
  for (const [name, values] of Object.entries({ sampler, ...(mask && { mask }) })) {
    if (values.length === tokens) continue;
    throw invalidArgument(name, `${tokens} values, as many as there are tokens,`, values.length);
  }
  if (!['token', 'sequence'].includes(level)) throw invalidArgument('level', '"token" or "sequence"', level);
  if (!['truncate', 'mask'].includes(mode)) throw invalidArgument('mode', '"truncate" or "mask"', mode);
  if (!(floor >= 0)) throw invalidArgument('floor', 'a number of at least 0', floor);
  if (!(cap > 0 && cap >= floor)) throw invalidArgument('cap', 'a number above 0 and at least floor', cap);

  const logRatios = Float64Array.from({ length: tokens }, (_, t) => {
    if (mask && mask[t] === 0) return 0;
    const difference = (trained[t] as number) - (sampler[t] as number);
    return Number.isNaN(difference) ? 0 : difference;
  });
  const bounded = (logRatio: number) => {
    const ratio = Math.exp(logRatio);
    if (mode === 'truncate') return Math.min(Math.max(ratio, floor), cap);
    return ratio < floor || ratio > cap ? 0 : ratio;
  };
  if (level === 'token') return Float32Array.from(logRatios, bounded);
  return new Float32Array(tokens).fill(bounded(logRatios.reduce((sum, value) => sum + value, 0)));
}
