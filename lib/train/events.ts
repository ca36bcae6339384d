import { MerfError } from '../errors.js';
import type { RunResult, TrainingEvent, TrainingLoop } from './loop.js';

/**
 * What all trainers do alike: one run at a time, stopping, and events for a listener and for those who iterate over the
 * trainer. Iterating holds the run back: a step begins only once all events of the one before were taken, so that no more
 * than a step's events ever wait.
 */
export abstract class IterableTrainer {
  readonly #listener: ((event: TrainingEvent) => void) | undefined;
  #queue: TrainingEvent[] | undefined;
  /** Fulfils the promise of who waits for an event, and of the run that waits until they are taken. */
  #onEvent: (() => void) | undefined;
  #onTaken: (() => void) | undefined;
  #running: Promise<RunResult> | undefined;
  #result: RunResult | undefined;
  #loop: TrainingLoop | undefined;
  #stopping = false;

  constructor(listener: ((event: TrainingEvent) => void) | undefined) {
    this.#listener = listener;
  }

  /** Trains once, by `runLoop`. */
  protected abstract train(options: { signal?: AbortSignal }): Promise<RunResult>;

  /**
   * Trains until `steps` are done or stop() is called. `signal` gives up at once: what the step in progress did is
   * lost, the last checkpoint stays.
   * @throws MerfError BUSY where it is running, ABORTED, RESUME_MISMATCH, VERIFIER_FAILED, VERIFIER_TIMEOUT, NON_FINITE,
   *   DEVICE_LOST naming the checkpoint to go on from, and what the policy throws
   */
  async run(options: { signal?: AbortSignal } = {}): Promise<RunResult> {
    this.#requireIdle();
    this.#running = this.train(options);
    try {
      this.#result = await this.#running;
      return this.#result;
    } finally {
      this.#running = undefined;
    }
  }

  /**
   * Runs as `run` does and gives the events, as in
   *
   *     for await (const event of trainer) if (event.type === 'step') console.log(event.metrics);
   *
   * A step begins only once the events of the one before were taken. Leaving the loop early, by `break` or by an error,
   * ends the run as stop() does: what is done is saved, and the loop is left when that has happened.
   * @returns what the run came to, which is also `result`
   * @throws MerfError BUSY where the trainer is running, and what `run` throws
   */
  async *events(options: { signal?: AbortSignal } = {}): AsyncGenerator<TrainingEvent, RunResult> {
    this.#requireIdle();
    const queue: TrainingEvent[] = [];
    this.#queue = queue;
    let hasEnded = false;
    const running = this.run(options).finally(() => {
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
        this.stop();
        await running;
      }
    }
  }

  [Symbol.asyncIterator](): AsyncGenerator<TrainingEvent, RunResult> {
    return this.events();
  }

  /** What the last run came to; undefined where none has come to its end. */
  get result(): RunResult | undefined {
    return this.#result;
  }

  /** Ends the run after the step in progress, which is then saved. */
  stop(): void {
    this.#stopping = true;
    this.#loop?.stop();
  }

  /** Stops a run that goes on, and waits for its end. The policy is its owner's to dispose of. */
  async [Symbol.asyncDispose](): Promise<void> {
    this.stop();
    await this.#running?.catch(() => undefined);
  }

  /** Runs the loop, which stop() ends whether it was called before or is called in its midst. */
  protected runLoop(loop: TrainingLoop, signal: AbortSignal | undefined): Promise<RunResult> {
    this.#loop = loop;
    if (this.#stopping) loop.stop();
    return loop.run(signal);
  }

  protected readonly tell = (event: TrainingEvent): void => {
    this.#listener?.(event);
    this.#queue?.push(event);
    this.#wake();
  };

  /** Waits until all events were taken and the next one is asked for, or the signal fires. */
  protected readonly taken = async (signal: AbortSignal): Promise<void> => {
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

  #requireIdle(): void {
    if (this.#running) throw new MerfError('BUSY', 'This trainer is running already');
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
