import { Worker } from 'node:worker_threads';
import { brotliDecompressSync, gunzipSync } from 'node:zlib';
import {
  asyncBufferFromFile,
  type Compressors,
  parquetMetadataAsync,
  parquetRead,
  parquetSchema,
  type SchemaElement,
} from 'hyparquet';
import { decompressLz4, decompressLz4Raw, decompressSnappy, decompressZstd } from 'hyparquet-compressors';

/** What the process that reads a Parquet file is told: first which, then that it may go on. */
export type ToReader = ({ readonly file: string } & Bounds) | 'next';

/** The most that is read of a file: rows, bytes of a row group decompressed, and bytes of all values. */
interface Bounds {
  readonly rows: number;
  readonly bytes: number;
  readonly valueBytes: number;
}

export type FromReader =
  | { readonly type: 'ready' }
  | { readonly type: 'rows'; readonly rows: Record<string, unknown>[] }
  | { readonly type: 'end' }
  | { readonly type: 'failure'; readonly message: string };

// Rows are sent so many at a time, or fewer where they are long: the receiver copies them on its event loop.
const mostRows = 512;
const mostSize = 1 << 17;

const text = new TextDecoder('utf-8', { fatal: true, ignoreBOM: true });
const parsers = {
  stringFromBytes(bytes: Uint8Array) {
    return bytes && text.decode(bytes);
  },
  jsonFromBytes(bytes: Uint8Array) {
    return bytes && JSON.parse(text.decode(bytes));
  },
};

// Node's own decompressors are quicker and check what they read; none makes more than the page says.
const decompressors: Compressors = {
  SNAPPY: decompressSnappy,
  GZIP: (input, maxOutputLength) => gunzipSync(input, { maxOutputLength }),
  BROTLI: (input, maxOutputLength) => brotliDecompressSync(input, { maxOutputLength }),
  ZSTD: (input, outputLength) => decompressZstd(input, new Uint8Array(outputLength)),
  LZ4: decompressLz4,
  LZ4_RAW: decompressLz4Raw,
};

/** The rows of a file in the order of its row groups. */
async function* read(file: string, limits: Bounds): AsyncGenerator<Record<string, unknown>[]> {
  const buffer = await asyncBufferFromFile(file);
  const metadata = await parquetMetadataAsync(buffer, { geoparquet: false });
  const all = metadata.row_groups.reduce((sum, group) => sum + Number(group.num_rows), 0);
  if (!(all <= limits.rows)) {
    throw new Error(
      `it says that it has ${all} rows, and a file of its size has ${Math.floor(limits.rows)} at most`,
    );
  }
  const columns = parquetSchema(metadata).children.map(({ element }) => element);
  let rowStart = 0;
  let valueBytes = 0;
  for (const group of metadata.row_groups) {
    const rowEnd = rowStart + Number(group.num_rows);
    if (rowEnd === rowStart) continue;
    const chunks = new Map<string, ArrayLike<unknown>[]>();
    await parquetRead({
      file: buffer,
      metadata,
      rowStart,
      rowEnd,
      compressors: decompressorsWithin(limits.bytes),
      utf8: false,
      parsers,
      onChunk: ({ columnName, columnData }) => {
        chunks.set(columnName, [...(chunks.get(columnName) ?? []), columnData]);
      },
    });
    const count = rowEnd - rowStart;
    const values = columns.map((column) => valuesOf(column, chunks.get(column.name) ?? [], count));
    for (const { rows, size } of rowsOf(values, count)) {
      valueBytes += size;
      if (valueBytes > limits.valueBytes) {
        throw new Error(`its values are larger than ${Math.floor(limits.valueBytes / 2 ** 20)} MiB`);
      }
      yield rows;
    }
    rowStart = rowEnd;
  }
}

interface Column {
  readonly name: string;
  readonly values: readonly unknown[];
}

