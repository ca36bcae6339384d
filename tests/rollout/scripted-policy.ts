import type { Completion, SampleOptions } from '../../lib/policy/index.js';
import type { RolloutPolicy, RolloutTokenizer } from '../../lib/rollout/index.js';

/** What a scripted policy writes after a prompt. */
export interface ScriptedTurn {
  text: string;
  finishReason?: Completion['finishReason'];
  /** Ends the turn with the tokenizer's end token. Default: where the finish reason is `stop`. */
  ends?: boolean;
  /** What the end of the completion waits for: milliseconds, or something to happen. */
  after?: number | Promise<void>;
}

/** A policy whose completions a function of the prompt's text writes; it keeps every call for the test to look at. */
export class ScriptedPolicy implements RolloutPolicy {
  readonly calls: { prompts: number[][]; texts: string[]; options: SampleOptions }[] = [];
  contextLength = 4096;

  constructor(
    readonly tokenizer: RolloutTokenizer,
    private readonly write: (prompt: string, at: { prompt: number; completion: number }) => ScriptedTurn,
  ) {}

  async sample(prompts: readonly unknown[], options: SampleOptions = {}) {
    const tokens = prompts.map((prompt) => Array.from(prompt as ArrayLike<number>));
    const texts = tokens.map((ids) => this.tokenizer.decode(ids));
    this.calls.push({ prompts: tokens, texts, options });
    return Promise.all(
      texts.map(async (text, prompt) => ({
        promptTokens: tokens[prompt] as number[],
        completions: await Promise.all(
          Array.from({ length: options.n ?? 1 }, (_, completion) =>
            this.#complete(text, prompt, completion, options),
          ),
        ),
      })),
    );
  }

  async #complete(
    text: string,
    prompt: number,
    completion: number,
    options: SampleOptions,
  ): Promise<Completion> {
    const { text: written, finishReason = 'stop', ends, after } = this.write(text, { prompt, completion });
    await (typeof after === 'number' ? new Promise((resolve) => setTimeout(resolve, after)) : after);
    options.signal?.throwIfAborted();
    const tokens = this.tokenizer.encode(written);
    if (ends ?? finishReason === 'stop') tokens.push(this.tokenizer.eosIds[0] as number);
    const most = options.maxTokens as ArrayLike<number>;
    const cut = tokens.length > (most[prompt] as number);
    const kept = Int32Array.from(cut ? tokens.slice(0, most[prompt]) : tokens);
    const ended: Completion = {
      text: cut ? this.tokenizer.decode(kept) : written,
      tokens: kept,
      logprobs: Float32Array.from(kept, (_, i) => -(i + 1) / 16),
      samplingLogprobs: new Float32Array(kept.length),
      entropies: new Float32Array(kept.length).fill(0.5),
      finishReason: cut ? 'length' : finishReason,
    };
    options.onCompletion?.({
      prompt,
      completion,
      text: ended.text,
      tokens: kept,
      finishReason: ended.finishReason,
    });
    return ended;
  }
}
