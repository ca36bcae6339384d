import { setImmediate } from 'node:timers/promises';

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
    await setImmediate();
    this.#end = performance.now() + sliceMilliseconds;
  }
}
