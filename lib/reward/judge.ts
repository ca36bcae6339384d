import type { ParsedCompletion } from './completion.js';
import type { JudgeOptions, Reward, RewardSpec } from './spec.js';

/** How many completions are judged at once where nobody says. */
export const defaultVerifiersAtOnce = 64;

/**
 * Judges completions as they come, a limited number of them at once: verifiers that ask servers or start processes
 * would else flood them with a whole step's completions.
 */
export class Judge<Row> {
  #running = 0;
  #failure: { readonly error: unknown } | undefined;
  readonly #waiting: (() => void)[] = [];

  /** @param atOnce how many completions are judged at once, at least 1 */
  constructor(
    private readonly spec: RewardSpec<Row>,
    private readonly atOnce: number,
  ) {}

  /** Judges the completion as RewardSpec.judge does, once it is its turn. After a first failure it judges nothing more. */
  async judge(completion: ParsedCompletion, row: Row, options: JudgeOptions = {}): Promise<Reward> {
    if (this.#running >= this.atOnce) await new Promise<void>((resolve) => this.#waiting.push(resolve));
    else this.#running++;
    try {
      // What hangs costs its time limit once, not once a completion.
      if (this.#failure) throw this.#failure.error;
      return await this.spec.judge(completion, row, options);
    } catch (error) {
      this.#failure ??= { error };
      throw error;
    } finally {
      const next = this.#waiting.shift();
      if (next) next();
      else this.#running--;
    }
  }
}
