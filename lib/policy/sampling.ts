import { invalidArgument, MerfError } from '../errors.js';
import type { NativeSampleRequest } from '../native.js';
import type { ChatMessage } from '../prompt/chat-template.js';
import { encodePrompt } from '../prompt/encode-prompt.js';
import type { FinishReason } from '../reward/completion.js';
import { checkedTokens, packPrompts } from './forest.js';
import { checkTemperature } from './loss.js';
import type { Tokenizer } from './tokenizer.js';

/**
 * What to complete: text (encoded with the tokenizer's special tokens), token ids as they are, or a conversation that
 * the model's chat template writes and opens the assistant's turn of.
 */
export type Prompt = string | ArrayLike<number> | { messages: readonly ChatMessage[] };

export interface SampleOptions {
  /** Completions of each prompt. Default 1. */
  n?: number | undefined;
  /**
   * The most tokens of a completion, of all prompts or [prompts]. Default 1024; never more than the context leaves after
   * the prompt.
   */
  maxTokens?: number | ArrayLike<number> | undefined;
  /** 0 is greedy. Default 1. */
  temperature?: number | undefined;
  /** Draw from the k likeliest tokens; 0 (default) from all. */
  topK?: number | undefined;
  /** Draw from the likeliest tokens that together reach this probability, in (0, 1]. Default 1. */
  topP?: number | undefined;
  /** Draw from tokens at least this likely relative to the likeliest, in [0, 1]. Default 0. */
  minP?: number | undefined;
  /** 0 to 2^64 - 1. The same seed, key and prompt give the same completion. Default 0. */
  seed?: number | bigint | undefined;
  /**
   * [prompts] 32-bit numbers that stand for the prompts in the random stream. Default: their indices. A completion
   * depends on the seed, its prompt's key and its index in the group, not on what else is in the batch.
   */
  keys?: ArrayLike<number> | undefined;
  /**
   * [prompts] the index of each prompt's first completion in the random stream, 0 to 2^32 - 1. Default: all 0. It gives
   * completions that are drawn apart, such as the turns of an episode, streams of their own.
   */
  firstIndices?: ArrayLike<number> | undefined;
  /** A completion ends with the token in which one of these is completed; tokens and text include it. */
  stop?: readonly string[] | undefined;
  /** Token ids that end a completion beside the tokenizer's `eosIds`. */
  stopTokenIds?: readonly number[] | undefined;
  /** The most completions decoded together; 0 (default): the engine chooses. */
  maxLiveSequences?: number | undefined;
  /**
   * Bytes that may be taken to keep what a backward pass needs of the forward passes that sampling computes anyway,
   * beside the memory of gradients that are 0, which serves for it too. It is kept of the first layers, of as many as
   * that is enough for if every completion had `maxTokens`. The first `forwardBackward` on these completions, before the
   * weights change and before the next `sample`, then computes of their forward pass only attention and the projection of
   * its output. Its gradients are those of the ordinary path, to rounding. The memory stays for the next call that asks
   * for it. Default 0. A policy that is not trainable keeps nothing.
   */
  keepActivations?: number | undefined;
  signal?: AbortSignal | undefined;
  /** Called with tokens as they are drawn, at most once a decoding step; never waited for. */
  onToken?: ((chunk: SampleChunk) => void) | undefined;
  /** Called when a completion has ended while others go on; never waited for. */
  onCompletion?: ((ended: EndedCompletion) => void) | undefined;
}

/** A completion that has ended. */
export interface EndedCompletion extends Pick<Completion, 'text' | 'tokens' | 'finishReason'> {
  /** Which prompt, and which of its completions. */
  prompt: number;
  completion: number;
}

/** New tokens of one completion. */
export interface SampleChunk {
  /** Which prompt, and which of its completions. */
  prompt: number;
  completion: number;
  tokens: number[];
  /** Under the distribution drawn from. */
  samplingLogprobs: number[];
  /** What they add to the text, whole characters only and without the end token. */
  text: string;
}

export interface Completion {
  /** The tokens' text without the end token; a stop string is part of it. */
  text: string;
  /** With the token that ended it, if one did. */
  tokens: Int32Array;
  /**
   * [tokens] under softmax(logits / temperature), untruncated; where greedy, under softmax(logits). The importance ratio
   * uses these on both sides, with the temperature in the loss.
   */
  logprobs: Float32Array;
  /** [tokens] under the distribution drawn from (temperature, top-k, top-p, min-p); 0 where greedy. */
  samplingLogprobs: Float32Array;
  /** [tokens] of the distribution of `logprobs`, in nats. */
  entropies: Float32Array;
  /** `stop`: an end token; `length`: maxTokens or the context; `stop_string`: one of `stop`. */
  finishReason: FinishReason;
}

export interface CompletionGroup {
  promptTokens: number[];
  completions: Completion[];
}

const maxCompletions = 1 << 20;

