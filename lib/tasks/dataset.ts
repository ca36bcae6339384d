import { createHash } from 'node:crypto';
import { extname } from 'node:path';
import { getHeapStatistics } from 'node:v8';
import { describeValue, invalidArgument, MerfError } from '../errors.js';
import { Slices } from '../slices.js';
import { readLines } from './files/jsonl.js';
import { readParquet } from './files/parquet.js';
import { Random } from './random.js';
import type { LoadedRow, RowSource, Split } from './task.js';

/** The columns of one row as the file has them: nulls as null, integers beyond 2^53 as strings. */
export type Fields = Readonly<Record<string, unknown>>;

/**
 * Reads a `.jsonl` (one JSON object a line, in UTF-8) or `.parquet` file, piece by piece, while the event loop goes on.
 * Lines that cannot be read are kept with the reason.
 *
 * @param parse turns a row's fields into a row; what it throws becomes the row's problem
 * @throws MerfError FILE_NOT_FOUND, UNSUPPORTED for another kind of file, MALFORMED_FILE for a file that is no
 * Parquet or not in UTF-8, EMPTY_DATASET, OUT_OF_MEMORY where the rows do not fit into JavaScript's heap
 */
export function readRows<Row>(file: string, parse: (fields: Fields) => Row): Promise<LoadedRow<Row>[]> {
  return collectRows(file, parse, (row) => row);
}

/**
 * The rows of a file alone, as `readRows` reads them.
 * @throws MerfError MALFORMED_FILE that names the first line or row that cannot be read, and what `readRows` throws
 */
export function loadRows<Row>(file: string, parse: (fields: Fields) => Row): Promise<Row[]> {
  return collectRows(file, parse, requireRow);
}

async function collectRows<Row, Kept>(
  file: string,
  parse: (fields: Fields) => Row,
  keep: (row: LoadedRow<Row>) => Kept,
): Promise<Kept[]> {
  const rows: Kept[] = [];
  const slices = new Slices();
  for await (const some of readFields(file)) {
    checkHeap(file, rows.length);
    for (const { where, fields } of some) {
      rows.push(keep(parseRow({ number: rows.length + 1, where }, () => parse(fields()))));
      if (slices.isOver()) await slices.next();
    }
  }
  if (rows.length === 0)
    throw new MerfError('EMPTY_DATASET', `Expected at least one row in ${file} but found none`);
  return rows;
}

/** The columns of the first row of a file that can be read, or undefined where none can. */
export async function firstFields(file: string): Promise<Fields | undefined> {
  for await (const some of readFields(file)) {
    for (const { fields } of some) {
      try {
        return fields();
      } catch {
        // Whoever reads all rows hears why this one cannot be read.
      }
    }
  }
  return undefined;
}

/** A row of a file before it is read: what `fields` throws is the row's problem. */
interface UnreadRow {
  readonly where: string;
  fields(): Fields;
}

function readFields(file: string): AsyncGenerator<UnreadRow[]> {
  if (typeof file !== 'string') throw invalidArgument('data', "a file's path", file);
  const kind = extname(file).toLowerCase();
  if (kind === '.jsonl') return jsonFields(file);
  if (kind === '.parquet') return parquetFields(file);
  throw new MerfError('UNSUPPORTED', `Expected a .jsonl or .parquet file for data but received ${file}`);
}

async function* jsonFields(file: string): AsyncGenerator<UnreadRow[]> {
  for await (const lines of readLines(file)) {
    yield lines.map(({ number, text }) => ({
      where: `${file}, line ${number}`,
      fields: () => parseLine(text),
    }));
  }
}

async function* parquetFields(file: string): AsyncGenerator<UnreadRow[]> {
  let count = 0;
  for await (const rows of readParquet(file)) {
    yield rows.map((fields) => ({ where: `${file}, row ${++count}`, fields: () => shallow(fields) }));
  }
}

