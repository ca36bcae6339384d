import type { MotivationMix, MotivationView } from '../prompt/motivation.js';
import type { RewardSpec } from '../reward/index.js';
import {
  collect,
  type EpisodeGroup,
  limitsOf,
  type RolloutPolicy,
  type RolloutTask,
} from '../rollout/index.js';
import type { RowSource } from '../tasks/index.js';
import { hintFailed } from './hints.js';
import type { GrpoSettings } from './settings.js';

/** A step's episodes. */
export interface Drawn<Row> {
  groups: EpisodeGroup<Row>[];
  /** The position in the rows that the next step begins at. */
  position: number;
  /** Seconds that the engine and environments took, and that verifiers took beyond it. */
  times: { rollout: number; judging: number };
}

export interface DrawOptions<Row> {
  policy: RolloutPolicy;
  task: RolloutTask<Row> & { readonly spec: RewardSpec<Row> };
  rows: RowSource<Row>;
  settings: GrpoSettings;
  /** The view under which groups that fail are drawn again, where any are. */
  hint?: MotivationView | undefined;
}

// Rows of a step that are drawn again have a place of their own in the random stream, behind all that a step may draw.
const firstHintedRow = 2 ** 31;

/** Where a step's episodes come from: which rows, and how often they are drawn. */
export class EpisodeSource<Row> {
  readonly #options: DrawOptions<Row>;

  constructor(options: DrawOptions<Row>) {
    this.#options = options;
  }

  /** Draws the episodes of step `step`, counted from 1, from row `position` on. */
  async draw(
    step: number,
    position: number,
    motivation: MotivationMix,
    signal?: AbortSignal,
  ): Promise<Drawn<Row>> {
    const { rows, settings, task, hint } = this.#options;
    const batch = Array.from({ length: settings.promptsPerStep }, (_, i) => rows.at(position + i));
    const times = { rollout: 0, judging: 0 };
    const drawn = await this.#collect(batch, 0, motivation, step, times, signal);
    const groups = await hintFailed(drawn, task.spec, hint, (failed, view) =>
      this.#collect(failed, firstHintedRow, [view], step, times, signal),
    );
    return { groups, position: position + batch.length, times };
  }

  async #collect(
    rows: readonly Row[],
    firstRow: number,
    motivation: MotivationMix,
    step: number,
    times: Drawn<Row>['times'],
    signal: AbortSignal | undefined,
  ): Promise<EpisodeGroup<Row>[]> {
    const { policy, task, settings } = this.#options;
    const { groupSize, temperature, topK, topP, minP, keepActivations, seed } = settings;
    return collect(policy, task, rows, {
      ...limitsOf(settings),
      temperature,
      topK,
      topP,
      minP,
      n: groupSize,
      motivation,
      firstRow,
      seed: (BigInt(seed) << 32n) | BigInt(step),
      keepActivations: Math.floor(keepActivations * 2 ** 30),
      signal,
      onTimes: (taken) => {
        times.rollout += taken.rollout;
        times.judging += taken.judging;
      },
    });
  }
}
