import { MerfError } from '../../lib/errors.js';
import { characterOfByte } from '../../lib/policy/tokenizer.js';

/** Words as GPT-2's byte-level BPE cuts them; `ByteLevel` with `use_regex` in tokenizer.json means this pattern. */
const wordPattern = /'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+/gu;

export interface TokenizerOptions {
  /** All tokens together: bytes, merges and those added. */
  readonly vocabularySize: number;
  /** Tokens that mark turns; decoding can leave them out. */
  readonly special: readonly string[];
  /** Texts that are one token wherever they occur. */
  readonly whole: readonly string[];
}

/**
 * Byte-level byte-pair encoding (Sennrich et al. 2016): merges the most frequent pair until the vocabulary is full,
 * ties in the order of the alphabet. Returns the contents of tokenizer.json.
 *
 * @throws MerfError INVALID_ARGUMENT where the texts have too few pairs for the vocabulary
 */
export function trainTokenizer(texts: Iterable<string>, options: TokenizerOptions): Record<string, unknown> {
  const added = [...options.special, ...options.whole];
  const words = countWords(texts, added);
  const merges = findMerges(words, options.vocabularySize - 256 - added.length);
  const pieces = [...characterOfByte].sort();
  for (const [left, right] of merges) pieces.push(left + right);
  return {
    version: '1.0',
    truncation: null,
    padding: null,
    added_tokens: added.map((content, i) => ({
      id: pieces.length + i,
      content,
      single_word: false,
      lstrip: false,
      rstrip: false,
      normalized: false,
      special: options.special.includes(content),
    })),
    normalizer: null,
    pre_tokenizer: { type: 'ByteLevel', add_prefix_space: false, trim_offsets: true, use_regex: true },
    post_processor: null,
    decoder: { type: 'ByteLevel', add_prefix_space: true, trim_offsets: true, use_regex: true },
    model: {
      type: 'BPE',
      dropout: null,
      unk_token: null,
      continuing_subword_prefix: null,
      end_of_word_suffix: null,
      fuse_unk: false,
      byte_fallback: false,
      ignore_merges: false,
      vocab: Object.fromEntries(pieces.map((piece, id) => [piece, id])),
      merges,
    },
  };
}

function countWords(texts: Iterable<string>, added: readonly string[]): Map<string, number> {
  const escaped = added.map((token) => token.replace(/[\\^$.*+?()[\]{}|/-]/g, '\\$&'));
  const addedPattern = new RegExp(escaped.join('|'), 'g');
  const utf8 = new TextEncoder();
  const counts = new Map<string, number>();
  for (const text of texts) {
    for (const part of text.split(addedPattern)) {
      for (const [word] of part.matchAll(wordPattern)) counts.set(word, (counts.get(word) ?? 0) + 1);
    }
  }
  const spell = (word: string) => [...utf8.encode(word)].map((byte) => characterOfByte[byte]).join('');
  return new Map([...counts].map(([word, count]) => [spell(word), count]));
}

function findMerges(words: ReadonlyMap<string, number>, wanted: number): [string, string][] {
  let spelled = [...words].map(([word, count]) => ({ pieces: [...word], count }));
  const merges: [string, string][] = [];
  while (merges.length < wanted) {
    const pairs = new Map<string, number>();
    for (const { pieces, count } of spelled) {
      for (let i = 1; i < pieces.length; i++) {
        const pair = `${pieces[i - 1]} ${pieces[i]}`;
        pairs.set(pair, (pairs.get(pair) ?? 0) + count);
      }
    }
    let best: string | undefined;
    for (const [pair, count] of pairs) {
      const most = best === undefined ? 0 : (pairs.get(best) as number);
      if (count > most || (count === most && best !== undefined && pair < best)) best = pair;
    }
    if (best === undefined) {
      throw new MerfError(
        'INVALID_ARGUMENT',
        `Expected texts for ${wanted} merges but they gave ${merges.length}`,
      );
    }
    const [left, right] = best.split(' ') as [string, string];
    merges.push([left, right]);
    spelled = spelled
      .map(({ pieces, count }) => ({ pieces: merge(pieces, left, right), count }))
      .filter(({ pieces }) => pieces.length > 1);
  }
  return merges;
}

function merge(pieces: readonly string[], left: string, right: string): string[] {
  const merged: string[] = [];
  for (let i = 0; i < pieces.length; i++) {
    if (pieces[i] === left && pieces[i + 1] === right) {
      merged.push(left + right);
      i++;
    } else merged.push(pieces[i] as string);
  }
  return merged;
}
