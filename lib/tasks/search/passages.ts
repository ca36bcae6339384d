import { readdir, readFile, stat } from 'node:fs/promises';
import { basename, extname, join, relative } from 'node:path';
import { describeValue, MerfError } from '../../errors.js';
import { type Fields, loadRows } from '../dataset.js';

/** What a search returns. */
export interface Passage {
  /** Unique in its corpus. */
  readonly id: string;
  /** May be empty. */
  readonly title: string;
  readonly text: string;
}

/**
 * The passages of a corpus: a folder of .txt and .md files, folders within it included, whose texts are
 * divided into passages of at most `passageCharacters` at paragraphs, sentences or words; or a .jsonl or
 * .parquet file with one passage a row, which stays whole.
 *
 * @throws MerfError FILE_NOT_FOUND, UNSUPPORTED for another kind of file, MALFORMED_FILE that names the line
 *   at fault, EMPTY_DATASET
 */
export async function readCorpus(path: string, passageCharacters: number): Promise<Passage[]> {
  let isFolder: boolean;
  try {
    isFolder = (await stat(path)).isDirectory();
  } catch (cause) {
    const reason =
      (cause as NodeJS.ErrnoException).code === 'ENOENT' ? 'there is no such file or folder' : String(cause);
    throw new MerfError('FILE_NOT_FOUND', `Cannot read the corpus ${path}: ${reason}`, { cause });
  }
  return isFolder ? readFolder(path, passageCharacters) : readTable(path);
}

async function readTable(file: string): Promise<Passage[]> {
  const passages = await loadRows(file, parsePassage);
  const seen = new Set<string>();
  return passages.map((passage, i) => {
    const id = passage.id === '' ? `${i + 1}` : passage.id;
    if (seen.has(id)) {
      throw new MerfError(
        'MALFORMED_FILE',
        `Expected different ids in the corpus ${file} but found ${id} twice`,
      );
    }
    seen.add(id);
    return { ...passage, id };
  });
}

/**
 * A passage from the columns `text` and `title`, or `contents`, whose first line is the title where there is
 * no column of that name, as in the Wikipedia corpus of Search-R1. A column `id` is optional.
 *
 * @throws Error that names the column at fault
 */
export function parsePassage(fields: Fields): Passage {
  const { id = '', title } = fields;
  if (typeof id !== 'string' && typeof id !== 'number') {
    throw new Error(`Expected text or a number in column id but found ${describeValue(id)}`);
  }
  if (title !== undefined && title !== null && typeof title !== 'string') {
    throw new Error(`Expected text in column title but found ${describeValue(title)}`);
  }
  const text = fields.text ?? fields.contents;
  if (typeof text !== 'string') {
    throw new Error(`Expected text in column text or contents but found ${describeValue(text)}`);
  }
  const passage =
    typeof title === 'string'
      ? { title, text }
      : fields.text === undefined
        ? splitTitle(text)
        : { title: '', text };
  if (passage.text.trim() === '')
    throw new Error('Expected a text that is not empty in column text or contents');
  return { id: String(id), title: passage.title.trim(), text: passage.text.trim() };
}

/** The first line is the title, quotes around it dropped, where there is a second one. */
export function splitTitle(contents: string): { title: string; text: string } {
  const end = contents.indexOf('\n');
  if (end < 0) return { title: '', text: contents };
  return { title: contents.slice(0, end).replace(/^\s*"|"\s*$/g, ''), text: contents.slice(end + 1) };
}

const kinds = ['.txt', '.md'];

async function readFolder(folder: string, passageCharacters: number): Promise<Passage[]> {
  const entries = await readdir(folder, { recursive: true, withFileTypes: true });
  const files = entries
    .filter((entry) => entry.isFile() && kinds.includes(extname(entry.name).toLowerCase()))
    .map((entry) => join(entry.parentPath ?? entry.path, entry.name))
    .sort();
  const passages: Passage[] = [];
  for (const file of files) {
    const text = (await readFile(file, 'utf8')).replace(/^\uFEFF/, '');
    const name = relative(folder, file);
    const heading =
      extname(file).toLowerCase() === '.md' ? /^#{1,6}[ \t]+(.+?)[ \t#]*$/m.exec(text)?.[1] : undefined;
    const title = heading ?? basename(file, extname(file));
    divide(text, passageCharacters).forEach((part, i) => {
      passages.push({ id: `${name}#${i + 1}`, title, text: part });
    });
  }
  if (passages.length === 0) {
    throw new MerfError(
      'EMPTY_DATASET',
      `Expected .txt or .md files with text in the corpus ${folder} but found none`,
    );
  }
  return passages;
}

/**
 * Divides a text into passages of at most `limit` characters. Whole paragraphs stay together as long as they
 * fit; a longer one is divided behind sentences, or between words, or where neither is possible at the limit.
 */
export function divide(text: string, limit: number): string[] {
  const passages: string[] = [];
  let current = '';
  const flush = () => {
    if (current !== '') passages.push(current);
    current = '';
  };
  for (const paragraph of text.split(/\n\s*\n/)) {
    let rest = paragraph.replace(/\s+/g, ' ').trim();
    if (rest === '') continue;
    if (current !== '' && current.length + 1 + rest.length > limit) flush();
    while (rest.length > limit) {
      const end = breakBefore(rest, limit);
      passages.push(rest.slice(0, end).trim());
      rest = rest.slice(end).trim();
    }
    if (rest !== '') current = current === '' ? rest : `${current} ${rest}`;
  }
  flush();
  return passages;
}

/**
 * The text where it fits, or else its beginning up to a word's end, with an ellipsis; `limit` characters at
 * most.
 */
export function shorten(text: string, limit: number): string {
  if (text.length <= limit) return text;
  return `${text.slice(0, breakBefore(text, limit - 1)).trim()}\u2026`;
}

/**
 * Where to end a part of at most `limit` characters: behind a sentence in its second half, or else behind a
 * word.
 */
function breakBefore(text: string, limit: number): number {
  const part = text.slice(0, limit + 1);
  const half = limit / 2;
  const sentence = Math.max(...['. ', '! ', '? '].map((mark) => part.lastIndexOf(mark) + 1));
  if (sentence > half) return sentence;
  const word = part.lastIndexOf(' ');
  if (word > half) return word;
  // A surrogate pair stays together.
  const code = text.charCodeAt(limit - 1);
  return limit > 1 && code >= 0xd800 && code < 0xdc00 ? limit - 1 : limit;
}
