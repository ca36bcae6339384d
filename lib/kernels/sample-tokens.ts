import { invalidArgument } from '../errors.js';
import { cancellable } from '../native.js';
import { type FloatDType, kernelCall, type Tensor } from './device.js';

export interface SampleTokensArguments {
  /** [B, vocabulary] f32, left unchanged. */
  logits: Tensor<FloatDType>;
  /** [2 B], the words (low, high) of each row's Philox key: which sequence draws. */
  keys: Uint32Array;
  /** [B], the counter of each row's draw: how many tokens its sequence drew before. At least 0. */
  positions: Int32Array;
  seed: number | bigint;
  /** 0: the most likely token. Default 1. */
  temperature?: number | undefined;
  /** Draws from the k most likely tokens; 0 (default): from all. */
  topK?: number | undefined;
  /** Draws from the most likely tokens that together reach this probability; 1 (default): from all. */
  topP?: number | undefined;
  /** Draws from tokens at least this likely relative to the most likely one; 0 (default): from all. */
  minP?: number | undefined;
  /** Ends the kernel early: on the CPU in its midst, on other devices before it begins. */
  signal?: AbortSignal | undefined;
}

export interface SampledTokens {
  /** [B] i32 */
  tokens: Tensor<'i32'>;
  /** [B] under softmax(logits / temperature), greedy as 1, untruncated: the one that an importance ratio compares. */
  logprobs: Tensor<'f32'>;
  /** [B] under the distribution drawn from, after temperature and truncation; 0 where greedy. */
  samplingLogprobs: Tensor<'f32'>;
  /** [B] of the distribution of `logprobs`, in nats. */
  entropies: Tensor<'f32'>;
}

/**
 * Draws a token from each row with Philox4x32-10 keyed by (seed, key) at the row's counter, so that a draw depends on
 * nothing else in the batch.
 * @throws MerfError INVALID_ARGUMENT, DISPOSED, OUT_OF_MEMORY, ABORTED
 */
export async function sampleTokens(args: SampleTokensArguments): Promise<SampledTokens> {
  const call = kernelCall(args.logits, 'logits');
  if (typeof args.seed === 'number' && !Number.isSafeInteger(args.seed)) {
    throw invalidArgument('seed', 'an integer from 0 to 2^64 - 1', args.seed);
  }
  const drawn = await cancellable('sampleTokens', args.signal, (cancel) =>
    call.device.sampleTokens(
      {
        logits: call.handle(args.logits, 'logits'),
        keys: args.keys,
        positions: args.positions,
        seed: typeof args.seed === 'number' ? BigInt(args.seed) : args.seed,
        temperature: args.temperature ?? 1,
        topK: args.topK ?? 0,
        topP: args.topP ?? 1,
        minP: args.minP ?? 0,
      },
      cancel,
    ),
  );
  return {
    tokens: call.tensor(drawn.tokens),
    logprobs: call.tensor(drawn.logprobs),
    samplingLogprobs: call.tensor(drawn.samplingLogprobs),
    entropies: call.tensor(drawn.entropies),
  };
}
