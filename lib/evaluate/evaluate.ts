import { MerfError, throwIfAborted } from '../errors.js';
import { formatMotivation } from '../prompt/motivation.js';
import {
  type CollectOptions,
  collect,
  type EpisodeGroup,
  EpisodeTally,
  type RolloutPolicy,
} from '../rollout/index.js';
import type { Task } from '../tasks/index.js';
import { passAtK } from './pass-at-k.js';

/** How episodes are drawn, and how many; see `CollectOptions` for what is not said here. */
export interface EvaluateOptions<Row>
  extends Omit<CollectOptions, 'n' | 'keepActivations' | 'onToken' | 'onTimes'> {
  /** Completions of each prompt (default 1). */
  samples?: number;
  /** The k of pass@k, none above `samples` (default: the powers of 2 up to it). */
  passAt?: readonly number[];
  /** Seed of the draws: equal seeds draw equal completions, so that evaluations differ by the weights alone. */
  seed?: number | bigint;
  /** Completions drawn in one batch (default 256). */
  batch?: number;
  onProgress?: (done: number, rows: number) => void;
  /** Receives the episodes of each row. */
  onGroup?: (group: EpisodeGroup<Row>) => void;
}

export interface Evaluation {
  motivation: string;
  rows: number;
  samples: number;
  /** Share of correct completions, which is pass@1. */
  accuracy: number;
  /** Standard error of `accuracy` over the rows. */
  accuracyError: number;
  /** Mean total. */
  reward: number;
  /** Mean score of each component. */
  parts: Record<string, number>;
  /** Share of completions in each case of each component. */
  cases: Record<string, Record<string, number>>;
  /** pass@k by k, unbiased. */
  passAt: Record<string, number>;
  /** Mean tokens that the model drew in an episode. */
  length: number;
  /** Share of episodes that ran out of tokens. */
  truncated: number;
  /** Mean turns of the model in an episode, where the task has an environment. */
  turns?: number;
  /** Share of episodes in which the environment failed, where there is one. */
  failures?: number;
  /** Mean entropy of the next-token distributions, in nats. */
  entropy: number;
  seconds: number;
}

/**
 * Draws episodes of every row and judges them.
 * @throws MerfError EMPTY_DATASET without rows, INVALID_ARGUMENT, VERIFIER_FAILED, VERIFIER_TIMEOUT, ABORTED
 */
export async function evaluate<Row>(
  policy: RolloutPolicy,
  task: Task<Row>,
  rows: readonly Row[],
  options: EvaluateOptions<Row> = {},
): Promise<Evaluation> {
  const {
    samples = 1,
    passAt = powersOfTwo(samples),
    seed = 0,
    batch = 256,
    onProgress,
    onGroup,
    ...drawn
  } = options;
  const { motivation = 'none', signal } = drawn;
  if (rows.length === 0) throw new MerfError('EMPTY_DATASET', 'Expected at least one row to evaluate on');
  if (!Number.isInteger(samples) || samples < 1) {
    throw new MerfError(
      'INVALID_ARGUMENT',
      `Expected a positive integer for samples but received ${samples}`,
    );
  }
  const started = performance.now();
  const corrects: number[] = [];
  const passes = passAt.map(() => 0);
  const tally = new EpisodeTally();
  const prompts = Math.max(1, Math.floor(batch / samples));
  for (let from = 0; from < rows.length; from += prompts) {
    throwIfAborted(signal, 'evaluation');
    const groups = await collect(policy, task, rows.slice(from, from + prompts), {
      ...drawn,
      n: samples,
      // Each batch draws from a stream of its own, none of them that of a training step.
      seed: (1n << 63n) | (BigInt.asUintN(39, BigInt(seed)) << 24n) | BigInt(from),
    });
    for (const group of groups) {
      tally.add(group);
      const correct = group.episodes.filter(({ reward }) => task.spec.isHighest(reward)).length;
      corrects.push(correct / samples);
      for (const [j, k] of passAt.entries()) passes[j] = (passes[j] as number) + passAtK(samples, correct, k);
      onGroup?.(group);
    }
    onProgress?.(Math.min(rows.length, from + prompts), rows.length);
  }
  const accuracy = mean(corrects);
  const variance =
    corrects.reduce((sum, c) => sum + (c - accuracy) ** 2, 0) / Math.max(1, corrects.length - 1);
  return {
    motivation: formatMotivation(motivation),
    rows: rows.length,
    samples,
    accuracy,
    accuracyError: Math.sqrt(variance / corrects.length),
    ...tally.summary({ environment: task.environment !== undefined }),
    passAt: Object.fromEntries(passAt.map((k, j) => [k, (passes[j] as number) / rows.length])),
    seconds: (performance.now() - started) / 1000,
  };
}

function powersOfTwo(limit: number): number[] {
  const powers: number[] = [];
  for (let k = 1; k <= limit; k *= 2) powers.push(k);
  return powers;
}

function mean(values: readonly number[]): number {
  return values.reduce((sum, value) => sum + value, 0) / values.length;
}
