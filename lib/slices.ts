/** Calls back in a later turn of the event loop. Browsers and edge runtimes have timers alone. */
function onNextTurn(callback: () => void): void {
  if (typeof setImmediate === 'function') setImmediate(callback);
  else setTimeout(callback, 0);
}

// A block of the event loop that nobody notices, and long enough that giving it up costs next to nothing.
const sliceMilliseconds = 8;

/**
 * Divides long work on the event loop into slices, between which everything else has its turn.
 *
 *     const slices = new Slices();
 *     for (const row of rows) {
 *       work(row);
 *       if (slices.isOver()) await slices.next();
 *     }
 */
export class Slices {
  #end = performance.now() + sliceMilliseconds;

  isOver(): boolean {
    return performance.now() > this.#end;
  }

  /** Lets the event loop turn and begins the next slice. */
  async next(): Promise<void> {
    await new Promise<void>(onNextTurn);
    this.#end = performance.now() + sliceMilliseconds;
  }
}

/** How long verifiers may hold the event loop before they let it turn, in milliseconds. */
const verifierMilliseconds = 5;
let sliceStart = 0;
let nextTurn: Promise<void> | undefined;

/**
 * The event loop's next turn, where this one has gone to verifiers for longer than a slice. To be asked right before
 * each synchronous stretch of work: `for (let turn = turnToAwait(); turn; turn = turnToAwait()) await turn`.
 */
export function turnToAwait(): Promise<void> | undefined {
  if (nextTurn) return performance.now() - sliceStart > verifierMilliseconds ? nextTurn : undefined;
  sliceStart = performance.now();
  nextTurn = new Promise((resolve) => {
    onNextTurn(() => {
      nextTurn = undefined;
      resolve();
    });
  });
  return undefined;
}
