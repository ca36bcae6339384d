import type { MotivationView } from '../prompt/motivation.js';
import type { EpisodeGroup, RolloutPolicy } from '../rollout/index.js';
import type { RowSource, Task } from '../tasks/index.js';
import { isWithoutSignal, judgementOf } from './advantages.js';
import { Curriculum, type CurriculumPlan, type OpenTask } from './curriculum.js';
import { Difficulty } from './difficulty.js';
import { type Drawn, EpisodeSource } from './draw.js';
import { contentHash } from './identity.js';
import type { Kept } from './kept.js';
import { Replay, type ReplayedGroup } from './replay.js';
import type { GrpoSettings } from './settings.js';

export interface CourseOptions<Row> {
  policy: RolloutPolicy;
  task: Task<Row>;
  rows: RowSource<Row>;
  settings: GrpoSettings;
  /** The view under which groups that fail are drawn again, where any are. */
  hint?: MotivationView | undefined;
  /** In place of the task and its rows. */
  curriculum?: { plan: CurriculumPlan; openTask: OpenTask<Row> } | undefined;
}

/** What a step is drawn from. */
export interface CourseStage<Row> {
  /** How the metrics name it, as in `people=3`; empty without a curriculum. */
  readonly name: string;
  readonly task: Task<Row>;
  readonly rows: RowSource<Row>;
  readonly source: EpisodeSource<Row>;
  readonly difficulty: Difficulty<Row> | undefined;
}

/** What a step learns. */
export interface StepLesson<Row> {
  groups: EpisodeGroup<Row>[];
  /** By group and episode. */
  advantages: number[][];
  /** The ones of the groups that an earlier step drew. */
  replayed: ReplayedGroup<Row>[];
}

/**
 * What a run is drawn from and what of it each step learns: the stages of a curriculum, how hard their rows are, and
 * groups that are learned again. What it keeps changes at the end of a step alone, in `note`: a step that fails leaves
 * all as it was.
 */
export class Course<Row> {
  readonly stages: readonly CourseStage<Row>[];
  readonly #options: CourseOptions<Row>;
  readonly #curriculum: Curriculum<Row> | undefined;
  readonly #replay: Replay<Row> | undefined;

  private constructor(options: CourseOptions<Row>, curriculum: Curriculum<Row> | undefined) {
    const { policy, task, rows, settings, hint } = options;
    this.#options = options;
    this.#curriculum = curriculum;
    this.#replay = settings.replay > 0 ? new Replay(settings) : undefined;
    this.stages = (curriculum?.stages ?? [{ name: '', task, rows }]).map((stage) => {
      const difficulty = settings.difficulty === 'off' ? undefined : new Difficulty(stage.task, settings);
      const accepts = difficulty && ((row: Row, position: number) => difficulty.draws(row, position));
      return {
        ...stage,
        difficulty,
        source: new EpisodeSource({ policy, settings, accepts, hint, ...stage }),
      };
    });
  }

  /** @throws MerfError as the task does for an option or a value of the curriculum that it does not have */
  static async open<Row>(options: CourseOptions<Row>): Promise<Course<Row>> {
    const { curriculum, settings } = options;
    return new Course(
      options,
      curriculum && (await Curriculum.open(curriculum.plan, curriculum.openTask, settings)),
    );
  }

  /** Equal where the same rows stand at the same positions. */
  get fingerprint(): string {
    const [first, ...others] = this.stages.map(({ rows }) => rows.fingerprint) as [string, ...string[]];
    return others.length === 0 ? first.slice(0, 16) : contentHash([first, ...others]);
  }

  /** What is kept from step to step, each part under its name. */
  get kept(): Record<string, Kept | undefined> {
    const byStage = this.stages.map(({ name, difficulty }) => [`difficulty ${name}`.trim(), difficulty]);
    return { curriculum: this.#curriculum, replay: this.#replay, ...Object.fromEntries(byStage) };
  }

  /**
   * The stage of step `step`, counted from 1, and the position that its rows are drawn from.
   * @param position how many rows the steps before went through
   */
  at(step: number, position: number): { stage: CourseStage<Row>; position: number } {
    if (this.#curriculum === undefined) return { stage: this.stages[0] as CourseStage<Row>, position };
    const { index, position: own } = this.#curriculum.at(step);
    return { stage: this.stages[index] as CourseStage<Row>, position: own };
  }

  /** What the step learns of what was drawn, with groups learned again in the place of those without a signal. */
  async lesson(step: number, stage: CourseStage<Row>, drawn: Drawn<Row>): Promise<StepLesson<Row>> {
    const { settings, policy } = this.#options;
    let groups: EpisodeGroup<Row>[] = drawn.learned;
    let replayed: ReplayedGroup<Row>[] = [];
    if (this.#replay) {
      const { advantages } = await judgementOf(groups, settings);
      const silent = advantages.map(isWithoutSignal);
      const places = silent.filter((one) => one).length;
      replayed = this.#replay.choose(step, places, { ...stage, tokenizer: policy.tokenizer });
      const left = [...replayed];
      groups = groups.map((group, i) => (silent[i] ? (left.shift() ?? group) : group));
    }
    const weights = stage.difficulty?.weights(groups);
    const { advantages } = await judgementOf(groups, settings, weights);
    return { groups, advantages, replayed };
  }

  /** Takes note of a step that is over. */
  async note(step: number, stage: CourseStage<Row>, drawn: Drawn<Row>): Promise<void> {
    if (!this.#curriculum && !this.#replay && !stage.difficulty) return;
    const { groups, position } = drawn;
    const { spec } = stage.task;
    const { advantages } = await judgementOf(groups, this.#options.settings);
    stage.difficulty?.note(groups, advantages);
    this.#replay?.note(step, stage, groups, advantages);
    const episodes = groups.flatMap((group) => group.episodes);
    const right = episodes.filter(({ reward }) => spec.isHighest(reward)).length;
    this.#curriculum?.note(step, position, right / episodes.length);
  }
}
