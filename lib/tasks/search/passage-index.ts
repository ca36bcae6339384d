import MiniSearch from 'minisearch';
import type { Passage } from './passages.js';

/** Answers queries with passages, the best first. */
export interface Retriever {
  /**
   * @param query words to look for, neither empty nor blank
   * @param count how many passages at most
   */
  search(query: string, count: number, signal?: AbortSignal): Promise<readonly Passage[]>;
}

/** Term frequency saturation, length normalisation, and the floor that BM25+ adds for a term that occurs at all. */
const bm25 = { k: 1.2, b: 0.7, d: 0.5 };

/**
 * An index in memory that ranks by BM25+ (Lv and Zhai, CIKM 2011): the sum over the query's words of
 *
 *     idf * (d + f * (k + 1) / (f + k * (1 - b + b * length / mean length)))
 *     idf = ln(1 + (N - n + 0.5) / (n + 0.5))
 *
 * with f the word's occurrences in title and text together, length the number of different words in them, n the passages
 * that have the word, and N all passages. MiniSearch,
 * which computes it, multiplies the sum by how many of the query's words occur; that would let passages full of "the"
 * and "of" overtake the one that has the name asked for, so it is divided out again.
 */
export class PassageIndex implements Retriever {
  readonly #passages: readonly Passage[];
  readonly #index: MiniSearch<{ id: number; contents: string }>;

  constructor(passages: readonly Passage[]) {
    this.#passages = passages;
    this.#index = new MiniSearch({
      fields: ['contents'],
      tokenize: wordsOf,
      processTerm: (term) => term,
      searchOptions: { combineWith: 'OR', bm25 },
    });
    this.#index.addAll(passages.map(({ title, text }, id) => ({ id, contents: `${title}\n${text}` })));
  }

  get size(): number {
    return this.#passages.length;
  }

  /** Passages with their scores, the best first; those of equal score in the order of the corpus. */
  rank(query: string, count: number): { readonly passage: Passage; readonly score: number }[] {
    return this.#index
      .search(query)
      .map(({ id, score, queryTerms }) => ({ id: id as number, score: score / queryTerms.length }))
      .sort((a, b) => b.score - a.score || a.id - b.id)
      .slice(0, count)
      .map(({ id, score }) => ({ passage: this.#passages[id] as Passage, score }));
  }

  async search(query: string, count: number): Promise<Passage[]> {
    return this.rank(query, count).map(({ passage }) => passage);
  }
}

/** The words of a text, in lower case and without accents; everything but letters and digits divides them. */
export function wordsOf(text: string): string[] {
  return (
    text
      .normalize('NFKD')
      .replace(/\p{M}+/gu, '')
      .toLowerCase()
      .match(/[\p{L}\p{N}]+/gu) ?? []
  );
}
