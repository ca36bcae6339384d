import { existsSync } from 'node:fs';
import { createRequire } from 'node:module';
import { availableParallelism } from 'node:os';
import { fileURLToPath, pathToFileURL } from 'node:url';
import type { Piscina } from 'piscina';
import { invalidArgument, MerfError } from '../errors.js';
import type { ParsedCompletion } from './completion.js';
import { announceLateFailure } from './guard.js';
import type { VerifierContext } from './spec.js';
import type { Job } from './worker-thread.js';

export interface WorkerOptions {
  /** Number of verifications that run at once, each in a thread of its own (default: the number of cores). */
  readonly threads?: number;
  /**
   * Seconds that one verification may run, its time in the queue not counted; then it fails with
   * VERIFIER_TIMEOUT. The default is no limit but that of the reward, which fires the verifier's `signal`.
   */
  readonly timeoutSeconds?: number;
  /** Seconds after which a thread without work is ended (default 60). */
  readonly idleSeconds?: number;
}

/** A verifier of a reward's component; its promise is rejected where the verification was ended. */
export type WorkerVerifier<Row, Verdict extends string | number> = (
  completion: ParsedCompletion,
  row: Row,
  context: VerifierContext,
) => Promise<Verdict>;

/**
 * A verifier that runs a module's export `(completion, row, { cases }) => verdict` in a worker thread. When
 * `signal` fires or the time limit is over the thread is ended, even in a loop that never yields, and a new
 * one takes its place; other verifications go on. Threads start with the first work, load the module once,
 * and do not keep the process alive.
 *
 *     verify: inWorker(new URL('./grade.js', import.meta.url), 'verify')
 *
 * The completion and the row are copied into the thread as `structuredClone` does: functions are refused, and
 * instances of classes arrive as plain objects. In TypeScript sources `./grade.js` may stand for
 * `./grade.ts`.
 *
 * @param module URL of the module's file
 * @param exportName name of the exported function, which may be async
 * @throws MerfError INVALID_ARGUMENT, FILE_NOT_FOUND; the verifier itself rejects with VERIFIER_TIMEOUT,
 * ABORTED, and with VERIFIER_FAILED where the export throws (its message is kept), returns neither text nor a
 * number, or ends its thread, and where a completion or row cannot be copied
 */
export function inWorker<Row = unknown, Verdict extends string | number = string>(
  module: URL | string,
  exportName: string,
  options: WorkerOptions = {},
): WorkerVerifier<Row, Verdict> {
  const url = locate(module);
  if (typeof exportName !== 'string' || exportName === '') {
    throw invalidArgument('exportName', 'the name of a function that the module exports', exportName);
  }
  const threads = positive('threads', options.threads ?? availableParallelism());
  if (!Number.isInteger(threads)) throw invalidArgument('threads', 'a positive integer', options.threads);
  const idleSeconds = positive('idleSeconds', options.idleSeconds ?? 60);
  const timeoutSeconds =
    options.timeoutSeconds === undefined ? undefined : positive('timeoutSeconds', options.timeoutSeconds);

  let pool: Promise<Piscina<Job, string | number>> | undefined;
  const slots = new Slots(threads);

  return async (completion, row, { cases, signal }) => {
    await slots.take(signal);
    const controller = new AbortController();
    const abort = () => controller.abort(signal.reason);
    let timer: NodeJS.Timeout | undefined;
    let isLate = false;
    try {
      throwIfEnded(signal);
      signal.addEventListener('abort', abort, { once: true });
      if (timeoutSeconds !== undefined) {
        timer = setTimeout(() => {
          isLate = true;
          controller.abort();
        }, timeoutSeconds * 1000);
      }
      pool ??= startPool(url, threads, idleSeconds);
      const job: Job = { module: url.href, exportName, completion, row, cases };
      return (await (await pool).run(job, { signal: controller.signal })) as Verdict;
    } catch (cause) {
      throwIfEnded(signal);
      if (isLate) {
        throw new MerfError('VERIFIER_TIMEOUT', `${exportName} of ${url.href} ran for ${timeoutSeconds} s`);
      }
      // Errors of a thread are copies, and in a test runner instances of another Error than this module's.
      const { name, message = String(cause) } = (cause ?? {}) as { name?: unknown; message?: string };
      if (name === 'DataCloneError') {
        throw new MerfError(
          'VERIFIER_FAILED',
          `Expected a completion and a row that structuredClone copies into a thread, but ${message}`,
          { cause },
        );
      }
      throw new MerfError('VERIFIER_FAILED', message, { cause });
    } finally {
      clearTimeout(timer);
      signal.removeEventListener('abort', abort);
      slots.give();
    }
  };
}

