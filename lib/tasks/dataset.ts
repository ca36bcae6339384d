import { createHash } from 'node:crypto';
import { readFile } from 'node:fs/promises';
import { extname } from 'node:path';
import { parquetReadObjects } from 'hyparquet';
import { describeValue, invalidArgument, MerfError } from '../errors.js';
import { Random } from './random.js';
import type { LoadedRow, RowSource, Split } from './task.js';

/** The columns of one row as the file has them; integers beyond 2^53 are strings. */
export type Fields = Readonly<Record<string, unknown>>;

/**
 * Reads a `.jsonl` (one JSON object a line) or `.parquet` file. Lines that cannot be read are kept with the reason.
 *
 * @param parse turns a row's fields into a row; what it throws becomes the row's problem
 * @throws MerfError FILE_NOT_FOUND, UNSUPPORTED for another kind of file, MALFORMED_FILE for a file that is no
 * Parquet, EMPTY_DATASET
 */
export async function readRows<Row>(file: string, parse: (fields: Fields) => Row): Promise<LoadedRow<Row>[]> {
  if (typeof file !== 'string') throw invalidArgument('data', "a file's path", file);
  const kind = extname(file).toLowerCase();
  if (kind !== '.jsonl' && kind !== '.parquet') {
    throw new MerfError('UNSUPPORTED', `Expected a .jsonl or .parquet file for data but received ${file}`);
  }
  let bytes: Buffer;
  try {
    bytes = await readFile(file);
  } catch (cause) {
    const reason =
      (cause as NodeJS.ErrnoException).code === 'ENOENT' ? 'there is no such file' : String(cause);
    throw new MerfError('FILE_NOT_FOUND', `Cannot read the data set ${file}: ${reason}`, { cause });
  }
  const rows = kind === '.jsonl' ? readLines(file, bytes, parse) : await readParquet(file, bytes, parse);
  if (rows.length === 0)
    throw new MerfError('EMPTY_DATASET', `Expected at least one row in ${file} but found none`);
  return rows;
}

/** The rows alone. @throws MerfError MALFORMED_FILE that names the first line or row that cannot be read */
export function requireRows<Row>(loaded: readonly LoadedRow<Row>[]): Row[] {
  return loaded.map((entry) => {
    if ('problem' in entry) throw new MerfError('MALFORMED_FILE', `${entry.where}: ${entry.problem}`);
    return entry.row;
  });
}

function readLines<Row>(file: string, bytes: Buffer, parse: (fields: Fields) => Row): LoadedRow<Row>[] {
  const rows: LoadedRow<Row>[] = [];
  const lines = bytes
    .toString('utf8')
    .replace(/^\uFEFF/, '')
    .split('\n');
  lines.forEach((line, i) => {
    if (line.trim() === '') return;
    const place = { number: rows.length + 1, where: `${file}, line ${i + 1}` };
    rows.push(
      parseRow(place, () => {
        let value: unknown;
        try {
          value = JSON.parse(line);
        } catch (error) {
          throw new Error(`Expected a JSON object but ${(error as Error).message}`);
        }
        if (typeof value !== 'object' || value === null || Array.isArray(value)) {
          throw new Error(`Expected a JSON object but found ${describeValue(value)}`);
        }
        return parse(value as Fields);
      }),
    );
  });
  return rows;
}

async function readParquet<Row>(
  file: string,
  bytes: Buffer,
  parse: (fields: Fields) => Row,
): Promise<LoadedRow<Row>[]> {
  const buffer = new ArrayBuffer(bytes.byteLength);
  new Uint8Array(buffer).set(bytes);
  let rows: Record<string, unknown>[];
  try {
    rows = await parquetReadObjects({ file: buffer });
  } catch (cause) {
    throw new MerfError('MALFORMED_FILE', `${file} cannot be read as Parquet: ${(cause as Error).message}`, {
      cause,
    });
  }
  return rows.map((fields, i) =>
    parseRow({ number: i + 1, where: `${file}, row ${i + 1}` }, () =>
      parse(withoutBigInts(fields) as Fields),
    ),
  );
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

function withoutBigInts(value: unknown): unknown {
  if (typeof value === 'bigint') {
    return Number.isSafeInteger(Number(value)) ? Number(value) : value.toString();
  }
  if (Array.isArray(value)) return value.map(withoutBigInts);
  if (typeof value === 'object' && value !== null && Object.getPrototypeOf(value) === Object.prototype) {
    return Object.fromEntries(Object.entries(value).map(([key, inner]) => [key, withoutBigInts(inner)]));
  }
  return value;
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

/**
 * The rows with one in eight held out for tests.
 *
 * @param name what the error calls the rows
 * @throws MerfError EMPTY_DATASET where a split has no row
 */
export function splitRows<Row>(
  rows: readonly Row[],
  identity: (row: Row) => string,
  name: string,
): Readonly<Record<Split, Row[]>> {
  const splits: Record<Split, Row[]> = { train: [], test: [] };
  for (const row of rows) splits[splitOf(identity(row))].push(row);
  for (const [split, some] of Object.entries(splits)) {
    if (some.length > 0) continue;
    throw new MerfError(
      'EMPTY_DATASET',
      `Expected rows enough to hold one in eight out but the ${rows.length} of ${name} leave none to ${split}: ` +
        'give test rows of their own',
    );
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
  for (const row of rows) hash.update(`\n${identityOf(row)}`);
  let epoch = -1;
  let order: Row[] = [];
  return {
    size: rows.length,
    fingerprint: hash.digest('hex'),
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