/** The values of a column of `count` rows. */
function valuesOf(
  { name, converted_type: type, scale }: SchemaElement,
  chunks: readonly ArrayLike<unknown>[],
  count: number,
): Column {
  const values = chunks.flatMap((chunk) => Array.from(chunk));
  if (values.length !== count)
    throw new Error(`its column ${name} has ${values.length} values in ${count} rows`);
  if (type !== 'DECIMAL') return { name, values };
  // The reader multiplies by a power of ten, which misses the nearest number (3 * 0.1 is not 0.3).
  const exact = (value: unknown) => (typeof value === 'number' ? Number(value.toFixed(scale ?? 0)) : value);
  return { name, values: values.map(exact) };
}

/** The rows some at a time, with about how many bytes their values take. */
function* rowsOf(
  columns: readonly Column[],
  count: number,
): Generator<{ rows: Record<string, unknown>[]; size: number }> {
  let rows: Record<string, unknown>[] = [];
  let size = 0;
  for (let i = 0; i < count; i++) {
    const row: Record<string, unknown> = {};
    for (const { name, values } of columns) {
      const value = plain(values[i]);
      size += sizeOf(value);
      // A column may have any name, and an assignment to __proto__ makes none.
      Object.defineProperty(row, name, { value, enumerable: true, writable: true, configurable: true });
    }
    rows.push(row);
    if (rows.length < mostRows && size < mostSize) continue;
    yield { rows, size };
    rows = [];
    size = 0;
  }
  if (rows.length > 0) yield { rows, size };
}

/** Decompressors that refuse to make more than `bytes` together. */
function decompressorsWithin(bytes: number): Compressors {
  let left = bytes;
  return Object.fromEntries(
    Object.entries(decompressors).map(([codec, decompress]) => [
      codec,
      (input: Uint8Array, outputLength: number) => {
        left -= outputLength;
        if (!(outputLength >= 0 && left >= 0)) {
          throw new Error(`its row groups are larger than ${Math.floor(bytes / 2 ** 20)} MiB decompressed`);
        }
        // Pages of nulls alone may hold not even what the codec writes of an empty input.
        return outputLength === 0 ? new Uint8Array(0) : decompress(input, outputLength);
      },
    ]),
  );
}

/** A value as JSON has it, but for bytes and dates. */
function plain(value: unknown): unknown {
  if (value === undefined || value === null) return null;
  if (typeof value === 'bigint') {
    return Number.isSafeInteger(Number(value)) ? Number(value) : value.toString();
  }
  if (typeof value !== 'object') return value;
  if (Array.isArray(value)) return value.map(plain);
  const prototype: unknown = Object.getPrototypeOf(value);
  if (prototype !== Object.prototype && prototype !== null) return value;
  return Object.fromEntries(Object.entries(value).map(([key, inner]) => [key, plain(inner)]));
}

/** About how much there is of a value to copy. */
function sizeOf(value: unknown): number {
  if (typeof value === 'string') return value.length;
  if (typeof value !== 'object' || value === null) return 8;
  if (ArrayBuffer.isView(value)) return value.byteLength;
  return Object.values(value).reduce((sum: number, inner) => sum + sizeOf(inner), 16);
}

function send(message: FromReader): void {
  process.send?.(message);
}

let rows: AsyncGenerator<Record<string, unknown>[]> | undefined;

async function answer(message: ToReader): Promise<void> {
  if (message !== 'next') rows = read(message.file, message);
  const next = await rows?.next();
  send(next === undefined || next.done ? { type: 'end' } : { type: 'rows', rows: next.value });
}

function fail(error: unknown): void {
  send({ type: 'failure', message: error instanceof Error ? error.message : String(error) });
}

process.on('message', (message: ToReader) => {
  answer(message).catch(fail);
});
// Promises of the reader that nobody awaits fail the file, not the program.
process.on('unhandledRejection', fail);
process.on('uncaughtException', fail);
process.on('disconnect', () => process.exit());
// A decoder that never returns hears nothing of that: a thread of its own sees that the program has ended.
const watch = `const { ppid } = process; setInterval(() => process.ppid === ppid || process.kill(process.pid, 'SIGKILL'), 1000)`;
new Worker(watch, { eval: true, execArgv: [] }).unref();
send({ type: 'ready' });
