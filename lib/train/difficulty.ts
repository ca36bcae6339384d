import { createHash } from 'node:crypto';
import { z } from 'zod';
import type { RewardSpec } from '../reward/index.js';
import type { Episode, EpisodeGroup } from '../rollout/index.js';
import type { Task } from '../tasks/index.js';
import { Random } from '../tasks/random.js';
import { isWithoutSignal } from './advantages.js';
import { unhinted } from './hints.js';
import type { GrpoSettings } from './settings.js';

export type DifficultySettings = Pick<
  GrpoSettings,
  'difficulty' | 'difficultyDecay' | 'difficultyExplore' | 'difficultyFloor' | 'difficultyFocus' | 'seed'
>;

/** What is remembered of a row. */
interface Visits {
  /** The running success rate: an exponential mean over visits of the share of episodes with the highest total. */
  rate: number;
  /** How many visits to now, one after another, had no signal. */
  silent: number;
}

// Draws of its own, apart from the seed's other uses.
const stream = 0x64696666n << 32n;

/**
 * Knows how hard each row is, and what follows from it:
 * - `skip`: a row whose last z visits had no signal, all right or all wrong, is drawn with probability explore^z (GRESO,
 *   arXiv:2506.02177, with a constant exploration probability);
 * - `prioritize`: a row is drawn with a probability in proportion to 1 - its success rate (prioritized sampling, Kimi k1.5,
 *   arXiv:2501.12599);
 * - `weight`: a group's advantages are multiplied by (1 - success rate)^focus (F-GRPO, arXiv:2602.06717, with the running
 *   rate of the row in place of the group's own).
 *
 * No chance falls below the floor, since what is never drawn is never seen to have become easier. Rows are told apart by
 * the task's `identity`, so generated rows that come again count as well.
 */
export class Difficulty<Row> {
  readonly #task: Pick<Task<Row>, 'identity' | 'spec'>;
  readonly #settings: DifficultySettings;
  #visits = new Map<string, Visits>();

  constructor(task: Pick<Task<Row>, 'identity' | 'spec'>, settings: DifficultySettings) {
    this.#task = task;
    this.#settings = settings;
  }

  /** Whether the row at a position is drawn; it depends on nothing else but the visits before. */
  draws(row: Row, position: number): boolean {
    const chance = this.chance(row);
    return chance >= 1 || new Random(stream ^ BigInt(this.#settings.seed), position).chance(chance);
  }

  /** The probability that a row is drawn when its turn comes; 1 for one that was never seen. */
  chance(row: Row): number {
    const visits = this.#visits.get(this.#key(row));
    const { difficulty, difficultyExplore, difficultyFloor } = this.#settings;
    if (visits === undefined) return 1;
    if (difficulty === 'skip') return Math.max(difficultyFloor, difficultyExplore ** visits.silent);
    if (difficulty === 'prioritize') return Math.max(difficultyFloor, 1 - visits.rate);
    return 1;
  }

  /** What the advantages of groups that were just drawn are multiplied by; undefined where they stay. */
  weights(groups: readonly EpisodeGroup<Row>[]): number[] | undefined {
    const { difficulty, difficultyFocus } = this.#settings;
    if (difficulty !== 'weight') return undefined;
    return groups.map((group) => (1 - this.#rateWith(group)) ** difficultyFocus);
  }

  /** Takes note of a step's groups, once it is over. */
  note(groups: readonly EpisodeGroup<Row>[], advantages: readonly (readonly number[])[]): void {
    for (const [i, group] of groups.entries()) {
      const rate = this.#rateWith(group);
      const silent = isWithoutSignal(advantages[i] as number[]) ? this.#silent(group.row) + 1 : 0;
      this.#visits.set(this.#key(group.row), { rate, silent });
    }
  }

  save(): unknown {
    return [...this.#visits].map(([key, { rate, silent }]) => [key, rate, silent]);
  }

  load(state: unknown): void {
    const visits = keptVisits.parse(state);
    this.#visits = new Map(visits.map(([key, rate, silent]) => [key, { rate, silent }]));
  }

  #silent(row: Row): number {
    return this.#visits.get(this.#key(row))?.silent ?? 0;
  }

  /** The running success rate of a group's row, with this visit. */
  #rateWith(group: EpisodeGroup<Row>): number {
    const own = shareRight(unhinted(group), this.#task.spec);
    const before = this.#visits.get(this.#key(group.row))?.rate ?? own;
    const { difficultyDecay } = this.#settings;
    return difficultyDecay * before + (1 - difficultyDecay) * own;
  }

  /** A row may be long, and a checkpoint holds every key. */
  #key(row: Row): string {
    return createHash('sha256').update(this.#task.identity(row)).digest('base64').slice(0, 16);
  }
}

const keptVisits = z.array(z.tuple([z.string(), z.number(), z.int().min(0)]));

/** The share of episodes with the highest total. */
export function shareRight<Row>(episodes: readonly Episode[], spec: RewardSpec<Row>): number {
  return episodes.filter(({ reward }) => spec.isHighest(reward)).length / episodes.length;
}
