import { MerfError } from '../errors.js';
import type { ChatMessage, ChatTemplateOptions } from './chat-template.js';

/** A stretch of a text from its character `0` up to `1`. */
type Span = readonly [start: number, end: number];

interface Encoding {
  readonly splitSpecialTokens?: boolean;
  readonly literal?: readonly Span[];
}

/**
 * What writing a prompt asks of a tokenizer. `Tokenizer` has it; one that lacks the optional parts has no
 * special tokens.
 */
export interface PromptTokenizer {
  applyChatTemplate(messages: readonly ChatMessage[], options?: ChatTemplateOptions): string;
  encode(text: string, options?: Encoding): number[];
  encodePrompt(text: string, options?: Encoding): number[];
  encodeContinuation(text: string, options?: Encoding): number[];
  specialSpans?(text: string): readonly Span[];
  readonly splitSpecialTokens?: boolean;
  readonly keepsSystemMessages?: boolean;
  readonly systemMessages?: 'move' | 'refuse';
  readonly notices?: readonly string[];
}

/** A conversation as the chat template writes it. */
export interface RenderedChat {
  readonly text: string;
  /** Spans of `text` where a message holds the name of a special token, which stays text. */
  readonly literal: readonly Span[];
  /** The special tokens that the messages name, whatever becomes of them. */
  readonly named: readonly string[];
}

export interface EncodedPrompt {
  /** The prompt as the model sees it. */
  readonly text: string;
  readonly tokens: readonly number[];
  /** The special tokens that the messages or the text of a row name; absent where there are none. */
  readonly named?: readonly string[];
}

/**
 * The ids of a prompt, which sampling, rollouts, supervised training and verification all get here: of a
 * conversation, what the chat template alone writes, up to where the assistant is to speak; of a text, what
 * the tokenizer puts around texts as well.
 *
 * What a message says never becomes a special token unless the tokenizer allows it (`splitSpecialTokens`), so
 * that a row cannot end its turn and begin another. A system message that the template has no place for joins
 * the user's.
 *
 * @param origin `row`: a text that comes from data, which is treated as messages are; `caller` (default): a
 *   text that is taken as it stands
 * @throws MerfError INVALID_ARGUMENT, UNSUPPORTED as the chat template and `placeSystemMessage` do
 */
export function encodePrompt(
  tokenizer: PromptTokenizer,
  prompt: string | readonly ChatMessage[],
  { tools, origin = 'caller' }: { tools?: readonly object[] | undefined; origin?: 'row' | 'caller' } = {},
): EncodedPrompt {
  if (typeof prompt === 'string') {
    const named = origin === 'row' ? namesIn(tokenizer, prompt) : [];
    const split = named.length > 0 && tokenizer.splitSpecialTokens !== false;
    const tokens = split
      ? tokenizer.encodePrompt(prompt, { splitSpecialTokens: true })
      : tokenizer.encodePrompt(prompt);
    return { text: prompt, tokens, ...(named.length > 0 && { named }) };
  }
  const { text, literal, named } = renderChat(tokenizer, placeSystemMessage(tokenizer, prompt), tools);
  const tokens = literal.length > 0 ? tokenizer.encode(text, { literal }) : tokenizer.encode(text);
  return { text, tokens, ...(named.length > 0 && { named }) };
}

/**
 * Two characters that Unicode gives no meaning, in which no text is written, and of which one may yet be in a
 * file.
 */
const marks = Array.from({ length: 16 }, (_, i) => [0xfdd0 + 2 * i, 0xfdd1 + 2 * i]).map(
  (codes) => codes.map((code) => String.fromCharCode(code)) as [string, string],
);

/**
 * Has the chat template write messages. Names of special tokens are enclosed in marks while it does, and the
 * marks taken out of the text again: the template may trim, cut and move what messages say, and the names are
 * still known from the tokens that it writes itself. Messages without such names are written once and as they
 * are.
 *
 * @throws MerfError UNSUPPORTED where the template does not leave the marks as they are
 */
