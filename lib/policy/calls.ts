import { isDeviceLost, MerfError, throwIfAborted } from '../errors.js';

export { cancellable } from '../native.js';

/** Runs the calls of one owner after another in the order in which they were made, until it is closed. */
export class CallQueue {
  #tail: Promise<unknown> = Promise.resolve();
  #closed = false;

  /**
   * @param name what the owner is called in the error that a call after `close` fails with
   * @param lost what is lost with the device, for DEVICE_LOST
   */
  constructor(
    private readonly name: string,
    private readonly lost: string,
  ) {}

  get closed(): boolean {
    return this.#closed;
  }

  close(): void {
    this.#closed = true;
  }

  /** @throws MerfError DISPOSED */
  check(): void {
    if (this.#closed) throw new MerfError('DISPOSED', `${this.name} was disposed`);
  }

  /**
   * Runs after all calls made before, whether they succeeded or not.
   * @throws MerfError DISPOSED, ABORTED where the signal has fired before it begins; DEVICE_LOST says what
   *   was lost
   */
  enqueue<T>(what: string, signal: AbortSignal | undefined, run: () => Promise<T>): Promise<T> {
    const result = this.#tail.then(async () => {
      this.check();
      throwIfAborted(signal, what);
      try {
        return await run();
      } catch (error) {
        if (!isDeviceLost(error)) throw error;
        throw new MerfError('DEVICE_LOST', `${error.message}: ${this.lost}`, { cause: error });
      }
    });
    this.#tail = result.catch(() => undefined);
    return result;
  }
}

/** The error, with a hint where it says that memory ran out. */
export function withHint(error: unknown, hint: string): unknown {
  if (!(error instanceof MerfError) || error.code !== 'OUT_OF_MEMORY') return error;
  return new MerfError('OUT_OF_MEMORY', `${error.message} (${hint})`, { cause: error });
}
