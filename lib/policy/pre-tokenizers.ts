import type { MerfError } from '../errors.js';
import { malformed, unsupported } from './files.js';
import { compilePattern } from './text-limits.js';

/**
 * Normalizers and pre-tokenizers of tokenizer.json, after the Rust library `tokenizers`. They are here
 * because those of the JavaScript library of that name differ from it:
 * - `Digits` splits at ASCII digits alone, where the original means all of Unicode's numbers;
 * - `Split` knows neither `Contiguous` nor the two `Merged` behaviors, and drops the text between the matches
 *   of an inverted pattern;
 * - `Punctuation` puts marks that follow each other into one piece, `Whitespace` knows ASCII words alone;
 * - `Metaspace` does not split at its replacement, and `Prepend` writes into an empty text;
 * - `StripAccents` takes all marks off, where the original takes those without a width;
 * - `Lowercase` changes a final sigma, and `Replace` gives `$` in its content a meaning;
 * - white space is JavaScript's, not Unicode's;
 * - `Precompiled` and `BertNormalizer` only come near the original, so they are refused by name.
 */

/**
 * Where a text stands: at the start of all, after a token that is found in it, or after tokens that it goes
 * on from.
 */
export type Place = 'start' | 'section' | 'continued';

/** Cuts pieces into those that merging works on alone. */
type PreTokenizer = (pieces: readonly string[], place: Place) => string[];
type Normalizer = (text: string, place: Place) => string;

export interface TextSteps {
  readonly normalize: Normalizer;
  readonly preTokenize: (text: string, place: Place) => string[];
  /** Whether the steps have a pattern whose time is not known to be short. */
  readonly watched: boolean;
}

type Config = Readonly<Record<string, unknown>>;

/** Kinds that the original library has and merf does not. */
const notImplemented: ReadonlySet<unknown> = new Set([
  'BertNormalizer',
  'Nmt',
  'Precompiled',
  'UnicodeScripts',
  'FixedLength',
  'RandomChunkSplit',
]);

const maxSteps = 64;
const maxContentLength = 1024;
/** A normalizer may make a text longer, as decompositions do, but not without bound. */
const maxGrowth = 32;

/** @throws MerfError UNSUPPORTED, MALFORMED_FILE */
export function textSteps(normalizer: unknown, preTokenizer: unknown, path: string): TextSteps {
  const builder = new Builder(path);
  const normalizers = builder.flat(normalizer, 'normalizers').map((config) => builder.normalizer(config));
  const preTokenizers = builder
    .flat(preTokenizer, 'pretokenizers')
    .map((config) => builder.preTokenizer(config));
  return {
    normalize(text, place) {
      const most = 4096 + maxGrowth * text.length;
      return normalizers.reduce((result, step) => {
        const next = step(result, place);
        if (next.length <= most) return next;
        throw malformed(path, `its normalizer makes ${text.length} characters into more than ${most}`);
      }, text);
    },
    preTokenize: (text, place) =>
      preTokenizers
        .reduce<readonly string[]>((pieces, step) => step(pieces, place), [text])
        .filter((piece) => piece !== ''),
    watched: builder.watched,
  };
}

class Builder {
  watched = false;
  #steps = 0;
  #byteLevels = 0;

  constructor(private readonly path: string) {}

