import { fork } from 'node:child_process';
import { fileURLToPath } from 'node:url';
import { MerfError } from '../../errors.js';
import { locate, typeScriptLoader } from '../../reward/worker.js';
import type { Fields } from '../dataset.js';
import { openDataFile } from './open.js';
import type { FromReader, ToReader } from './parquet-process.js';

/** How much a Parquet file may cost to read. What it costs is for the file to say, not for its size. */
export interface ParquetLimits {
  /** Seconds of reading; those in which rows are waited for are counted, not those in which they are used. */
  readonly seconds: number;
  /** Rows of the whole file. */
  readonly rows: number;
  /** MiB of JavaScript's heap, and of decompressed pages of one row group. */
  readonly mebibytes: number;
  /** MiB of the values of all rows together, each counted as often as it occurs. */
  readonly valueMebibytes: number;
}

const mebibyte = 2 ** 20;

/** Limits that no file of `size` bytes comes near which holds data. */
export function limitsFor(size: number): ParquetLimits {
  return {
    seconds: 20 + size / mebibyte,
    rows: 1_000_000 + size / 4,
    mebibytes: Math.ceil(Math.min(256 + (32 * size) / mebibyte, 8192)),
    valueMebibytes: 1024 + (64 * size) / mebibyte,
  };
}

/**
 * The rows of a Parquet file, some at a time: nulls are null, integers beyond 2^53 strings and binary columns bytes.
 * They are read in a process of their own. A file that never lets its reader go, or that grows without bounds as it is
 * decompressed, ends that process and nothing else: a worker thread that runs out of memory takes the whole process
 * with it.
 *
 * @throws MerfError FILE_NOT_FOUND, MALFORMED_FILE
 */
export async function* readParquet(
  file: string,
  limits: Partial<ParquetLimits> = {},
): AsyncGenerator<Fields[]> {
  const { handle, size } = await openDataFile(file);
  await handle.close();
  const { seconds, rows, mebibytes, valueMebibytes } = { ...limitsFor(size), ...limits };
  const module = locate(new URL('./parquet-process.js', import.meta.url));
  const child = fork(fileURLToPath(module), [], {
    serialization: 'advanced',
    stdio: ['ignore', 'ignore', 'ignore', 'ipc'],
    execArgv: [
      `--max-old-space-size=${mebibytes}`,
      ...(module.pathname.endsWith('.ts') ? ['--import', typeScriptLoader()] : []),
    ],
  });
  const fail = (reason: string) =>
    new MerfError('MALFORMED_FILE', `${file} cannot be read as Parquet: ${reason}`);
  let left = seconds * 1000;
  const ask = (message: ToReader) =>
    new Promise<FromReader>((resolve, reject) => {
      const started = performance.now();
      const timer = setTimeout(() => {
        settle(() => reject(fail(`it had not been read after ${Math.round(seconds)} s`)));
      }, left);
      const settle = (end: () => void) => {
        clearTimeout(timer);
        child.removeAllListeners();
        left -= performance.now() - started;
        end();
      };
      child.once('message', (answer) => settle(() => resolve(answer as FromReader)));
      child.once('error', (error) => settle(() => reject(fail(error.message))));
      child.once('exit', (code, signal) => {
        const reason = `reading it took more than ${mebibytes} MiB of memory (${signal ?? `exit code ${code}`})`;
        settle(() => reject(fail(reason)));
      });
      // Where the process has ended, its exit is told as well.
      child.send(message, () => undefined);
    });
  try {
    const bounds = { rows, bytes: mebibytes * mebibyte, valueBytes: valueMebibytes * mebibyte };
    let answer = await ask({ file, ...bounds });
    for (; answer.type === 'rows'; answer = await ask('next')) yield answer.rows;
    if (answer.type === 'failure') throw fail(answer.message);
  } finally {
    child.removeAllListeners();
    child.on('error', () => undefined);
    child.kill('SIGKILL');
  }
}