/** A prompt's tokens. @throws MerfError INVALID_ARGUMENT, CONTEXT_EXCEEDED, UNSUPPORTED (no chat template) */
export function promptTokens(
  prompt: Prompt,
  index: number,
  tokenizer: Tokenizer,
  limits: { vocabSize: number; contextLength: number },
): Int32Array {
  const argument = `prompts[${index}]`;
  let ids: ArrayLike<number>;
  if (typeof prompt === 'string') ids = encodePrompt(tokenizer, prompt).tokens;
  else if (typeof prompt === 'object' && prompt !== null && 'messages' in prompt) {
    if (!Array.isArray(prompt.messages)) {
      throw invalidArgument(`${argument}.messages`, 'an array of messages', prompt.messages);
    }
    ids = encodePrompt(tokenizer, prompt.messages).tokens;
  } else if (typeof prompt === 'object' && prompt !== null) ids = prompt;
  else throw invalidArgument(argument, 'text, token ids or { messages }', prompt);
  const tokens = checkedTokens(ids, limits.vocabSize, argument);
  if (tokens.length === 0) {
    throw new MerfError('INVALID_ARGUMENT', `Expected at least one token for ${argument} but received none`);
  }
  if (tokens.length >= limits.contextLength) {
    throw new MerfError(
      'CONTEXT_EXCEEDED',
      `Expected a prompt shorter than the context of ${limits.contextLength} tokens but ${argument} has ${tokens.length}`,
    );
  }
  return tokens;
}

/** The request to the engine for checked prompts. @throws MerfError INVALID_ARGUMENT */
export function sampleRequest(
  prompts: readonly Int32Array[],
  options: SampleOptions,
  tokenizer: Tokenizer,
  limits: { vocabSize: number; contextLength: number },
): NativeSampleRequest {
  const n = integer('n', options.n, 1, 1, maxCompletions);
  const most = perPrompt('maxTokens', options.maxTokens, prompts.length, 1024, 1, 2 ** 31 - 1);
  const firstIndices = perPrompt(
    'firstIndices',
    options.firstIndices,
    prompts.length,
    0,
    0,
    0xffffffff - n + 1,
  );
  if (n * prompts.length > maxCompletions) {
    throw invalidArgument('n', `at most ${maxCompletions} completions in all`, n * prompts.length);
  }
  const { stop = [], stopTokenIds = [], keys } = options;
  if (!Array.isArray(stop) || !stop.every((text) => typeof text === 'string' && text !== '')) {
    throw invalidArgument('stop', 'an array of non-empty strings', stop);
  }
  if (keys !== undefined && keys.length !== prompts.length) {
    throw invalidArgument('keys', `${prompts.length} numbers, one for each prompt,`, keys);
  }
  const words = new Uint32Array(2 * n * prompts.length);
  prompts.forEach((_, p) => {
    const key = keys === undefined ? p : keys[p];
    if (!Number.isInteger(key) || (key as number) < 0 || (key as number) > 0xffffffff) {
      throw invalidArgument(`keys[${p}]`, 'an integer from 0 to 2^32 - 1', key);
    }
    for (let i = 0; i < n; ++i) {
      words[2 * (p * n + i)] = (firstIndices[p] as number) + i;
      words[2 * (p * n + i) + 1] = key as number;
    }
  });
  const stopTokens = new Set([
    ...tokenizer.eosIds.filter((id) => id < limits.vocabSize),
    ...checkedTokens(stopTokenIds, limits.vocabSize, 'stopTokenIds'),
  ]);
  const utf8 = new TextEncoder();
  return {
    ...packPrompts(prompts),
    counts: new Int32Array(prompts.length).fill(n),
    keys: words,
    seed: seedOf(options.seed ?? 0),
    maxTokens: Int32Array.from(prompts, (prompt, p) =>
      Math.min(most[p] as number, limits.contextLength - prompt.length),
    ),
    temperature: checkTemperature('temperature', options.temperature),
    topK: integer('topK', options.topK, 0, 0, 2 ** 31 - 1),
    topP: number('topP', options.topP, 1, 'a number above 0 and at most 1', (v) => v > 0 && v <= 1),
    minP: number('minP', options.minP, 0, 'a number from 0 to 1', (v) => v >= 0 && v <= 1),
    stopTokens: Int32Array.from(stopTokens),
    stopStrings: stop.map((text) => utf8.encode(text)),
    maxLiveSequences: integer('maxLiveSequences', options.maxLiveSequences, 0, 0, maxCompletions),
    keepBytes: integer('keepActivations', options.keepActivations, 0, 0, Number.MAX_SAFE_INTEGER),
  };
}

export function seedOf(seed: number | bigint): bigint {
  const valid =
    typeof seed === 'bigint' ? seed >= 0n && seed < 1n << 64n : Number.isSafeInteger(seed) && seed >= 0;
  if (!valid) throw invalidArgument('seed', 'an integer from 0 to 2^64 - 1', seed);
  return BigInt(seed);
}

function integer(name: string, value: unknown, fallback: number, minimum: number, maximum: number): number {
  const chosen = value ?? fallback;
  if (typeof chosen !== 'number' || !Number.isInteger(chosen) || chosen < minimum || chosen > maximum) {
    throw invalidArgument(name, `an integer from ${minimum} to ${maximum}`, value);
  }
  return chosen;
}

/** One integer for all prompts, or one for each. */
function perPrompt(
  name: string,
  value: unknown,
  prompts: number,
  fallback: number,
  minimum: number,
  maximum: number,
): number[] {
  if (typeof value !== 'object' || value === null) {
    return new Array<number>(prompts).fill(
      integer(name, value as number | undefined, fallback, minimum, maximum),
    );
  }
  const values = value as ArrayLike<number>;
  if (values.length !== prompts)
    throw invalidArgument(name, `${prompts} numbers, one for each prompt,`, value);
  return Array.from(values, (one, p) => integer(`${name}[${p}]`, one, fallback, minimum, maximum));
}

function number(
  name: string,
  value: unknown,
  fallback: number,
  expected: string,
  accept: (value: number) => boolean,
): number {
  const chosen = value ?? fallback;
  if (typeof chosen !== 'number' || !accept(chosen)) {
    throw invalidArgument(name, expected, value);
  }
  return chosen;
}