export function renderChat(
  tokenizer: PromptTokenizer,
  messages: readonly ChatMessage[],
  tools?: readonly object[] | undefined,
): RenderedChat {
  const write = (told: readonly ChatMessage[], given: readonly object[] | undefined) =>
    tokenizer.applyChatTemplate(told, {
      addGenerationPrompt: true,
      ...(given && { variables: { tools: given } }),
    });
  const named = new Set<string>();
  const note = (text: string) => {
    for (const name of namesIn(tokenizer, text)) named.add(name);
    return text;
  };
  if (tokenizer.specialSpans) {
    try {
      mapTexts([messages, tools], note);
    } catch (cause) {
      throw new MerfError('INVALID_ARGUMENT', 'The messages are nested too deeply to be read', { cause });
    }
  }
  if (named.size === 0 || tokenizer.splitSpecialTokens === false) {
    return { text: write(messages, tools), literal: [], named: [...named] };
  }
  const all = JSON.stringify([messages, tools]);
  const pair = marks.find(([open, close]) => !all.includes(open) && !all.includes(close));
  if (pair === undefined) {
    throw new MerfError('INVALID_ARGUMENT', 'The messages hold all the characters that Unicode sets aside');
  }
  const [open, close] = pair;
  const enclose = (text: string) => {
    let marked = '';
    let end = 0;
    for (const [start, stop] of tokenizer.specialSpans?.(text) ?? []) {
      marked += `${text.slice(end, start)}${open}${text.slice(start, stop)}${close}`;
      end = stop;
    }
    return marked + text.slice(end);
  };
  const [told, given] = mapTexts([messages, tools], enclose) as [
    readonly ChatMessage[],
    readonly object[] | undefined,
  ];
  const written = write(told, given);
  const escaped = pair.map((mark) => `\\u${mark.charCodeAt(0).toString(16)}`);
  if (escaped.some((form) => written.includes(form))) {
    throw new MerfError(
      'UNSUPPORTED',
      `The chat template writes ${[...named].join(', ')} of a message in an escaped form, so that it cannot be ` +
        'kept apart from the special token: take it out of the messages, or allow it (splitSpecialTokens: false)',
    );
  }
  return { ...unmarked(written, open, close, named), named: [...named] };
}

/** The text without the marks, and where a name stood between two of them. */
function unmarked(
  written: string,
  open: string,
  close: string,
  named: ReadonlySet<string>,
): Pick<RenderedChat, 'text' | 'literal'> {
  const literal: Span[] = [];
  let text = '';
  let opened: number | undefined;
  for (const part of written.split(new RegExp(`([${open}${close}])`))) {
    if (part === open) opened = text.length;
    else if (part === close) {
      if (opened !== undefined && named.has(text.slice(opened))) literal.push([opened, text.length]);
      opened = undefined;
    } else text += part;
  }
  return { text, literal };
}

/** The names of special tokens in a text, as they stand there. */
function namesIn(tokenizer: PromptTokenizer, text: string): string[] {
  return (tokenizer.specialSpans?.(text) ?? []).map(([start, end]) => text.slice(start, end));
}

/** A copy of `value` in which every text is what `map` makes of it; names of fields stay as they are. */
function mapTexts(value: unknown, map: (text: string) => string): unknown {
  if (typeof value === 'string') return map(value);
  if (Array.isArray(value)) return value.map((inner) => mapTexts(inner, map));
  if (typeof value !== 'object' || value === null) return value;
  return Object.fromEntries(Object.entries(value).map(([key, inner]) => [key, mapTexts(inner, map)]));
}

/**
 * The messages as a template without a place for a system message takes them: its words are the first
 * paragraph of the user's. Others are given back as they are.
 * @throws MerfError UNSUPPORTED where the tokenizer's `systemMessages` is `refuse`
 */
export function placeSystemMessage(
  tokenizer: Pick<PromptTokenizer, 'keepsSystemMessages' | 'systemMessages'>,
  messages: readonly ChatMessage[],
): readonly ChatMessage[] {
  const [system, next, ...rest] = Array.isArray(messages) ? messages : [];
  if (system?.role !== 'system' || tokenizer.keepsSystemMessages !== false) return messages;
  if (tokenizer.systemMessages === 'refuse') {
    throw new MerfError(
      'UNSUPPORTED',
      "The model's chat template has no place for a system message, which would be lost: give its words to the " +
        'user, or have them moved there (systemMessages: "move")',
    );
  }
  const words = `${system.content ?? ''}`.trimEnd();
  const following = next === undefined ? [] : [next, ...rest];
  if (words === '') return following.length > 0 ? following : messages;
  if (next?.role !== 'user') return [{ role: 'user', content: words }, ...following];
  const content = next.content ? `${words}\n\n${next.content}` : words;
  return [{ ...next, content }, ...rest];
}
