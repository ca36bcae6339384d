import { mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { MerfError } from '../../lib/errors.js';
import type { CompletionGroup, Forest, Loss, LossStats, Segment } from '../../lib/policy/index.js';
import { emptyStatistics } from '../../lib/policy/loss.js';
import { Random } from '../../lib/tasks/random.js';
import type { TrainablePolicy } from '../../lib/train/trainer.js';

// Characters are tokens; the last one ends a completion.
export const alphabet = ['a', 'b', 'c', '|'];
const eos = alphabet.length - 1;

// A text that a completion may be is made of letters; a prompt's tokens are the codes of its characters.
function lettersOrCodes(text: string): number[] {
  const letters = [...text].map((c) => alphabet.indexOf(c));
  return letters.includes(-1) ? fakeTokenizer.encode(text) : letters;
}

/** A tokenizer whose tokens are characters. */
export const fakeTokenizer = {
  applyChatTemplate: (messages: readonly { role: string; content: string | null }[]) =>
    `${messages.map((m) => `${m.role}:${m.content}\n`).join('')}assistant:`,
  encode: (text: string) => [...text].map((c) => c.charCodeAt(0)),
  encodePrompt: (text: string) => [...text].map((c) => c.charCodeAt(0)),
  encodeContinuation: (text: string) => [...text].map((c) => c.charCodeAt(0)),
  decode: (ids: ArrayLike<number>) => String.fromCharCode(...Array.from(ids)),
  eosIds: [eos],
  hasChatTemplate: false,
};

/**
 * A policy of four logits, the same at every position, with exact gradients of the clipped loss and plain gradient
 * descent: small enough to check a trainer by hand, real enough to learn.
 */
export class FakePolicy {
  logits = [0, 0, 0, 0];
  gradient = [0, 0, 0, 0];
  updates = 0;
  contextLength = 1000;
  /** Steps of sampling at which something goes wrong. */
  breakLossAt = new Set<number>();
  breakGradientAt = new Set<number>();
  sampleCalls: unknown[] = [];
  losses: Loss[] = [];
  forests: Forest[] = [];
  onSample?: () => void | Promise<void>;
  onForwardBackward?: () => void;
  /** What is added to the logits after a prompt, for a model that its prompt's words sway. */
  sway?: (prompt: string) => readonly number[];
  #calls = 0;

  tokenizer = { ...fakeTokenizer, encode: lettersOrCodes, encodeContinuation: lettersOrCodes };

  get asPolicy(): TrainablePolicy {
    return this as unknown as TrainablePolicy;
  }

  #logprobs(sway: readonly number[] = [0, 0, 0, 0]): number[] {
    const logits = this.logits.map((logit, k) => logit + (sway[k] as number));
    const max = Math.max(...logits);
    const sum = logits.reduce((total, logit) => total + Math.exp(logit - max), 0);
    return logits.map((logit) => logit - max - Math.log(sum));
  }

  async sample(
    prompts: ArrayLike<number>[],
    options: {
      n: number;
      maxTokens: number[];
      seed: bigint;
      keys?: ArrayLike<number>;
      firstIndices?: ArrayLike<number>;
      signal?: AbortSignal;
    },
  ): Promise<CompletionGroup[]> {
    this.sampleCalls.push(options);
    await this.onSample?.();
    if (options.signal?.aborted) throw new MerfError('ABORTED', 'sampling was aborted');
    return prompts.map((promptTokens, p) => ({
      promptTokens: Array.from(promptTokens),
      completions: Array.from({ length: options.n }, (_, i) => {
        const logprobs = this.#logprobs(this.sway?.(this.tokenizer.decode(promptTokens)));
        const index = (options.firstIndices?.[p] ?? 0) + i;
        const key = options.keys?.[p] ?? p;
        // Streams have 32 bits: the key's highest is told apart by the seed's.
        const random = new Random(options.seed ^ (BigInt(key >>> 31) << 63n), key * 1000 + index);
        const tokens: number[] = [];
        while (tokens.length < (options.maxTokens[p] as number) && tokens.at(-1) !== eos) {
          let draw = random.uniform();
          let token = 0;
          while (token < eos && draw >= Math.exp(logprobs[token] as number)) {
            draw -= Math.exp(logprobs[token] as number);
            token++;
          }
          tokens.push(token);
        }
        const ended = tokens.at(-1) === eos;
        return {
          text: tokens
            .filter((t) => t !== eos)
            .map((t) => alphabet[t])
            .join(''),
          tokens: Int32Array.from(tokens),
          logprobs: Float32Array.from(tokens, (t) => logprobs[t] as number),
          samplingLogprobs: Float32Array.from(tokens, (t) => logprobs[t] as number),
          entropies: new Float32Array(tokens.length).fill(-logprobs.reduce((s, l) => s + l * Math.exp(l), 0)),
          finishReason: ended ? ('stop' as const) : ('length' as const),
        };
      }),
    })) as unknown as CompletionGroup[];
  }

  async score(forest: Forest) {
    const logprobs = this.#logprobs();
    const targets = trained(forest);
    return {
      logprobs: targets.map(({ tokens }) => Float32Array.from(tokens, (t) => logprobs[t] as number)),
      entropies: targets.map(({ tokens }) => new Float32Array(tokens.length)),
    };
  }

  async forwardBackward(
    forest: Forest,
    loss: Loss,
    options: { signal?: AbortSignal } = {},
  ): Promise<LossStats> {
    const call = this.#calls++;
    this.losses.push(loss);
    this.forests.push(forest);
    this.onForwardBackward?.();
    if (options.signal?.aborted) throw new MerfError('ABORTED', 'forwardBackward was aborted');
    if (this.breakLossAt.has(call)) {
      await this.zeroGradients();
      return statistics({ loss: Number.NaN, finite: false });
    }
    const logprobs = this.#logprobs();
    const targets = trained(forest);
    let total = 0;
    let count = 0;
    const ratio = { sum: 0, min: Number.POSITIVE_INFINITY, max: Number.NEGATIVE_INFINITY };
    for (const { tokens, train } of targets) {
      for (let i = 0; i < tokens.length; i++) {
        if (train?.mask && train.mask[i] === 0) continue;
        const token = tokens[i] as number;
        const old = train?.logprobs?.[i];
        const r = old === undefined ? 1 : Math.exp((logprobs[token] as number) - old);
        const given = typeof train?.advantage === 'object' ? train.advantage[i] : train?.advantage;
        const advantage = loss.type === 'cross_entropy' ? 1 : (given ?? 0);
        const completions = ('normalizer' in loss && loss.normalizer?.completions) || targets.length;
        const weight = 1 / (completions * tokens.length);
        total += weight * (loss.type === 'cross_entropy' ? -(logprobs[token] as number) : -r * advantage);
        count++;
        ratio.sum += r;
        ratio.min = Math.min(ratio.min, r);
        ratio.max = Math.max(ratio.max, r);
        for (let k = 0; k < this.logits.length; k++) {
          const slope = (k === token ? 1 : 0) - Math.exp(logprobs[k] as number);
          this.gradient[k] = (this.gradient[k] as number) - weight * r * advantage * slope;
        }
      }
    }
    if (this.breakGradientAt.has(call)) this.gradient[0] = Number.NaN;
    return statistics({
      loss: total,
      tokens: count,
      ratio: { mean: ratio.sum / Math.max(1, count), min: ratio.min, max: ratio.max },
    });
  }

  async optimStep(options: { learningRate: number }) {
    const gradientNorm = Math.hypot(...this.gradient);
    const applied = Number.isFinite(gradientNorm);
    if (applied) {
      this.logits = this.logits.map(
        (logit, k) => logit - options.learningRate * (this.gradient[k] as number),
      );
      this.updates++;
    }
    await this.zeroGradients();
    return { gradientNorm, applied };
  }

  async zeroGradients() {
    this.gradient = this.gradient.map(() => 0);
  }

  async save(folder: string) {
    mkdirSync(folder, { recursive: true });
    writeFileSync(join(folder, 'weights.json'), JSON.stringify(this.logits));
  }

  async saveState(folder: string) {
    mkdirSync(folder, { recursive: true });
    writeFileSync(join(folder, 'state.json'), JSON.stringify({ logits: this.logits, updates: this.updates }));
  }

  async loadState(folder: string) {
    const state = JSON.parse(readFileSync(join(folder, 'state.json'), 'utf8')) as FakePolicy;
    this.logits = state.logits;
    this.updates = state.updates;
  }
}

function statistics(found: Partial<LossStats>): LossStats {
  return { ...emptyStatistics(), logprobs: [], ...found };
}

function trained(forest: Forest): Segment[] {
  return forest.flatMap((segment) => [
    ...(segment.train ? [segment] : []),
    ...trained(segment.children ?? []),
  ]);
}
