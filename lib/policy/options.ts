import { invalidArgument } from '../errors.js';
import type { ModelConfig } from './config.js';
import type { TokenizerOptions } from './tokenizer.js';

export interface DeviceOptions extends TokenizerOptions {
  /**
   * `auto` (default): the GPU, or the CPU where there is none to use or the model does not fit its free
   * memory; `policy.device.reason` says why then. Else `cpu`, `cuda`, or for tests `cuda-emulated`: CUDA's
   * kernels on the processor.
   */
  device?: string | undefined;
  /**
   * The type of weights and activations; master weights, gradients and moments are always float32. `auto`:
   * bf16 where the device multiplies it in hardware and the model has at least 50 million parameters (smaller
   * ones gain little time from it and lose accuracy), else f32.
   */
  dtype?: 'auto' | 'f32' | 'bf16' | undefined;
  /** CPU threads; 0 (default): all. */
  threads?: number | undefined;
  /** false: no gradients and no optimiser state, for sampling and scoring. Default true. */
  trainable?: boolean | undefined;
  /** Trains low-rank adapters on the projections of all layers and leaves the weights as they are. */
  lora?: LoraOptions | undefined;
  /**
   * Insists that `sample`, `score` and `forwardBackward` give a token the same log-probability, bit for bit,
   * whatever is in the batch beside it, so that the importance ratio of the first update is exactly 1. It
   * costs nothing: the CPU computes in such orders anyhow, and a device that does not is refused with
   * UNSUPPORTED. Holds between updates of one policy on one machine. Default false.
   */
  exact?: boolean | undefined;
  /**
   * Bytes that keys and values may take between calls of `sample`. Until the weights change, what a call has
   * computed of prompts and completions is not computed again by a later one, bit for bit where the device is
   * exact: a second turn, an evaluation, a second sample of the same prompts pay for their new tokens alone.
   * What was used longest ago goes first, and all of it where a gradient pass needs the memory. 0: nothing is
   * kept. Default: an eighth of the device's memory.
   */
  sessionBytes?: number | undefined;
  /** Times every operator, for `takeProfile`; a call takes a little longer. Default false. */
  profile?: boolean | undefined;
  signal?: AbortSignal | undefined;
}

/**
 * y = x W^T + (x A^T) B^T with A [rank, inputs] and B [outputs, rank] (LoRA,
 * https://arxiv.org/abs/2106.09685): gradients, moments and float32 masters are those of A and B alone. Its
 * scale is 1 (alpha equals the rank); B starts at 0. The products q, k, v share an A, and so do gate and up.
 */
export interface LoraOptions {
  /** 1 to the smaller of the hidden and the MLP size; 8 to 64 are usual. */
  rank: number;
  /** Seed of the first values of A. Default 0. */
  seed?: number | bigint | undefined;
}

export interface CreateOptions extends DeviceOptions {
  /** Seed of the random weights. Default 0. */
  seed?: number | bigint | undefined;
  /** Standard deviation of the matrices' normal distribution. Default 0.02. */
  standardDeviation?: number | undefined;
}

export interface OptimizerOptions {
  /**
   * Positive, or 0 for no change. An update moves a weight by about as much: below 2^-25 of a weight, which for those of
   * ordinary size is 1e-9, float32 does not change.
   */
  learningRate: number;
  /** Default 0.9. */
  beta1?: number | undefined;
  /** Default 0.999. */
  beta2?: number | undefined;
  /** Default 1e-8; from 2^-126, the least that float32 holds in full: with 0 a gradient of 0 would make weights NaN. */
  epsilon?: number | undefined;
  /** Decoupled, on matrices alone. Default 0. */
  weightDecay?: number | undefined;
  /** Gradients are scaled down to this global norm; 0 (default): not clipped. */
  maxGradNorm?: number | undefined;
}

export interface SaveOptions {
  /** The type of the stored weights. Default: the policy's. */
  dtype?: 'f32' | 'bf16' | undefined;
  /** Weights beyond this are divided into several files, with an index. Default 5 GB. */
  maxShardBytes?: number | undefined;
  signal?: AbortSignal | undefined;
}

/** @throws MerfError INVALID_ARGUMENT */
export function checkLora({ rank }: LoraOptions, trainable: boolean, config: ModelConfig): void {
  if (!trainable) throw invalidArgument('lora', 'nothing where trainable is false', { rank });
  const most = Math.min(config.hiddenSize, config.mlpSize);
  if (!Number.isInteger(rank) || rank < 1 || rank > most) {
    throw invalidArgument('lora.rank', `an integer from 1 to ${most}`, rank);
  }
}

const leastEpsilon = 2 ** -126;

/** The options with their defaults. @throws MerfError INVALID_ARGUMENT */
export function resolveOptimizer(options: OptimizerOptions) {
  const {
    learningRate,
    beta1 = 0.9,
    beta2 = 0.999,
    epsilon = 1e-8,
    weightDecay = 0,
    maxGradNorm = 0,
  } = options ?? {};
  const resolved = { learningRate, beta1, beta2, epsilon, weightDecay, maxGradNorm };
  for (const [key, value] of Object.entries(resolved)) {
    if (typeof value !== 'number' || !Number.isFinite(value) || value < 0) {
      throw invalidArgument(key, 'a non-negative number', value);
    }
  }
  if (epsilon < leastEpsilon) throw invalidArgument('epsilon', `a number from ${leastEpsilon}`, epsilon);
  // Rounded to 0 they would mean another thing: no change, and no clipping.
  for (const [key, value] of Object.entries({ learningRate, maxGradNorm })) {
    if (value > 0 && Math.fround(value) === 0) {
      throw invalidArgument(key, '0, or a number that float32 does not round to 0', value);
    }
  }
  if (beta1 >= 1) throw invalidArgument('beta1', 'a number below 1', beta1);
  if (beta2 >= 1) throw invalidArgument('beta2', 'a number below 1', beta2);
  return resolved;
}

/** @throws MerfError INVALID_ARGUMENT */
export function checkMaxTokens(maxTokens: number | undefined): void {
  if (maxTokens !== undefined && (!Number.isInteger(maxTokens) || maxTokens < 1)) {
    throw invalidArgument('maxTokens', 'a positive integer', maxTokens);
  }
}

/** @throws MerfError INVALID_ARGUMENT */
export function checkDirectory(directory: string): void {
  if (typeof directory !== 'string' || directory === '')
    throw invalidArgument('directory', 'a path', directory);
}

/** What sampling did with prompts' tokens since the policy was made or `resetCacheStatistics`. */
export interface CacheStatistics {
  /** Distinct tokens of the prompts of each call that were computed. */
  tokensPrefilled: number;
  /** Distinct tokens of the prompts of each call whose keys and values were there already. */
  tokensReused: number;
  /** Bytes of the keys and values that a later call may use. */
  bytes: number;
}
