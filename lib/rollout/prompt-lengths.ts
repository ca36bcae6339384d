import type { ChatMessage } from '../prompt/chat-template.js';
import type { MotivationView } from '../prompt/motivation.js';
import { episodePrompt, type RolloutPolicy, type RolloutTask } from './collect.js';
import type { RolloutTokenizer } from './prompt.js';

export interface PromptLengthOptions<Row> {
  readonly policy: Pick<RolloutPolicy, 'tokenizer' | 'contextLength'>;
  readonly task: RolloutTask<Row>;
  /** The views under which prompts are measured; the longest counts. */
  readonly views: readonly MotivationView[];
}

/** Tells which rows have a prompt that fills the context, so that no token of a completion fits behind it. */
export class PromptLengths<Row> {
  readonly #options: PromptLengthOptions<Row>;
  readonly #views: readonly MotivationView[];
  readonly #bounds: PromptBounds;

  constructor(options: PromptLengthOptions<Row>) {
    this.#options = options;
    this.#bounds = new PromptBounds(options.policy.tokenizer);
    this.#views = [...new Map(options.views.map((view) => [JSON.stringify(view), view])).values()];
  }

  /** Tokens of the row's longest prompt where it fills the context, otherwise undefined. */
  overlong(row: Row): number | undefined {
    const { policy, task } = this.#options;
    let longest = 0;
    for (const view of this.#views) {
      const prompt = task.messages(row, view);
      if (this.#bounds.of(prompt) < policy.contextLength) continue;
      const { text, tokens } = episodePrompt(policy.tokenizer, task, row, view);
      this.#bounds.note(prompt, text);
      longest = Math.max(longest, tokens.length);
    }
    return longest < policy.contextLength ? undefined : longest;
  }
}

type Prompt = string | readonly ChatMessage[];

/**
 * More tokens than a prompt can have, without rendering it. A token stands for a byte at least, in the vocabularies that
 * models come with; what the chat template adds to the messages is about the same for all of the same roles; and what a
 * system message comes to, which most prompts share, is counted once.
 */
export class PromptBounds {
  readonly #tokenizer: Pick<RolloutTokenizer, 'encode'>;
  readonly #added = new Map<string, number>();
  readonly #counted = new Map<string, number>();

  constructor(tokenizer: Pick<RolloutTokenizer, 'encode'>) {
    this.#tokenizer = tokenizer;
  }

  /** The bound, infinite where no prompt of the same roles has been noted. */
  of(prompt: Prompt): number {
    if (typeof prompt === 'string') return Buffer.byteLength(prompt) + margin;
    const added = this.#added.get(rolesOf(prompt));
    if (added === undefined) return Number.POSITIVE_INFINITY;
    return prompt.reduce((sum, message) => sum + this.#mostTokens(message), 2 * added + margin);
  }

  /** Takes note of what the template made of a prompt. */
  note(prompt: Prompt, text: string): void {
    // What a message has beside its text may be of any length, from row to row.
    if (typeof prompt === 'string' || prompt.some((message) => Object.keys(message).length > 2)) return;
    const added = Math.max(0, Buffer.byteLength(text) - bytesOf(prompt));
    const roles = rolesOf(prompt);
    this.#added.set(roles, Math.max(added, this.#added.get(roles) ?? 0));
    const system = prompt[0]?.role === 'system' ? prompt[0].content : null;
    if (system === null || this.#counted.has(system) || this.#counted.size === mostCounted) return;
    this.#counted.set(system, this.#tokenizer.encode(system).length);
  }

  #mostTokens({ content }: ChatMessage): number {
    return this.#counted.get(content ?? '') ?? Buffer.byteLength(content ?? '');
  }
}

// Tokens that begin a text, and a template that words some prompts a little otherwise.
const margin = 64;
const mostCounted = 64;

function rolesOf(prompt: Exclude<Prompt, string>): string {
  return prompt.map((message) => `${message.role} ${Object.keys(message).length}`).join('\n');
}

function bytesOf(prompt: Exclude<Prompt, string>): number {
  return prompt.reduce((sum, { content }) => sum + Buffer.byteLength(content ?? ''), 0);
}