function parseLine(text: string | undefined): Fields {
  if (text === undefined) throw new Error('Expected a JSON object in UTF-8 but found bytes that are none');
  let value: unknown;
  try {
    value = JSON.parse(longNumber.test(text) ? withLongIntegersAsText(text) : text);
  } catch (error) {
    throw new Error(`Expected a JSON object but ${(error as Error).message}`);
  }
  if (typeof value !== 'object' || value === null || Array.isArray(value)) {
    throw new Error(`Expected a JSON object but found ${describeValue(value)}`);
  }
  return shallow(value as Fields);
}

const longNumber = /\d{16}/;
const stringOrNumber = /"[^"\\]*(?:\\.[^"\\]*)*"|-?\d[\d.eE+-]*/g;

/** A JSON text whose integers beyond 2^53, which a number would round, are strings. */
function withLongIntegersAsText(json: string): string {
  return json.replace(stringOrNumber, (token) =>
    /^-?\d+$/.test(token) && !Number.isSafeInteger(Number(token)) ? `"${token}"` : token,
  );
}

// What compares, copies and writes rows goes into them by recursion, whose depth has to end before the stack does.
const deepest = 256;

function shallow(fields: Fields): Fields {
  if (!isDeeperThan(fields, deepest)) return fields;
  throw new Error(`Expected lists and objects at most ${deepest} deep in each other but found deeper ones`);
}

function isDeeperThan(value: unknown, depth: number): boolean {
  if (typeof value !== 'object' || value === null || ArrayBuffer.isView(value)) return false;
  if (depth === 0) return true;
  for (const inner of Object.values(value)) if (isDeeperThan(inner, depth - 1)) return true;
  return false;
}

// Node ends the whole process where its heap is full.
const fullestHeap = 0.9;

function checkHeap(file: string, rows: number): void {
  const { used_heap_size: used, heap_size_limit: limit } = getHeapStatistics();
  if (used < fullestHeap * limit) return;
  throw new MerfError(
    'OUT_OF_MEMORY',
    `The first ${rows} rows of ${file} fill JavaScript's heap of ${Math.round(limit / 2 ** 20)} MiB: raise it with ` +
      'NODE_OPTIONS=--max-old-space-size=MEBIBYTES, or divide the file',
  );
}

/** Where rows stand in their files, for messages about them; of rows that are objects alone. */
const places = new WeakMap<object, string>();

/** The file and the line or row of a row that was read from one, as in "a.jsonl, line 3". */
export function placeOf(row: unknown): string | undefined {
  return typeof row === 'object' && row !== null ? places.get(row) : undefined;
}

/** Says where a row stands that was made of one of a file. */
export function notePlace(row: unknown, where: string | undefined): void {
  if (typeof row === 'object' && row !== null && where !== undefined) places.set(row, where);
}

/** The rows alone. @throws MerfError MALFORMED_FILE that names the first line or row that cannot be read */
export function requireRows<Row>(loaded: readonly LoadedRow<Row>[]): Row[] {
  return loaded.map(requireRow);
}

function requireRow<Row>(entry: LoadedRow<Row>): Row {
  if ('problem' in entry) throw new MerfError('MALFORMED_FILE', `${entry.where}: ${entry.problem}`);
  notePlace(entry.row, entry.where);
  return entry.row;
}

function parseRow<Row>(place: { number: number; where: string }, parse: () => Row): LoadedRow<Row> {
  try {
    return { ...place, row: parse() };
  } catch (error) {
    return { ...place, problem: problemOf(error) };
  }
}

/** The message of an error; one line a field for the issues of a zod error. */
function problemOf(error: unknown): string {
  const issues = (error as { issues?: unknown } | undefined)?.issues;
  if (Array.isArray(issues)) {
    return issues
      .map((issue: { path?: PropertyKey[]; message?: string }) => {
        const path = issue.path?.map(String).join('.') ?? '';
        return `${path ? `column ${path}: ` : ''}${issue.message}`;
      })
      .join('; ');
  }
  return error instanceof Error ? error.message : String(error);
}

/** A text column. @throws Error that names the column */
export function textField(fields: Fields, column: string): string {
  const value = fields[column];
  if (typeof value !== 'string')
    throw new Error(`Expected text in column ${column} but found ${describeValue(value)}`);
  return value;
}

/** A column with a list whose items all pass `is`. @throws Error that names the column */
export function listField<T>(
  fields: Fields,
  column: string,
  of: string,
  is: (item: unknown) => item is T,
): T[] {
  const value = fields[column];
  if (!Array.isArray(value)) {
    throw new Error(`Expected a list of ${of} in column ${column} but found ${describeValue(value)}`);
  }
  const wrong = value.findIndex((item) => !is(item));
  if (wrong >= 0) {
    throw new Error(
      `Expected a list of ${of} in column ${column} but item ${wrong + 1} is ${describeValue(value[wrong])}`,
    );
  }
  return value as T[];
}

/** Equal for rows of equal contents. */
export function identityOf(row: unknown): string {
  return (
    JSON.stringify(row, (_, value) => (typeof value === 'bigint' ? value.toString() : value)) ?? 'undefined'
  );
}

/** One row in eight is held out for tests, by a hash of what identifies it, so that equal rows stay together. */
export function splitOf(key: string): Split {
  return (createHash('sha256').update(key).digest()[0] as number) % 8 === 0 ? 'test' : 'train';
}

/** The rows with one in eight held out for tests. Few rows, or many that are the same, may leave none to one of both. */
export async function splitRows<Row>(
  rows: readonly Row[],
  identity: (row: Row) => string,
): Promise<Readonly<Record<Split, Row[]>>> {
  const splits: Record<Split, Row[]> = { train: [], test: [] };
  const slices = new Slices();
  for (const row of rows) {
    splits[splitOf(identity(row))].push(row);
    if (slices.isOver()) await slices.next();
  }
  return splits;
}

/**
 * Rows in a seeded random order, a new one in each pass over them.
 *
 * @throws MerfError EMPTY_DATASET
 */
export function shuffledRows<Row>(rows: readonly Row[], seed: number | bigint): RowSource<Row> {
  if (rows.length === 0)
    throw new MerfError('EMPTY_DATASET', 'Expected at least one row to shuffle but received none');
  const hash = createHash('sha256').update(`shuffled ${seed}`);
  let hashed = 0;
  const hashNext = () => void hash.update(`\n${identityOf(rows[hashed++])}`);
  let fingerprint: string | undefined;
  let epoch = -1;
  let order: Row[] = [];
  return {
    size: rows.length,
    get fingerprint() {
      while (hashed < rows.length) hashNext();
      fingerprint ??= hash.digest('hex');
      return fingerprint;
    },
    async prepare() {
      const slices = new Slices();
      while (hashed < rows.length) {
        hashNext();
        if (slices.isOver()) await slices.next();
      }
    },
    at(position) {
      checkPosition(position);
      const wanted = Math.floor(position / rows.length);
      if (wanted !== epoch) {
        order = new Random(seed, wanted).shuffle(rows);
        epoch = wanted;
      }
      return order[position % rows.length] as Row;
    },
  };
}

/** How often `generatedRows` draws at one position before it gives up. */
export const maxDraws = 256;

/**
 * Rows made on demand: position by position, draws are repeated until one belongs to the split.
 *
 * @param options.draw makes a row from two non-negative integers, the same row from the same two every time
 * @param options.identity what makes two rows the same, for the split
 * @param options.fingerprint names the generator and its settings
 */
export function generatedRows<Row>(options: {
  readonly split: Split;
  readonly fingerprint: string;
  readonly draw: (position: number, attempt: number) => Row;
  readonly identity: (row: Row) => string;
}): RowSource<Row> {
  return {
    fingerprint: createHash('sha256')
      .update(`generated ${options.split} ${options.fingerprint}`)
      .digest('hex'),
    at(position) {
      checkPosition(position);
      for (let attempt = 0; attempt < maxDraws; attempt++) {
        const row = options.draw(position, attempt);
        if (splitOf(options.identity(row)) === options.split) return row;
      }
      throw new MerfError(
        'EMPTY_DATASET',
        `Found no ${options.split} row in ${maxDraws} draws: the generator makes too few different rows`,
      );
    },
  };
}

function checkPosition(position: number): void {
  if (!Number.isSafeInteger(position) || position < 0) {
    throw invalidArgument('position', 'a non-negative integer', position);
  }
}
