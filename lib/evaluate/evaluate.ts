import { MerfError, throwIfAborted } from '../errors.js';
import type { CompletionGroup, Policy } from '../policy/index.js';
import { formatMotivation, type MotivationView } from '../prompt/motivation.js';
import type { Score } from '../reward/index.js';
import type { Task } from '../tasks/index.js';
import { passAtK } from './pass-at-k.js';
import { isCorrect, scoreGroups } from './score.js';

export type EvaluatingPolicy = Pick<Policy, 'sample' | 'tokenizer'>;

export interface EvaluateOptions<Row> {
  /** Completions of each prompt (default 1). */
  samples?: number;
  /** The k of pass@k, none above `samples` (default: the powers of 2 up to it). */
  passAt?: readonly number[];
  /** What the prompts say about the reward (default `none`). */
  motivation?: MotivationView;
  /** Longest completion, in tokens (default 256). */
  maxTokens?: number;
  /** Default 1; 0 is greedy. */
  temperature?: number;
  topK?: number;
  topP?: number;
  minP?: number;
  stop?: readonly string[];
  /** The same seed draws the same completions, so that evaluations of one run differ by the weights alone. */
  seed?: number | bigint;
  /** Completions drawn in one batch (default 256). */
  batch?: number;
  signal?: AbortSignal;
  onProgress?: (done: number, rows: number) => void;
  /** Receives each row's prompt, completions and scores. */
  onGroup?: (row: Row, prompt: string, group: CompletionGroup, scores: readonly Score[]) => void;
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
  /** Mean tokens of a completion. */
  length: number;
  /** Share of completions that ran out of tokens. */
  truncated: number;
  /** Mean entropy of the next-token distributions, in nats. */
  entropy: number;
  seconds: number;
}

/**
 * Samples completions of every row's prompt and scores them.
 * @throws MerfError EMPTY_DATASET without rows, INVALID_ARGUMENT, VERIFIER_FAILED, VERIFIER_TIMEOUT, ABORTED
 */
export async function evaluate<Row>(
  policy: EvaluatingPolicy,
  task: Task<Row>,
  rows: readonly Row[],
  options: EvaluateOptions<Row> = {},
): Promise<Evaluation> {
  const {
    samples = 1,
    motivation = 'none',
    maxTokens = 256,
    temperature = 1,
    seed = 0,
    batch = 256,
  } = options;
  if (rows.length === 0) throw new MerfError('EMPTY_DATASET', 'Expected at least one row to evaluate on');
  if (!Number.isInteger(samples) || samples < 1) {
    throw new MerfError(
      'INVALID_ARGUMENT',
      `Expected a positive integer for samples but received ${samples}`,
    );
  }
  const passAt = options.passAt ?? powersOfTwo(samples);
  const started = performance.now();
  const corrects: number[] = [];
  const passes = passAt.map(() => 0);
  const tally = new ScoreTally();
  const prompts = Math.max(1, Math.floor(batch / samples));
  for (let from = 0; from < rows.length; from += prompts) {
    throwIfAborted(options.signal, 'evaluation');
    const some = rows.slice(from, from + prompts);
    const messages = some.map((row) => task.messages(row, motivation));
    const texts = messages.map((m) => policy.tokenizer.applyChatTemplate(m, { addGenerationPrompt: true }));
    const groups = await policy.sample(
      messages.map((m) => ({ messages: m })),
      {
        n: samples,
        maxTokens,
        temperature,
        ...(options.topK !== undefined && { topK: options.topK }),
        ...(options.topP !== undefined && { topP: options.topP }),
        ...(options.minP !== undefined && { minP: options.minP }),
        ...(options.stop && { stop: [...options.stop] }),
        // Each batch draws from a stream of its own, none of them that of a training step.
        seed: (1n << 63n) | (BigInt.asUintN(39, BigInt(seed)) << 24n) | BigInt(from),
        ...(options.signal && { signal: options.signal }),
      },
    );
    throwIfAborted(options.signal, 'evaluation');
    const scores = await scoreGroups(task, some, texts, groups, {
      ...(options.signal && { signal: options.signal }),
    });
    for (const [i, group] of groups.entries()) {
      const groupScores = scores[i] as Score[];
      tally.add(group, groupScores);
      const correct = groupScores.filter((score) => isCorrect(task, score)).length;
      corrects.push(correct / samples);
      for (const [j, k] of passAt.entries()) passes[j] = (passes[j] as number) + passAtK(samples, correct, k);
      options.onGroup?.(some[i] as Row, texts[i] as string, group, groupScores);
    }
    options.onProgress?.(Math.min(rows.length, from + prompts), rows.length);
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
    ...tally.summary(),
    passAt: Object.fromEntries(passAt.map((k, j) => [k, (passes[j] as number) / rows.length])),
    seconds: (performance.now() - started) / 1000,
  };
}

/** What completions and their scores come to on average. */
export class ScoreTally {
  #count = 0;
  #reward = 0;
  #tokens = 0;
  #truncated = 0;
  #entropy = 0;
  readonly #parts: Record<string, number> = {};
  readonly #cases: Record<string, Record<string, number>> = {};

  add(group: CompletionGroup, scores: readonly Score[]): void {
    for (const [i, completion] of group.completions.entries()) {
      const score = scores[i] as Score;
      this.#count += 1;
      this.#reward += score.total;
      this.#tokens += completion.tokens.length;
      if (completion.finishReason === 'length') this.#truncated += 1;
      for (const entropy of completion.entropies) this.#entropy += entropy;
      for (const [name, part] of Object.entries(score.parts)) {
        this.#parts[name] = (this.#parts[name] ?? 0) + part.score;
        this.#cases[name] ??= {};
        const cases = this.#cases[name];
        cases[part.case] = (cases[part.case] ?? 0) + 1;
      }
    }
  }

  summary() {
    const share = (sums: Record<string, number>) =>
      Object.fromEntries(Object.entries(sums).map(([name, sum]) => [name, sum / this.#count]));
    return {
      reward: this.#reward / this.#count,
      parts: share(this.#parts),
      cases: Object.fromEntries(Object.entries(this.#cases).map(([name, counts]) => [name, share(counts)])),
      length: this.#tokens / this.#count,
      truncated: this.#truncated / this.#count,
      entropy: this.#tokens > 0 ? this.#entropy / this.#tokens : 0,
    };
  }
}

function powersOfTwo(limit: number): number[] {
  const powers: number[] = [];
  for (let k = 1; k <= limit; k *= 2) powers.push(k);
  return powers;
}

function mean(values: readonly number[]): number {
  return values.reduce((sum, value) => sum + value, 0) / values.length;
}