  /** The steps of a sequence, whose sequences are taken apart. */
  flat(config: unknown, key: string, depth = 0): Config[] {
    if (config === null || config === undefined) return [];
    if (typeof config !== 'object' || Array.isArray(config) || depth > maxSteps) {
      throw malformed(this.path, `expected an object of a type in ${key}`);
    }
    const { type } = config as Config;
    if (type === 'Sequence') {
      const parts = (config as Config)[key];
      if (!Array.isArray(parts)) throw malformed(this.path, `expected an array for ${key} of a Sequence`);
      return parts.flatMap((part) => this.flat(part, key, depth + 1));
    }
    if (++this.#steps > maxSteps) throw malformed(this.path, `expected at most ${maxSteps} ${key}`);
    return [config as Config];
  }

  normalizer(config: Config): Normalizer {
    switch (config.type) {
      case 'NFC':
      case 'NFD':
      case 'NFKC':
      case 'NFKD': {
        const form = config.type;
        return (text) => text.normalize(form);
      }
      case 'Lowercase':
        return (text) => Array.from(text, (character) => character.toLowerCase()).join('');
      case 'StripAccents':
        return (text) => text.replace(/\p{Mn}/gu, '');
      case 'Strip': {
        const left = config.strip_left !== false;
        const right = config.strip_right !== false;
        return (text) => {
          const stripped = left ? text.replace(/^\p{White_Space}+/u, '') : text;
          return right ? trimEnd(stripped) : stripped;
        };
      }
      case 'Prepend': {
        const prefix = this.#text(config.prepend, 'prepend');
        return (text, place) => (place !== 'continued' && text !== '' ? prefix + text : text);
      }
      case 'Replace': {
        const content = this.#text(config.content, 'content');
        const { literal, expression } = this.#pattern(config.pattern);
        return literal === undefined
          ? (text) => text.replace(expression, () => content)
          : (text) => text.replaceAll(literal, () => content);
      }
      default:
        throw this.#unknown('normalizer', config.type);
    }
  }

  preTokenizer(config: Config): PreTokenizer {
    switch (config.type) {
      case 'ByteLevel':
        return this.#byteLevel(config);
      case 'Digits':
        return splitting(matchesOf(/\p{N}/gu), config.individual_digits === true ? 'isolated' : 'contiguous');
      case 'Split': {
        const { literal, expression } = this.#pattern(config.pattern);
        const matches = literal === undefined ? matchesOf(expression) : literalMatches(literal);
        const find = config.invert === true ? inverted(matches) : matches;
        return splitting(find, this.#behavior(config.behavior, undefined));
      }
      case 'Punctuation':
        return splitting(matchesOf(punctuation), this.#behavior(config.behavior, 'isolated'));
      case 'Whitespace':
        return splitting(inverted(matchesOf(wordsOrMarks)), 'removed');
      case 'WhitespaceSplit':
        return splitting(matchesOf(whiteSpace), 'removed');
      case 'BertPreTokenizer': {
        const words = splitting(matchesOf(whiteSpace), 'removed');
        const marks = splitting(matchesOf(punctuation), 'isolated');
        return (pieces, place) => marks(words(pieces, place), place);
      }
      case 'CharDelimiterSplit':
        return splitting(literalMatches(this.#text(config.delimiter, 'delimiter')), 'removed');
      case 'Metaspace':
        return this.#metaspace(config);
      default:
        throw this.#unknown('pre-tokenizer', config.type);
    }
  }

  #unknown(what: string, type: unknown): MerfError {
    const detail = `${what} ${String(type).slice(0, 80)} is not supported`;
    return notImplemented.has(type) ? unsupported(this.path, detail) : malformed(this.path, detail);
  }

  #byteLevel(config: Config): PreTokenizer {
    if (++this.#byteLevels > 1) throw malformed(this.path, 'expected one ByteLevel pre-tokenizer at most');
    const prefixed = config.add_prefix_space === true;
    const split = config.use_regex === false ? undefined : splitting(matchesOf(gpt2Words), 'isolated');
    return (pieces, place) => {
      const spaced = prefixed
        ? pieces.map((piece, i) =>
            (i > 0 || place !== 'continued') && !piece.startsWith(' ') ? ` ${piece}` : piece,
          )
        : pieces;
      return (split ? split(spaced, place) : spaced).map(byteLevelText);
    };
  }

  #metaspace(config: Config): PreTokenizer {
    const replacement = this.#text(config.replacement ?? '▁', 'replacement');
    const scheme = config.prepend_scheme ?? (config.add_prefix_space === false ? 'never' : 'always');
    if (scheme !== 'always' && scheme !== 'first' && scheme !== 'never') {
      throw malformed(this.path, 'expected always, first or never for prepend_scheme');
    }
    const split =
      config.split === false ? undefined : splitting(literalMatches(replacement), 'mergedWithNext');
    return (pieces, place) => {
      const prepended = pieces.map((piece, i) => {
        const text = piece.replaceAll(' ', () => replacement);
        const wants =
          scheme === 'always'
            ? i > 0 || place !== 'continued'
            : scheme === 'first' && i === 0 && place === 'start';
        return wants && !text.startsWith(replacement) ? replacement + text : text;
      });
      return split ? split(prepended, place) : prepended;
    };
  }

  #text(value: unknown, key: string): string {
    if (typeof value === 'string' && value.length <= maxContentLength) return value;
    throw malformed(this.path, `expected a text of at most ${maxContentLength} characters for ${key}`);
  }

  /** A pattern: a text that is meant literally, or a regular expression. */
  #pattern(value: unknown): { literal?: string; expression: RegExp } {
    const pattern = (value ?? {}) as Config;
    if (typeof pattern.String === 'string') {
      return { literal: this.#text(pattern.String, 'pattern'), expression: never };
    }
    if (typeof pattern.Regex !== 'string') {
      throw malformed(this.path, 'expected a String or a Regex for pattern');
    }
    const { expression, watched } = compilePattern(pattern.Regex, this.path);
    this.watched ||= watched;
    return { expression };
  }

  #behavior(value: unknown, fallback: Behavior | undefined): Behavior {
    const name = value === undefined ? fallback : behaviors.get(String(value));
    if (name === undefined) throw malformed(this.path, 'expected a behavior that is known for a split');
    return name;
  }
}

type Behavior = 'removed' | 'isolated' | 'mergedWithPrevious' | 'mergedWithNext' | 'contiguous';

const behaviors: ReadonlyMap<string, Behavior> = new Map([
  ['Removed', 'removed'],
  ['Isolated', 'isolated'],
  ['MergedWithPrevious', 'mergedWithPrevious'],
  ['MergedWithNext', 'mergedWithNext'],
  ['Contiguous', 'contiguous'],
]);

/** A stretch of a text, which the pattern matched or did not. */
interface Stretch {
  text: string;
  matched: boolean;
}

/** The stretches of a text that is not empty, in order and without gaps. */
type Find = (text: string) => Stretch[];

const never = /(?!)/gu;
const whiteSpace = /\p{White_Space}/gu;
const punctuation = /[\p{P}!-/:-@[-`{-~]/gu;
const wordCharacters = '\\p{Alphabetic}\\p{M}\\p{Nd}\\p{Pc}\\p{Join_Control}';
const wordsOrMarks = new RegExp(`[${wordCharacters}]+|[^${wordCharacters}\\p{White_Space}]+`, 'gu');
const gpt2Words = new RegExp(
  "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\p{White_Space}\\p{L}\\p{N}]+|" +
    '\\p{White_Space}+(?!\\P{White_Space})|\\p{White_Space}+',
  'gu',
);

function matchesOf(expression: RegExp): Find {
  return (text) => stretches(text, text.matchAll(expression));
}

function* occurrences(text: string, literal: string) {
  if (literal === '') return;
  for (let at = text.indexOf(literal); at >= 0; at = text.indexOf(literal, at + literal.length)) {
    yield { index: at, 0: literal };
  }
}

function literalMatches(literal: string): Find {
  return (text) => stretches(text, occurrences(text, literal));
}

function stretches(text: string, matches: Iterable<{ index?: number; 0: string }>): Stretch[] {
  const found: Stretch[] = [];
  let end = 0;
  for (const { index = 0, 0: match } of matches) {
    if (match === '') continue;
    if (index > end) found.push({ text: text.slice(end, index), matched: false });
    found.push({ text: match, matched: true });
    end = index + match.length;
  }
  if (end < text.length) found.push({ text: text.slice(end), matched: false });
  return found;
}

function inverted(find: Find): Find {
  return (text) => find(text).map((stretch) => ({ text: stretch.text, matched: !stretch.matched }));
}

function splitting(find: Find, behavior: Behavior): PreTokenizer {
  return (pieces) => pieces.flatMap((piece) => (piece === '' ? [] : divided(find(piece), behavior)));
}

function divided(found: readonly Stretch[], behavior: Behavior): string[] {
  if (behavior === 'isolated') return found.map(({ text }) => text);
  if (behavior === 'removed') return found.flatMap(({ text, matched }) => (matched ? [] : [text]));
  const pieces: string[] = [];
  const join = (left: string, right: string) => (behavior === 'mergedWithNext' ? right + left : left + right);
  let previous = behavior === 'contiguous' ? undefined : false;
  for (const { text, matched } of behavior === 'mergedWithNext' ? [...found].reverse() : found) {
    const joined = behavior === 'contiguous' ? matched === previous : matched && !previous;
    if (joined && pieces.length > 0) pieces.push(join(pieces.pop() as string, text));
    else pieces.push(text);
    previous = matched;
  }
  return behavior === 'mergedWithNext' ? pieces.reverse() : pieces;
}

/** `text` without the white space at its end, in time that its length bounds. */
function trimEnd(text: string): string {
  let end = text.length;
  while (end > 0 && /\p{White_Space}/u.test(text[end - 1] as string)) --end;
  return text.slice(0, end);
}

/**
 * GPT-2's alphabet, by which byte-level BPE writes the 256 bytes: printable ones as they are, others from
 * U+0100 on.
 */
export const characterOfByte: readonly string[] = (() => {
  const characters: string[] = [];
  let next = 256;
  for (let byte = 0; byte < 256; ++byte) {
    const printable = (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
    characters.push(String.fromCharCode(printable ? byte : next++));
  }
  return characters;
})();

const utf8 = new TextEncoder();

function byteLevelText(text: string): string {
  if (/^[!-~]*$/.test(text)) return text;
  let written = '';
  // A character of ASCII is its own byte; most texts hold nothing else.
  for (let i = 0; i < text.length; ++i) {
    const code = text.charCodeAt(i);
    if (code > 127) {
      for (const byte of utf8.encode(text.slice(i))) written += characterOfByte[byte];
      break;
    }
    written += characterOfByte[code];
  }
  return written;
}
