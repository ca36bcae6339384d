import { malformed } from './files.js';

/** A token that is found in a text before anything else, as tokenizer.json describes it. */
export interface AddedToken {
  readonly id: number;
  readonly content: string;
  /** Whether it means something to the model beyond its text, such as the end of a turn. */
  readonly special: boolean;
  /** Found only where no letter or digit stands beside it. */
  readonly singleWord: boolean;
  /** Takes the white space before it, or after it, with it. */
  readonly lstrip: boolean;
  readonly rstrip: boolean;
  /** Found in the text as the normalizer leaves it. */
  readonly normalized: boolean;
}

/** A stretch of a text from its character `0` up to `1`. */
export type Span = readonly [start: number, end: number];

const maxTokens = 1 << 24;

export function isTokenId(id: unknown): id is number {
  return Number.isInteger(id) && (id as number) >= 0 && (id as number) < maxTokens;
}

export const maxTokenId = maxTokens - 1;

const named = ['bos', 'eos', 'unk', 'sep', 'pad', 'cls', 'mask'].map((name) => `${name}_token`);

/**
 * The added tokens of a tokenizer as `transformers` gathers them: those of tokenizer.json, then those that
 * `added_tokens_decoder` of tokenizer_config.json adds or describes anew, then those that it names as special
 * ones.
 *
 * @param vocabulary ids of the model's own tokens
 * @throws MerfError MALFORMED_FILE
 */
export function gatherAddedTokens(
  tokenizer: Readonly<Record<string, unknown>>,
  config: Readonly<Record<string, unknown>>,
  vocabulary: ReadonlyMap<string, number>,
  path: string,
): AddedToken[] {
  const added = tokenizer.added_tokens ?? [];
  if (!Array.isArray(added)) throw malformed(path, 'expected an array for added_tokens');
  const tokens = new Map<string, AddedToken>();
  const texts = new Map<number, string>();
  const add = (token: AddedToken) => {
    const other = texts.get(token.id);
    if (other !== undefined && other !== token.content) {
      const both = `${JSON.stringify(other.slice(0, 80))} and ${JSON.stringify(token.content.slice(0, 80))}`;
      throw malformed(path, `the added tokens ${both} have the id ${token.id} in common`);
    }
    texts.set(token.id, token.content);
    tokens.set(token.content, token);
  };
  for (const token of added as unknown[]) {
    const { id, content } = (token ?? {}) as { id?: unknown; content?: unknown };
    if (!isTokenId(id) || typeof content !== 'string') {
      throw malformed(path, 'expected an id and a content in added_tokens');
    }
    add({ id, content, ...flagsOf(token as object) });
  }
  const decoder = config.added_tokens_decoder ?? {};
  if (typeof decoder !== 'object' || Array.isArray(decoder)) {
    throw malformed(path, 'expected an object of ids and tokens for added_tokens_decoder');
  }
  for (const [key, token] of Object.entries(decoder as object)) {
    const { content } = (token ?? {}) as { content?: unknown };
    const id = /^\d+$/.test(key) ? Number(key) : undefined;
    if (!isTokenId(id) || typeof content !== 'string') {
      throw malformed(path, 'expected ids and tokens with a content in added_tokens_decoder');
    }
    const known = tokens.get(content)?.id ?? vocabulary.get(content);
    add({ id: known ?? id, content, ...flagsOf(token as object) });
  }
  const extra = [config.additional_special_tokens, config.extra_special_tokens].flatMap((list) =>
    typeof list === 'object' && list !== null ? Object.values(list) : [],
  );
  for (const value of [...named.map((key) => config[key]), ...extra]) {
    const content = tokenText(value);
    if (content === undefined) continue;
    const token = tokens.get(content);
    const id = vocabulary.get(content);
    if (token) add({ ...token, special: true });
    else if (id !== undefined && looksLikeName(content))
      add({ id, content, ...flagsOf(Object(value)), special: true, normalized: false });
  }
  return [...tokens.values()];
}

function flagsOf(token: object): Omit<AddedToken, 'id' | 'content'> {
  const flags = token as Readonly<Record<string, unknown>>;
  const special = flags.special === true;
  return {
    special,
    singleWord: flags.single_word === true,
    lstrip: flags.lstrip === true,
    rstrip: flags.rstrip === true,
    normalized: typeof flags.normalized === 'boolean' ? flags.normalized : !special,
  };
}

/** A token as tokenizer_config.json spells it: its text, or an object around it. */
export function tokenText(value: unknown): string | undefined {
  if (typeof value === 'string') return value;
  const content = (value as { content?: unknown } | null | undefined)?.content;
  return typeof content === 'string' ? content : undefined;
}