/** Lets so many in at once; the others wait in the order in which they came, outside of their time limit. */
class Slots {
  #free: number;
  readonly #waiting = new Set<() => void>();

  constructor(count: number) {
    this.#free = count;
  }

  /** @throws MerfError ABORTED where the signal fires before there is a slot */
  async take(signal: AbortSignal): Promise<void> {
    throwIfEnded(signal);
    if (this.#free > 0) {
      this.#free--;
      return;
    }
    await new Promise<void>((resolve, reject) => {
      const enter = () => {
        signal.removeEventListener('abort', leave);
        resolve();
      };
      const leave = () => {
        this.#waiting.delete(enter);
        reject(ended(signal));
      };
      this.#waiting.add(enter);
      signal.addEventListener('abort', leave, { once: true });
    });
  }

  give(): void {
    const [next] = this.#waiting;
    if (!next) {
      this.#free++;
      return;
    }
    this.#waiting.delete(next);
    next();
  }
}

async function startPool(
  module: URL,
  threads: number,
  idleSeconds: number,
): Promise<Piscina<Job, string | number>> {
  const { Piscina } = await import('piscina');
  const own = locate(new URL('./worker-thread.js', import.meta.url));
  const isTypeScript = [own, module].some((url) => /\.m?ts$/.test(url.pathname));
  const pool = new Piscina<Job, string | number>({
    filename: fileURLToPath(own),
    name: 'runJob',
    minThreads: 0,
    maxThreads: threads,
    idleTimeout: idleSeconds * 1000,
    execArgv: isTypeScript ? ['--import', typeScriptLoader()] : [],
  });
  // A thread that fails between two verifications is replaced; without a listener the whole process would end.
  pool.on('error', announceLateFailure);
  return pool;
}

/**
 * A module that lets a thread import TypeScript through tsx. tsx's own entry registers nothing in a thread,
 * and a tsconfig's path aliases could lead to sources of this library instead of to the one that runs.
 */
export function typeScriptLoader(): string {
  const { resolve } = createRequire(import.meta.url);
  const api = new URL('./esm/api/index.mjs', pathToFileURL(resolve('tsx'))).href;
  const code = `import { register } from ${JSON.stringify(api)}; register({ tsconfig: false });`;
  return `data:text/javascript,${encodeURIComponent(code)}`;
}

/** The URL of the module's file, or of the TypeScript file beside it where there is only that. */
export function locate(module: URL | string): URL {
  let url: URL | undefined;
  try {
    url = new URL(module);
  } catch {
    // A text that is no URL is refused below.
  }
  if (url?.protocol !== 'file:') {
    throw invalidArgument('module', 'the URL of a file, as new URL("./grade.js", import.meta.url),', module);
  }
  if (existsSync(url)) return url;
  const source = new URL(url);
  source.pathname = url.pathname.replace(/\.(m?)js$/, '.$1ts');
  if (existsSync(source)) return source;
  throw new MerfError(
    'FILE_NOT_FOUND',
    `Cannot run ${fileURLToPath(url)} in a worker: there is no such file`,
  );
}

function positive(argument: string, value: number): number {
  if (typeof value === 'number' && value > 0 && Number.isFinite(value)) return value;
  throw invalidArgument(argument, 'a positive number', value);
}

function throwIfEnded(signal: AbortSignal): void {
  if (signal.aborted) throw ended(signal);
}

function ended(signal: AbortSignal): MerfError {
  return new MerfError('ABORTED', 'The verification was ended', { cause: signal.reason });
}
