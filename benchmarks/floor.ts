// The arithmetic that a GRPO step cannot do without, and the rate at which this machine could do it.
import { execFileSync } from 'node:child_process';
import { existsSync } from 'node:fs';
import type { ModelConfig } from 'merf';
import { programPath } from './paths.js';
import type { Dtype, Sizes } from './workloads.js';

/** Additions and multiplications, or seconds. */
export interface Parts {
  generation: number;
  training: number;
  step: number;
}

/**
 * Additions and multiplications of a step that computes every distinct token once: the layers' products for all tokens,
 * the head's for those that are drawn or scored; one forward pass for the rollout; in training one more, and two for
 * the gradients. Attention is left out.
 */
export function operationsOf(config: ModelConfig, sizes: Sizes): Parts {
  const { hiddenSize, layers, heads, kvHeads, headSize, mlpSize, vocabSize } = config;
  const attention = 2 * hiddenSize * (heads + kvHeads) * headSize;
  const weights = layers * (attention + 3 * hiddenSize * mlpSize);
  const sampled = sizes.prompts * sizes.group * sizes.completionTokens;
  const tokens = sizes.prompts * sizes.promptTokens + sampled;
  const generation = 2 * weights * tokens + 2 * hiddenSize * vocabSize * sampled;
  return { generation, training: 3 * generation, step: 4 * generation };
}

/** Seconds at `gflops` billion operations a second. */
export function secondsOf(operations: Parts, gflops: number): Parts {
  const at = (n: number) => n / (gflops * 1e9);
  return {
    generation: at(operations.generation),
    training: at(operations.training),
    step: at(operations.step),
  };
}

/** GFLOP/s of products with packed weights, as the engine itself multiplies, by `dtype/rows`. */
export type MatrixRates = Record<string, number>;

/** undefined where the program was not built, as in a package without the sources. */
export function measureMatrixRates(threads: number): MatrixRates | undefined {
  const program = programPath('matrix_rate');
  if (!existsSync(program)) return undefined;
  return JSON.parse(execFileSync(program, [String(threads)], { encoding: 'utf8' })) as MatrixRates;
}

/** The best of two measurements, case by case. */
export function bestRates(a: MatrixRates | undefined, b: MatrixRates | undefined): MatrixRates | undefined {
  if (a === undefined || b === undefined) return a ?? b;
  return Object.fromEntries(Object.entries(a).map(([key, rate]) => [key, Math.max(rate, b[key] ?? 0)]));
}

/** The best rate of `dtype` over many rows; undefined where none was measured. */
export function peakRate(rates: MatrixRates | undefined, dtype: Dtype): number | undefined {
  const wanted = Object.entries(rates ?? {}).filter(([key]) => key.startsWith(`${dtype}/2048`));
  return wanted.length === 0 ? undefined : Math.max(...wanted.map(([, rate]) => rate));
}
