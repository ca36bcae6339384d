import type { MerfError } from '../errors.js';
import { onLateFailure, onLoopCut } from '../reward/guard.js';

/** Seconds that a step has to end by itself after a loop was cut off. */
const secondsAfterCut = 20;

/**
 * What ends a run from outside of the step in progress: a failure that nobody waited for, or the loss of promises that the
 * step waits for, together with a loop that was cut off.
 */
export class Interruptions {
  /** Fires where the caller gives up, and for a failure while the weights are as the last step left them. */
  readonly signal: AbortSignal;
  #failure: MerfError | undefined;
  readonly #abort = new AbortController();
  readonly #lost: Promise<never>;
  #timer: NodeJS.Timeout | undefined;
  readonly #stopListening: readonly (() => void)[];

  /**
   * @param hasUpdated whether the step in progress has changed the weights, and so has to be brought to its end
   * @param onCut makes the error of a step that does not end after a loop was cut off
   */
  constructor(signal: AbortSignal | undefined, hasUpdated: () => boolean, onCut: () => MerfError) {
    this.signal = signal ? AbortSignal.any([signal, this.#abort.signal]) : this.#abort.signal;
    let lose: (error: MerfError) => void;
    this.#lost = new Promise<never>((_, reject) => {
      lose = reject;
    });
    this.#lost.catch(() => undefined);
    this.#stopListening = [
      onLateFailure((failure) => {
        this.#failure ??= failure;
        if (!hasUpdated()) this.#abort.abort(failure);
      }),
      onLoopCut(() => {
        this.#timer ??= setTimeout(() => lose(onCut()), secondsAfterCut * 1000);
      }),
    ];
  }

  /** The failure that nobody waited for, where there was one. */
  get failure(): MerfError | undefined {
    return this.#failure;
  }

  /** What `work` comes to, or the loss of it. */
  async await<T>(work: Promise<T>): Promise<T> {
    try {
      return await Promise.race([work, this.#lost]);
    } finally {
      clearTimeout(this.#timer);
      this.#timer = undefined;
    }
  }

  close(): void {
    clearTimeout(this.#timer);
    for (const stop of this.#stopListening) stop();
  }
}
