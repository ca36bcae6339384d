import { MerfError } from '../errors.js';
import type { Tokenizer } from '../policy/index.js';
import type { ChatMessage } from '../prompt/chat-template.js';
import { encodePrompt, type PromptTokenizer, renderChat } from '../prompt/encode-prompt.js';
import { formatMotivation, type MotivationView } from '../prompt/motivation.js';
import type { RenderedPrompt } from './episode.js';

/** What a rollout asks of a tokenizer. `Tokenizer` has it. */
export type RolloutTokenizer = PromptTokenizer & Pick<Tokenizer, 'decode' | 'eosIds'>;

/**
 * The prompt of a row, which `encodePrompt` writes: of a conversation by the chat template, which opens the
 * assistant's turn; of a text as it stands.
 * @param origin whether a text stands in a row of data, or was made by who calls (default)
 */
export function renderPrompt(
  tokenizer: RolloutTokenizer,
  prompt: string | readonly ChatMessage[],
  tools?: readonly object[],
  origin: 'row' | 'caller' = 'caller',
): RenderedPrompt {
  const messages = typeof prompt === 'string' ? undefined : prompt;
  return { messages, ...encodePrompt(tokenizer, prompt, { tools, origin }) };
}

/** What a model is to write after a prompt. */
export interface RenderedCompletion {
  /** The completion as it goes on from the prompt, without the token that ends it. */
  readonly text: string;
  /** Its tokens, with the one that ends it where there is one. */
  readonly tokens: readonly number[];
}

/**
 * The tokens of a given completion after its prompt. A tag that the prompt has opened at its end (`<think>`)
 * is not opened again, an end token that the completion brings is not written twice, no dummy prefix stands
 * between the two, and the names of special tokens stay text as in prompts.
 *
 * @param end the token that ends a completion which brings none
 */
export function renderCompletion(
  tokenizer: RolloutTokenizer,
  prompt: Pick<RenderedPrompt, 'text'>,
  completion: string,
  end: number | undefined,
): RenderedCompletion {
  let text = withoutOpenedTag(prompt.text, completion);
  let last = end;
  const names = tokenizer.eosIds.map((id) => [id, tokenizer.decode([id])] as const);
  for (;;) {
    const trimmed = text.trimEnd();
    const [id, name] = names.find(([, ending]) => ending !== '' && trimmed.endsWith(ending)) ?? [];
    if (id === undefined || name === undefined) break;
    text = trimmed.slice(0, trimmed.length - name.length);
    last = id;
  }
  const named = tokenizer.specialSpans?.(text) ?? [];
  const split = named.length > 0 && tokenizer.splitSpecialTokens !== false;
  const ids = split
    ? tokenizer.encodeContinuation(text, { splitSpecialTokens: true })
    : tokenizer.encodeContinuation(text);
  return { text, tokens: last === undefined ? ids : [...ids, last] };
}

/** The completion without a tag at its beginning that stands at the prompt's end already. */
function withoutOpenedTag(prompt: string, completion: string): string {
  const [, tag, space] = /(<[A-Za-z][\w-]*>)(\s*)$/.exec(prompt.slice(-256)) ?? [];
  if (tag === undefined || space === undefined) return completion;
  const begun = completion.trimStart();
  if (!begun.startsWith(tag)) return completion;
  const rest = begun.slice(tag.length);
  return rest.startsWith(space) ? rest.slice(space.length) : rest;
}

/** What a task's prompts are made from. */
interface PromptTask<Row> {
  messages(row: Row, motivation: MotivationView): string | readonly ChatMessage[];
  readonly environment?: { readonly tools?: readonly object[] } | undefined;
}

/**
 * Compares a row's prompts with and without the words of each view, before any work is done.
 * @returns what the user should know of how prompts are written
 * @throws MerfError UNSUPPORTED where the chat template drops the words of a view, or a system message has no
 *   place and may not be moved
 */
export function checkPrompts<Row>(
  tokenizer: RolloutTokenizer,
  task: PromptTask<Row>,
  row: Row,
  views: readonly MotivationView[],
): string[] {
  const write = (view: MotivationView) => {
    const prompt = task.messages(row, view);
    const tokens = renderPrompt(tokenizer, prompt, task.environment?.tools).tokens.join(' ');
    return { prompt, said: JSON.stringify(prompt), tokens };
  };
  const none = write('none');
  let moved = false;
  for (const view of views) {
    const shown = write(view);
    if (shown.said !== none.said && shown.tokens === none.tokens) {
      throw new MerfError(
        'UNSUPPORTED',
        `The chat template drops the words of the motivation ${formatMotivation(view)}: prompts with and without ` +
          'them are the same',
      );
    }
    const first = typeof shown.prompt === 'string' ? undefined : shown.prompt[0];
    moved ||= first?.role === 'system' && tokenizer.keepsSystemMessages === false;
  }
  return [...(tokenizer.notices ?? []), ...(moved ? [movedNotice] : [])];
}

export const movedNotice =
  "The model's chat template has no place for a system message: its words, the motivation among them, stand at " +
  "the beginning of the user's";

// A text that no template changes and no message holds.
const marker = 'merf:the-assistant-spoke-here';

/**
 * What the chat template writes after a turn of the assistant's when `messages` follow, up to where the assistant is to
 * speak again. The template sees a stand-in for the conversation before them, so that nothing the model drew is written
 * a second time: templates that leave earlier thinking out of the history change nothing here.
 *
 * @param lastToken the text of the token that ended the turn, which the template's text then does not repeat
 * @throws MerfError UNSUPPORTED where the template does not write an assistant's words as they are, INVALID_ARGUMENT
 *   where it refuses the messages
 */
export function continuationOf(
  tokenizer: RolloutTokenizer,
  messages: readonly ChatMessage[],
  lastToken: string,
  tools?: readonly object[],
): { text: string; tokens: number[] } {
  const standIn: ChatMessage[] = [
    { role: 'user', content: 'question' },
    { role: 'assistant', content: marker },
  ];
  const { text, literal } = renderChat(tokenizer, [...standIn, ...messages], tools);
  const at = text.indexOf(marker);
  if (at < 0) {
    throw new MerfError(
      'UNSUPPORTED',
      "The chat template does not write an assistant's message as it is, so messages cannot follow a sampled turn",
    );
  }
  const from = at + marker.length;
  const start = lastToken !== '' && text.startsWith(lastToken, from) ? from + lastToken.length : from;
  const rest = text.slice(start);
  const spans = literal.map(([begin, end]): [number, number] => [begin - start, end - start]);
  const tokens =
    spans.length > 0
      ? tokenizer.encodeContinuation(rest, { literal: spans })
      : tokenizer.encodeContinuation(rest);
  return { text: rest, tokens };
}

/** The tokens of a text that an environment puts after a turn; names of special tokens in it stay text. */
export function encodeReply(tokenizer: RolloutTokenizer, text: string): number[] {
  const split = tokenizer.splitSpecialTokens !== false && (tokenizer.specialSpans?.(text).length ?? 0) > 0;
  return split
    ? tokenizer.encodeContinuation(text, { splitSpecialTokens: true })
    : tokenizer.encodeContinuation(text);
}
