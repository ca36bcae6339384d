import { type Context, createContext, Script } from 'node:vm';
import { MerfError } from '../errors.js';
import { guardedFor, takeCut, watch } from './watchdog.js';

interface Listeners {
  readonly onCut: Set<() => void>;
  readonly onLate: Set<(failure: MerfError) => void>;
}

const listeners: unique symbol = Symbol.for('merf.listeners') as never;

/** Thrown where work outlasts its time. */
export class TimeLimitExceeded extends Error {}

/** Thrown where work asks for the end of the process. */
export class ProcessExitRefused extends Error {
  constructor(readonly exitCode: number) {
    super(`it called process.exit(${exitCode})`);
  }
}

/** Number of verifiers and environments that execute right now, and of those that go on behind an `await`. */
let executing = 0;
let awaited = 0;
let refusesExit = false;

/**
 * Keeps code under guard from ending the process, which would lose what was trained since the last checkpoint. What calls
 * behind an `await` cannot be told from other code, so while any is there only what answers a signal may end the process.
 */
function refuseExit(): void {
  if (refusesExit) return;
  refusesExit = true;
  const exit = process.exit;
  process.exit = ((code) => {
    const isGuarded = executing > 0 || (awaited > 0 && !/ at process\.emit /.test(String(new Error().stack)));
    if (!isGuarded) return exit.call(process, code);
    throw new ProcessExitRefused(Number(code ?? process.exitCode ?? 0));
  }) as typeof process.exit;
}

let guard:
  | { readonly slot: { work?: () => unknown }; readonly context: Context; readonly script: Script }
  | undefined;

/**
 * Runs `work` and waits for what it returns, for `seconds` at most. A timer alone cannot end a loop that never
 * yields (or a regular expression that backtracks for ever), so the synchronous part runs under the virtual
 * machine's watchdog, which can, and what follows an `await` under `watch`.
 *
 * @throws TimeLimitExceeded, ProcessExitRefused, or what `work` throws
 */
export async function runWithin<T>(
  work: () => T | Promise<T>,
  seconds: number,
  signal?: AbortSignal,
): Promise<T> {
  refuseExit();
  const milliseconds = Math.max(1, Math.ceil(seconds * 1000));
  handleCut();
  if (turnAfterHang) {
    // What has hung is told first, and may be the end of this work as well: else each of many would hang in turn.
    await turnAfterHang;
    for (let turn = turnToAwait(); turn; turn = turnToAwait()) await turn;
    if (signal?.aborted) throw signal.reason;
  }
  const called = callWithin(work, milliseconds);
  if (!called.isThenable) return called.result;
  let end = () => {};
  awaited += 1;
  try {
    return await Promise.race([
      called.result,
      new Promise<never>((_, reject) => {
        const onLate = () => reject(new TimeLimitExceeded());
        const onAbort = () => reject(signal?.reason);
        const endWatch = watch(seconds, onLate);
        const timer = setTimeout(() => {
          endWatch();
          onLate();
          handleCut();
        }, milliseconds);
        if (signal?.aborted) onAbort();
        else signal?.addEventListener('abort', onAbort, { once: true });
        end = () => {
          endWatch();
          clearTimeout(timer);
          signal?.removeEventListener('abort', onAbort);
        };
      }),
    ]);
  } finally {
    awaited -= 1;
    end();
  }
}

/** Those who listen, in one place for all copies of this library: a task's module may have brought its own. */
const registry = globalThis as { [listeners]?: Listeners };
registry[listeners] ??= { onCut: new Set(), onLate: new Set() };
const { onCut: cutListeners, onLate: lateListeners } = registry[listeners];
let turnAfterHang: Promise<void> | undefined;

/** Lets the work that would begin in this turn of the event loop wait for the next one. */
function awaitTurnAfterHang(): void {
  turnAfterHang ??= new Promise((resolve) => {
    setImmediate(() => {
      turnAfterHang = undefined;
      resolve();
    });
  });
}

function handleCut(): void {
  if (!takeCut()) return;
  awaitTurnAfterHang();
  for (const listener of cutListeners) listener();
}

/**
 * Hears that a loop was cut off in the middle of the event loop's turn, whereby promises that were about to go on may never
 * settle.
 * @returns a function that ends the listening
 */
export function onLoopCut(listener: () => void): () => void {
  cutListeners.add(listener);
  return () => cutListeners.delete(listener);
}

/**
 * Hears of errors that nobody waits for, which would end the process: mostly in a promise that a verifier does not await, or
 * a callback that comes after its answer.
 * @returns a function that ends the listening
 */
export function onLateFailure(listener: (failure: MerfError) => void): () => void {
  // A program with a handler of its own decides itself.
  const catches = process.listenerCount('uncaughtException') === 0;
  if (catches) process.on('uncaughtException', announceLateFailure);
  lateListeners.add(listener);
  return () => {
    lateListeners.delete(listener);
    if (catches) process.off('uncaughtException', announceLateFailure);
  };
}

/** Tells those who listen of an error that nobody waits for. Returns whether anybody listens. */
export function announceLateFailure(cause: unknown): boolean {
  const message = cause instanceof Error ? cause.message : String(cause);
  const failure = new MerfError(
    'VERIFIER_FAILED',
    `Something failed that nobody waited for, as in a promise that a verifier does not await: ${message}`,
    { cause },
  );
  for (const listener of lateListeners) listener(failure);
  return lateListeners.size > 0;
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

type Called<T> =
  | { readonly result: Promise<Awaited<T>>; readonly isThenable: true }
  | { readonly result: Awaited<T>; readonly isThenable: false };

function callWithin<T>(work: () => T, milliseconds: number): Called<T> {
  if (!guard) {
    const slot: { work?: () => unknown } = {};
    guard = { slot, context: createContext(slot), script: new Script('work()') };
  }
  const outer = guard.slot.work;
  // A getter named `then` is code as well.
  guard.slot.work = () => {
    const result = work();
    return { result, isThenable: isThenable(result) };
  };
  const unguard = guardedFor(milliseconds / 1000);
  executing += 1;
  try {
    return guard.script.runInContext(guard.context, { timeout: milliseconds }) as Called<T>;
  } catch (error) {
    const code = (error as { code?: unknown } | undefined)?.code;
    if (code !== 'ERR_SCRIPT_EXECUTION_TIMEOUT') throw error;
    awaitTurnAfterHang();
    throw new TimeLimitExceeded();
  } finally {
    executing -= 1;
    unguard();
    if (outer) guard.slot.work = outer;
    else delete guard.slot.work;
  }
}

function isThenable(value: unknown): boolean {
  return typeof (value as { then?: unknown } | null | undefined)?.then === 'function';
}
