import { MerfError } from '../errors.js';
import type { RunResult, TrainingEvent } from './loop.js';

/**
 * The events of a trainer's runs, for a listener and for those who iterate over them. Iterating holds the run back: a step
 * begins only once all events of the one before were taken, so that no more than a step's events ever wait.
 */
export class RunEvents {
  readonly #listener: ((event: TrainingEvent) => void) | undefined;
  #queue: TrainingEvent[] | undefined;
  /** Fulfils the promise of who waits for an event, and of the run that waits until they are taken. */
  #onEvent: (() => void) | undefined;
  #onTaken: (() => void) | undefined;
  #running: Promise<RunResult> | undefined;
  #result: RunResult | undefined;

  constructor(listener: ((event: TrainingEvent) => void) | undefined) {
    this.#listener = listener;
  }

  /** What the last run that came to its end came to. */
  get result(): RunResult | undefined {
    return this.#result;
  }

  readonly tell = (event: TrainingEvent): void => {
    this.#listener?.(event);
    this.#queue?.push(event);
    this.#wake();
  };

  /** Waits until all events were taken and the next one is asked for, or the signal fires. */
  readonly taken = async (signal: AbortSignal): Promise<void> => {
    const onAbort = () => this.#onTaken?.();
    signal.addEventListener('abort', onAbort);
    try {
      while (this.#queue !== undefined && !signal.aborted && !this.#isAwaited()) {
        await new Promise<void>((resolve) => {
          this.#onTaken = resolve;
        });
      }
    } finally {
      signal.removeEventListener('abort', onAbort);
    }
  };

  /** Keeps track of a run. @throws MerfError BUSY where one goes on */
  async run(start: () => Promise<RunResult>): Promise<RunResult> {
    if (this.#running) throw new MerfError('BUSY', 'This trainer is running already');
    this.#running = start();
    try {
      this.#result = await this.#running;
      return this.#result;
    } finally {
      this.#running = undefined;
    }
  }

  /** Waits for the end of a run that goes on, however it ends. */
  async end(): Promise<void> {
    await this.#running?.catch(() => undefined);
  }

  /**
   * Starts a run and gives its events. Who leaves early has it stopped, and waits for its end.
   * @throws MerfError BUSY where a run goes on, and what the run throws
   */
  async *iterate(run: () => Promise<RunResult>, stop: () => void): AsyncGenerator<TrainingEvent, RunResult> {
    if (this.#running) throw new MerfError('BUSY', 'This trainer is running already');
    const queue: TrainingEvent[] = [];
    this.#queue = queue;
    let hasEnded = false;
    const running = run().finally(() => {
      hasEnded = true;
      this.#wake();
    });
    // A run that fails is told of where its promise is awaited.
    running.catch(() => undefined);
    try {
      for (;;) {
        const event = queue.shift();
        if (event !== undefined) yield event;
        else if (hasEnded) return await running;
        else await this.#next();
      }
    } finally {
      this.#queue = undefined;
      this.#onTaken?.();
      if (!hasEnded) {
        stop();
        await running;
      }
    }
  }

  #next(): Promise<void> {
    return new Promise((resolve) => {
      this.#onEvent = resolve;
      this.#onTaken?.();
    });
  }

  #isAwaited(): boolean {
    return this.#queue?.length === 0 && this.#onEvent !== undefined;
  }

  #wake(): void {
    const onEvent = this.#onEvent;
    this.#onEvent = undefined;
    onEvent?.();
  }
}
