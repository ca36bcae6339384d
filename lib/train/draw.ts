import type { MotivationMix } from '../prompt/motivation.js';
import type { RewardSpec } from '../reward/index.js';
import {
  collect,
  type EpisodeGroup,
  limitsOf,
  type RolloutPolicy,
  type RolloutTask,
} from '../rollout/index.js';
import type { RowSource } from '../tasks/index.js';
import { bytesToKeep } from './keep.js';
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
}

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
    const { rows, settings } = this.#options;
    const batch = Array.from({ length: settings.promptsPerStep }, (_, i) => rows.at(position + i));
    const times = { rollout: 0, judging: 0 };
    const groups = await this.#collect(batch, 0, motivation, step, times, signal);
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
    const { groupSize, temperature, topK, topP, minP, seed } = settings;
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
      keepActivations: bytesToKeep(settings, step),
      signal,
      onTimes: (taken) => {
        times.rollout += taken.rollout;
        times.judging += taken.judging;
      },
    });
  }
}
