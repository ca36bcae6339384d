import { host } from '../host.js';

/** Thrown where work outlasts its time. */
export class TimeLimitExceeded extends Error {}

/** Thrown where work asks for the end of the process. */
export class ProcessExitRefused extends Error {
  constructor(readonly exitCode: number) {
    super(`it called process.exit(${exitCode})`);
  }
}

/**
 * Runs `work` and waits for what it returns, for `seconds` at most. In Node, `guard.ts` ends even a loop that never
 * yields; elsewhere nothing can, so that a loop which outlasts its time fails once it has come to its end.
 *
 * @throws TimeLimitExceeded, ProcessExitRefused, the reason of `signal`, or what `work` throws
 */
export async function runWithin<T>(
  work: () => T | Promise<T>,
  seconds: number,
  signal?: AbortSignal,
): Promise<T> {
  if (host.runWithin) return host.runWithin(work, seconds, signal);
  const end = performance.now() + seconds * 1000;
  const result = work();
  if (!isThenable(result)) {
    if (performance.now() > end) throw new TimeLimitExceeded();
    return result;
  }
  let stop = () => {};
  const over = new Promise<never>((_, reject) => {
    const onAbort = () => reject(signal?.reason);
    const timer = setTimeout(() => reject(new TimeLimitExceeded()), Math.max(0, end - performance.now()));
    if (signal?.aborted) onAbort();
    else signal?.addEventListener('abort', onAbort, { once: true });
    stop = () => {
      clearTimeout(timer);
      signal?.removeEventListener('abort', onAbort);
    };
  });
  try {
    return await Promise.race([result, over]);
  } finally {
    stop();
  }
}

export function isThenable<T>(value: T | Promise<T>): value is Promise<T> {
  return typeof (value as { then?: unknown } | null | undefined)?.then === 'function';
}
