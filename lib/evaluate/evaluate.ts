import { MerfError, throwIfAborted } from '../errors.js';
import { formatMotivation, isMix } from '../prompt/motivation.js';
import {
  type CollectOptions,
  checkPrompts,
  collect,
  type EpisodeGroup,
  EpisodeTally,
  type RolloutPolicy,
} from '../rollout/index.js';
import type { Task } from '../tasks/index.js';
import { clusteredMean } from './clustered.js';
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
  /** Receives what each row came to, in the order of the rows, for `pairedDifference`. */
  onRow?: (result: RowResult) => void;
  /** Receives what the user should know of how the prompts are written, before any is. */
  onNotice?: (message: string) => void;
}

/** What one row of an evaluation came to. */
export interface RowResult {
  /** Equal for rows that the task takes for the same. */
  readonly identity: string;
  /** Share of the row's completions that are correct. */
  readonly accuracy: number;
}

export interface Evaluation {
  motivation: string;
  rows: number;
  /** How many of the rows are distinct, by the task's identity. */
  clusters: number;
  samples: number;
  /** Share of correct completions, which is pass@1. */
  accuracy: number;
  /**
   * Standard error of `accuracy`, rows that the task takes for the same being one cluster (see
   * `clusteredMean`).
   */
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
 * @throws MerfError EMPTY_DATASET without rows, INVALID_ARGUMENT, UNSUPPORTED where the chat template drops the words of
 *   the motivation, VERIFIER_FAILED, VERIFIER_TIMEOUT, ABORTED
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
    onRow,
    onNotice,
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
  const views = isMix(motivation) ? motivation : [motivation];
  const notices = checkPrompts(policy.tokenizer, task, rows[0] as Row, views);
  for (const message of notices) onNotice?.(message);
  const started = performance.now();
  const results: RowResult[] = [];
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
      const result = { identity: task.identity(group.row), accuracy: correct / samples };
      results.push(result);
      for (const [j, k] of passAt.entries()) passes[j] = (passes[j] as number) + passAtK(samples, correct, k);
      onGroup?.(group);
      onRow?.(result);
    }
    onProgress?.(Math.min(rows.length, from + prompts), rows.length);
  }
  const { mean, error, clusters } = clusteredMean(
    results.map(({ accuracy }) => accuracy),
    results.map(({ identity }) => identity),
  );
  return {
    motivation: formatMotivation(motivation),
    rows: rows.length,
    clusters,
    samples,
    accuracy: mean,
    accuracyError: error,
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