/** Whether a text is written as only marks of turns are, such as `<|im_start|>`. */
export function looksLikeMark(text: string): boolean {
  return /^<[|｜][^\s<>]{1,64}[|｜]>$/.test(text);
}

/**
 * Whether a text can be the name of a token. A file may end texts with an ordinary one, such as a new line,
 * or pad them with an exclamation mark.
 */
export function looksLikeName(text: string): boolean {
  return /^<[^\s<>]{1,64}>$|^\[[^\s[\]]{1,64}\]$/.test(text);
}

/** A stretch of a text that is a token, or (undefined) that is none. */
export interface Section {
  readonly text: string;
  /** Where the section begins in the text that was divided. */
  readonly start: number;
  readonly token: AddedToken | undefined;
}

interface Node {
  readonly next: Map<number, Node>;
  token?: AddedToken;
}

/**
 * Finds tokens in texts as the Rust library `tokenizers` does: the leftmost and there the longest one, where
 * it may stand. (@huggingface/tokenizers takes no heed of `single_word`, and lets the vocabulary's piece of
 * the same spelling have the token's id.)
 */
export class TokenFinder {
  readonly #root: Node = { next: new Map() };

  /** @param tokens each with the text that it is found by */
  constructor(tokens: Iterable<readonly [string, AddedToken]>) {
    for (const [text, token] of tokens) {
      if (text === '') continue;
      let node = this.#root;
      for (let i = 0; i < text.length; ++i) {
        const unit = text.charCodeAt(i);
        const next = node.next.get(unit) ?? { next: new Map() };
        node.next.set(unit, next);
        node = next;
      }
      node.token = token;
    }
  }

  /**
   * The text in sections. @param allowed whether a token may be found where it stands, which it is skipped
   * otherwise
   */
  divide(text: string, allowed: (token: AddedToken, start: number, end: number) => boolean): Section[] {
    const sections: Section[] = [];
    let done = 0;
    for (const found of this.#matches(text)) {
      const { token } = found;
      let { start, end } = found;
      if (start < done || !allowed(token, start, end)) continue;
      if (token.singleWord && (wordBefore(text, start) || wordAfter(text, end))) continue;
      if (token.lstrip) while (start > done && isSpace(text[start - 1])) --start;
      if (token.rstrip) while (end < text.length && isSpace(text[end])) ++end;
      if (start > done) sections.push({ text: text.slice(done, start), start: done, token: undefined });
      sections.push({ text: text.slice(start, end), start, token });
      done = end;
    }
    if (done < text.length) sections.push({ text: text.slice(done), start: done, token: undefined });
    return sections;
  }

  /** Where tokens stand, one behind the other. */
  *#matches(text: string): Generator<{ token: AddedToken; start: number; end: number }> {
    if (this.#root.next.size === 0) return;
    for (let start = 0; start < text.length; ) {
      let node = this.#root.next.get(text.charCodeAt(start));
      let longest: { token: AddedToken; end: number } | undefined;
      for (let end = start + 1; node !== undefined; ++end) {
        if (node.token) longest = { token: node.token, end };
        node = end < text.length ? node.next.get(text.charCodeAt(end)) : undefined;
      }
      if (longest) yield { ...longest, start };
      start = longest?.end ?? start + 1;
    }
  }

  /**
   * Every place where a token stands, those that others overlap included, as spans that do not touch each
   * other.
   */
  spans(text: string): Span[] {
    const spans: [number, number][] = [];
    if (this.#root.next.size === 0) return spans;
    for (let start = 0; start < text.length; ++start) {
      let node = this.#root.next.get(text.charCodeAt(start));
      let longest = 0;
      for (let end = start + 1; node !== undefined; ++end) {
        if (node.token) longest = end;
        node = end < text.length ? node.next.get(text.charCodeAt(end)) : undefined;
      }
      if (longest === 0) continue;
      const last = spans.at(-1);
      if (last && start < last[1]) last[1] = Math.max(last[1], longest);
      else spans.push([start, longest]);
    }
    return spans;
  }
}

const word = /[\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\p{Join_Control}]/u;

function wordBefore(text: string, end: number): boolean {
  const low = text.charCodeAt(end - 1);
  const start = low >= 0xdc00 && low <= 0xdfff ? end - 2 : end - 1;
  return end > 0 && word.test(text.slice(Math.max(0, start), end));
}

function wordAfter(text: string, start: number): boolean {
  const code = text.codePointAt(start);
  return code !== undefined && word.test(String.fromCodePoint(code));
}

function isSpace(character: string | undefined): boolean {
  return character !== undefined && /\p{White_Space}/u.test(character);
}
