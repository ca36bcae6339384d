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
const startMilliseconds = 120_000;

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
  let ended: MerfError | undefined;
  let waiting: ((outcome: FromReader | MerfError) => void) | undefined;
  child.on('message', (message) => waiting?.(message as FromReader));
  child.on('error', (cause) => {
    ended ??= new MerfError('INTERNAL', `Cannot start a process to read ${file}: ${cause.message}`, {
      cause,
    });
    waiting?.(ended);
  });
  child.on('exit', (code, signal) => {
    const how = signal ?? `exit code ${code}`;
    ended ??= fail(`the process that reads it, which may take ${mebibytes} MiB of memory, ended with ${how}`);
    waiting?.(ended);
  });
  let left = seconds * 1000;
  /** What the process answers to a message, or says first. */
  const hear = async (message: ToReader | undefined, milliseconds: number): Promise<FromReader> => {
    const late = () => waiting?.(fail(`it had not been read after ${Math.round(seconds)} s`));
    const timer = setTimeout(late, milliseconds);
    try {
      const outcome = await new Promise<FromReader | MerfError>((resolve) => {
        waiting = resolve;
        // Where the process has ended, its exit says so.
        if (ended) resolve(ended);
        else if (message !== undefined) child.send(message, () => undefined);
      });
      if (outcome instanceof MerfError) throw outcome;
      return outcome;
    } finally {
      clearTimeout(timer);
      waiting = undefined;
    }
  };
  const ask = async (message: ToReader): Promise<FromReader> => {
    const started = performance.now();
    const answer = await hear(message, left);
    left -= performance.now() - started;
    return answer;
  };
  try {
    // A busy machine may take long to start it, which is no fault of the file.
    const first = await hear(undefined, startMilliseconds);
    if (first.type === 'failure') throw fail(first.message);
    const bounds = { rows, bytes: mebibytes * mebibyte, valueBytes: valueMebibytes * mebibyte };
    let answer = await ask({ file, ...bounds });
    for (; answer.type === 'rows'; answer = await ask('next')) yield answer.rows;
    if (answer.type === 'failure') throw fail(answer.message);
  } finally {
    child.kill('SIGKILL');
  }
}
