import { extname } from 'node:path';
import { getHeapStatistics } from 'node:v8';
import { describeValue, invalidArgument, MerfError } from '../errors.js';
import { provide, type UnreadRow } from '../host.js';
import '../node-host.js';
import { readLines } from './files/jsonl.js';
import { readParquet } from './files/parquet.js';
import type { Fields } from './rows.js';

export * from './rows.js';

async function* readFields(file: string): AsyncGenerator<UnreadRow[]> {
  let count = 0;
  for await (const some of fieldsOf(file)) {
    checkHeap(file, count);
    yield some;
    count += some.length;
  }
}

function fieldsOf(file: string): AsyncGenerator<UnreadRow[]> {
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

provide({ readRows: readFields });
