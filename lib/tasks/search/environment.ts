import type { Environment, ModelTurn, Reply } from '../environment.js';
import type { Retriever } from './passage-index.js';
import { type Passage, shorten } from './passages.js';

export interface SearchEnvironmentOptions {
  readonly retriever: Retriever;
  /** Passages a search shows at most. */
  readonly topK: number;
  /** Characters of a passage's text that are shown at most. */
  readonly passageCharacters: number;
  /** Turns of the model at most, the one with the answer included. */
  readonly maxTurns: number;
  /** Seconds that one search may take. */
  readonly timeoutSeconds?: number;
}

/** What the model's turn asks for. */
export type Action =
  | { readonly kind: 'search'; readonly query: string; readonly searches: number }
  /** A closing tag without an opening one, an empty query, or one that is too long. */
  | { readonly kind: 'refused'; readonly reason: string }
  | { readonly kind: 'answer' }
  /** Neither a search nor an answer. */
  | { readonly kind: 'none' };

/** Longer queries are refused, in characters. */
export const maxQuery = 300;

const search = /<search>((?:(?!<search>)[\s\S])*?)<\/search>/g;

/** Reads a turn: an answer ends the episode, else the last search counts. */
export function readAction(text: string): Action {
  const answer = text.indexOf('<answer>');
  if (answer >= 0 && text.indexOf('</answer>', answer) >= 0) return { kind: 'answer' };
  // A turn can go on behind the tag that ended it, with what its last token holds.
  const answerEnd = text.lastIndexOf('</answer>');
  const searchEnd = text.lastIndexOf('</search>');
  if (answerEnd < 0 && searchEnd < 0) return { kind: 'none' };
  if (answerEnd > searchEnd) return { kind: 'refused', reason: unopened('answer') };
  const searches = [...text.matchAll(search)];
  const query = searches.at(-1)?.[1]?.replace(/\s+/g, ' ').trim();
  if (query === undefined) return { kind: 'refused', reason: unopened('search') };
  if (query === '') return { kind: 'refused', reason: 'The query is empty.' };
  if (query.length > maxQuery) {
    return { kind: 'refused', reason: `The query has more than ${maxQuery} characters.` };
  }
  return { kind: 'search', query, searches: searches.length };
}

function unopened(name: string): string {
  const what = name === 'search' ? 'query' : 'answer';
  return `There is no ${what}: the ${name} tag is closed, but was not opened.`;
}

/**
 * What is appended to a turn: white space, and the text between the tags that no model is to write itself.
 */
export function information(text: string): string {
  return `\n<information>\n${text}\n</information>\n`;
}

/** Passages one below the other, as in `Doc 1 (Title: "Oslo") Oslo is the capital of Norway.` */
export function formatPassages(passages: readonly Passage[], passageCharacters: number): string {
  return passages
    .map(({ title, text }, i) => {
      const shown = shorten(harmless(title), 100);
      const heading = shown === '' ? '' : ` (Title: "${shown}")`;
      return `Doc ${i + 1}${heading} ${shorten(harmless(text), passageCharacters)}`;
    })
    .join('\n');
}

/**
 * Text of a passage on one line, without the tags that have a meaning here. Other tags lose their form too,
 * since `</s>`, `<|im_end|>` and the like are tokens that end a turn.
 */
function harmless(text: string): string {
  return text
    .replace(/<\/?(?:think|search|information|answer)>/g, ' ')
    .replace(/<(?=[|/\p{L}_])/gu, '< ')
    .replace(/\s+/g, ' ')
    .trim();
}

const nothingFound = 'Nothing was found for this query. Try other words.';
const lastSearch = 'This was the last search. Give the answer in the next turn.';
const severalSearches = 'Write one search at a time. Only the last one is answered here.';
const failed = 'The search failed. Try again, or answer with what you know.';
const neither =
  'That was neither a search nor an answer. Write a query between <search> and </search>, or the final ' +
  'answer between <answer> and </answer>.';

/**
 * Answers the searches that the model writes in its turn, with what Search-R1 (arXiv 2503.09516) puts there:
 * the passages between `<information>` and `</information>`, inside the same turn of the assistant. What
 * cannot be searched for is answered by a sentence that says why. A turn that the model itself ended with
 * neither a search nor an answer is answered by the user; one that was cut for its length ends the episode.
 */
export function searchEnvironment(options: SearchEnvironmentOptions): Environment {
  const { retriever, topK, passageCharacters, maxTurns } = options;
  return {
    stop: ['</search>', '</answer>'],
    maxTurns,
    ...(options.timeoutSeconds === undefined ? {} : { timeoutSeconds: options.timeoutSeconds }),
    async reply(turn: ModelTurn, _row, _state, { signal, turnsLeft }): Promise<Reply | undefined> {
      const action = readAction(turn.text);
      if (action.kind === 'answer') return undefined;
      if (action.kind === 'none') {
        return turn.finishReason === 'stop' ? [{ role: 'user', content: neither }] : undefined;
      }
      const lines: string[] = [];
      if (action.kind === 'refused') lines.push(action.reason);
      else {
        if (action.searches > 1) lines.push(severalSearches);
        const passages = await retriever.search(action.query, topK, signal);
        lines.push(passages.length === 0 ? nothingFound : formatPassages(passages, passageCharacters));
      }
      if (turnsLeft === 1) lines.push(lastSearch);
      return information(lines.join('\n'));
    },
    failed: () => information(failed),
  };
}
