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
import { bytesToKeep } from './activation-memory.js';
import { isWithoutSignal, judgementOf } from './advantages.js';
import { hintFailed } from './hints.js';
import type { GrpoSettings } from './settings.js';

/** A group and the position of its row among the rows. */
export interface DrawnGroup<Row> extends EpisodeGroup<Row> {
  readonly position: number;
}

/** A step's episodes. */
export interface Drawn<Row> {
  /** All that was drawn, in the order of the positions. */
  groups: DrawnGroup<Row>[];
  /** The ones of them that the step learns, in the same order. */
  learned: DrawnGroup<Row>[];
  /** The position in the rows that the next step begins at. */
  position: number;
  /** Rows that were passed over. */
  skipped: number;
  /** How often the policy was asked for episodes. */
  rollouts: number;
  /** Seconds that the engine and environments took, and that verifiers took beyond it. */
  times: { rollout: number; judging: number };
}

export interface DrawOptions<Row> {
  policy: RolloutPolicy;
  task: RolloutTask<Row> & { readonly spec: RewardSpec<Row> };
  rows: RowSource<Row>;
  settings: GrpoSettings;
  /** Whether the row at a position is drawn (default: all are). */
  accepts?: ((row: Row, position: number) => boolean) | undefined;
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

  /**
   * Draws the episodes of step `step`, counted from 1, from row `position` on. With dynamic sampling (DAPO,
   * arXiv:2503.14476) further rows follow as long as too few groups have a signal; where they stay too few, groups
   * without one fill the step, and what is too much is not learned.
   */
  async draw(
    step: number,
    position: number,
    motivation: MotivationMix,
    signal?: AbortSignal,
  ): Promise<Drawn<Row>> {
    const { rows, settings, task, accepts, hint } = this.#options;
    const { promptsPerStep, dynamicSampling } = settings;
    const times = { rollout: 0, judging: 0 };
    const groups: DrawnGroup<Row>[] = [];
    const withSignal = new Set<DrawnGroup<Row>>();
    let next = position;
    let rollouts = 0;
    let wanted = promptsPerStep;
    do {
      const positions: number[] = [];
      const batch: Row[] = [];
      for (; batch.length < wanted; next++) {
        const row = rows.at(next);
        if (accepts && !accepts(row, next)) continue;
        positions.push(next);
        batch.push(row);
      }
      const plain = await this.#collect(batch, groups.length, motivation, step, times, signal);
      const collected = await hintFailed(plain, task.spec, hint, (failed, view) =>
        this.#collect(failed, firstHintedRow + groups.length, [view], step, times, signal),
      );
      for (const [i, group] of collected.entries()) {
        const drawn = { ...group, position: positions[i] as number };
        groups.push(drawn);
        if (dynamicSampling > 1 && (await hasSignal(drawn, settings))) withSignal.add(drawn);
      }
      rollouts += 1;
      wanted = rowsWanted(promptsPerStep, withSignal.size, groups.length);
    } while (rollouts < dynamicSampling && wanted > 0);
    const learned =
      dynamicSampling > 1 ? chosen(groups, (group) => withSignal.has(group), promptsPerStep) : groups;
    const skipped = next - position - groups.length;
    return { groups, learned, position: next, skipped, rollouts, times };
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
      // What an earlier rollout kept is lost at the next, and a last one that fills up is too small to be worth it.
      keepActivations: firstRow === 0 ? bytesToKeep(settings, step) : 0,
      signal,
      onTimes: (taken) => {
        times.rollout += taken.rollout;
        times.judging += taken.judging;
      },
    });
  }
}

/** Whether a group has advantages that are not 0. */
export async function hasSignal(group: EpisodeGroup, settings: GrpoSettings): Promise<boolean> {
  const { advantages } = await judgementOf([group], settings);
  return !advantages.every(isWithoutSignal);
}

/**
 * How many further rows fill the step if as many of them have a signal as of those before (GRESO, arXiv:2506.02177), at
 * most a step's prompts: a rollout of few rows takes nearly as long as one of many.
 */
function rowsWanted(prompts: number, withSignal: number, drawn: number): number {
  const missing = Math.max(0, prompts - withSignal);
  return withSignal === 0 ? prompts : Math.min(prompts, Math.ceil((missing * drawn) / withSignal));
}

/** The first `count` groups, those with a signal before those without, in the order that they were drawn in. */
function chosen<Group>(
  groups: readonly Group[],
  hasSignal: (group: Group) => boolean,
  count: number,
): Group[] {
  const preferred = [...groups.filter(hasSignal), ...groups.filter((group) => !hasSignal(group))];
  const kept = new Set(preferred.slice(0, count));
  return groups.filter((group) => kept.has(group));
}
