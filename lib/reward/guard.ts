import { type Context, createContext, Script } from 'node:vm';

/** Thrown where work outlasts its time. */
export class TimeLimitExceeded extends Error {}

let guard:
  | { readonly slot: { work?: () => unknown }; readonly context: Context; readonly script: Script }
  | undefined;

/**
 * Runs `work` and waits for what it returns, for `seconds` at most. A timer alone cannot end a loop that never
 * yields (or a regular expression that backtracks for ever), so the synchronous part runs under the virtual
 * machine's watchdog, which can. A loop that first awaits and then never yields is out of reach of both.
 *
 * @throws TimeLimitExceeded, or what `work` throws
 */
export async function runWithin<T>(
  work: () => T | Promise<T>,
  seconds: number,
  signal?: AbortSignal,
): Promise<T> {
  const milliseconds = Math.max(1, Math.ceil(seconds * 1000));
  const result = callWithin(work, milliseconds);
  if (!isThenable(result)) return result;
  let timer: NodeJS.Timeout | undefined;
  let onAbort: (() => void) | undefined;
  try {
    return await Promise.race([
      result,
      new Promise<never>((_, reject) => {
        timer = setTimeout(() => reject(new TimeLimitExceeded()), milliseconds);
        onAbort = () => reject(signal?.reason);
        if (signal?.aborted) onAbort();
        else signal?.addEventListener('abort', onAbort, { once: true });
      }),
    ]);
  } finally {
    clearTimeout(timer);
    if (onAbort) signal?.removeEventListener('abort', onAbort);
  }
}

/** How long verifiers may hold the event loop before they let it turn, in milliseconds. */
const sliceLength = 5;
let sliceStart = 0;
let nextTurn: Promise<void> | undefined;

/**
 * The event loop's next turn, where this one has gone to verifiers for longer than a slice. To be asked right before
 * each synchronous stretch of work: `for (let turn = turnToAwait(); turn; turn = turnToAwait()) await turn`.
 */
export function turnToAwait(): Promise<void> | undefined {
  if (nextTurn) return performance.now() - sliceStart > sliceLength ? nextTurn : undefined;
  sliceStart = performance.now();
  nextTurn = new Promise((resolve) => {
    setImmediate(() => {
      nextTurn = undefined;
      resolve();
    });
  });
  return undefined;
}

function callWithin<T>(work: () => T, milliseconds: number): T {
  if (!guard) {
    const slot: { work?: () => unknown } = {};
    guard = { slot, context: createContext(slot), script: new Script('work()') };
  }
  const outer = guard.slot.work;
  guard.slot.work = work;
  try {
    return guard.script.runInContext(guard.context, { timeout: milliseconds }) as T;
  } catch (error) {
    const code = (error as { code?: unknown } | undefined)?.code;
    if (code === 'ERR_SCRIPT_EXECUTION_TIMEOUT') throw new TimeLimitExceeded();
    throw error;
  } finally {
    if (outer) guard.slot.work = outer;
    else delete guard.slot.work;
  }
}

function isThenable<T>(value: T | Promise<T>): value is Promise<T> {
  return typeof (value as { then?: unknown } | null | undefined)?.then === 'function';
}
