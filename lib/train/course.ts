import { MerfError } from '../errors.js';
import type { MotivationView } from '../prompt/motivation.js';
import {
  type EpisodeGroup,
  type PromptLengthOptions,
  PromptLengths,
  type RolloutPolicy,
} from '../rollout/index.js';
import type { RowSource, Task } from '../tasks/index.js';
import { isWithoutSignal, judgementOf } from './advantages.js';
import { Curriculum, type CurriculumPlan, type OpenTask } from './curriculum.js';
import { Difficulty, shareRight } from './difficulty.js';
import { type Drawn, EpisodeSource } from './draw.js';
import { unhinted } from './hints.js';
import { contentHash } from './identity.js';
import type { Kept } from './kept.js';
import type { TrainingEvent } from './loop.js';
import { findOverlong, type OverlongOptions } from './overlong-rows.js';
import { Replay, type ReplayedGroup } from './replay.js';
import type { GrpoSettings } from './settings.js';

export interface CourseOptions<Row> {
  policy: RolloutPolicy;
  task: Task<Row>;
  rows: RowSource<Row>;
  settings: GrpoSettings;
  /** The view under which groups that fail are drawn again, where any are. */
  hint?: MotivationView | undefined;
  /** The views that prompts are drawn and learned under. */
  views: readonly MotivationView[];
  onEvent?: ((event: TrainingEvent) => void) | undefined;
  signal?: AbortSignal | undefined;
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
  /** Leaves out rows whose prompt fills the context, where they are left out. */
  readonly fitting: FittingPrompts<Row>;
}

/** What a step learns. */
export interface StepLesson<Row> {
  groups: EpisodeGroup<Row>[];
  /** By group and episode. */
  advantages: number[][];
  /** Those of all that was drawn, before weights. */
  compared: number[][];
  /** The ones of the groups that an earlier step drew. */
  replayed: ReplayedGroup<Row>[];
}

// So many generated rows in a row that do not fit are no accident.
const mostRefused = 1000;

/** Knows which rows have a prompt that fits: those of a file before the first step, generated ones as they are drawn. */
class FittingPrompts<Row> {
  readonly #options: PromptLengthOptions<Row>;
  readonly #settings: Pick<GrpoSettings, 'filterOverlongPrompts'>;
  readonly #lengths: PromptLengths<Row>;
  #overlong: Set<Row> | undefined;
  #refused = 0;

  constructor(options: PromptLengthOptions<Row>, settings: Pick<GrpoSettings, 'filterOverlongPrompts'>) {
    this.#options = options;
    this.#settings = settings;
    this.#lengths = new PromptLengths(options);
  }

  /** Measures all rows where there is an end of them. @throws MerfError as `findOverlong` does */
  async measure(rows: RowSource<Row>, told: Pick<OverlongOptions<Row>, 'onEvent' | 'signal'>): Promise<void> {
    const { size } = rows;
    if (size === undefined) return;
    this.#overlong = await findOverlong(positionsOf(rows, size), {
      what: 'prompts',
      count: size,
      measure: (row) => this.#lengths.overlong(row),
      contextLength: this.#options.policy.contextLength,
      filter: this.#settings.filterOverlongPrompts,
      setting: 'filterOverlongPrompts',
      onEvent: told.onEvent,
      signal: told.signal,
    });
  }

  /** @throws MerfError EMPTY_DATASET where generated rows do not fit, one after another */
  accepts(row: Row): boolean {
    if (!this.#settings.filterOverlongPrompts) return true;
    if (this.#overlong) return !this.#overlong.has(row);
    if (this.#lengths.overlong(row) === undefined) {
      this.#refused = 0;
      return true;
    }
    this.#refused += 1;
    if (this.#refused < mostRefused) return false;
    throw new MerfError(
      'EMPTY_DATASET',
      `The prompts of ${mostRefused} generated rows in a row are longer than the model's context of ` +
        `${this.#options.policy.contextLength} tokens`,
    );
  }
}

function* positionsOf<Row>(rows: RowSource<Row>, size: number): Generator<Row> {
  for (let i = 0; i < size; i++) yield rows.at(i);
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
    const { policy, task, rows, settings, hint, views } = options;
    this.#options = options;
    this.#curriculum = curriculum;
    this.#replay = settings.replay > 0 ? new Replay(settings) : undefined;
    this.stages = (curriculum?.stages ?? [{ name: '', task, rows }]).map((stage) => {
      const difficulty = settings.difficulty === 'off' ? undefined : new Difficulty(stage.task, settings);
      const fitting = new FittingPrompts({ policy, task: stage.task, views }, settings);
      const filters = difficulty || settings.filterOverlongPrompts;
      const accepts = (row: Row, position: number) =>
        fitting.accepts(row) && (difficulty?.draws(row, position) ?? true);
      return {
        ...stage,
        difficulty,
        fitting,
        source: new EpisodeSource({ policy, settings, ...(filters && { accepts }), hint, ...stage }),
      };
    });
  }

  /**
   * @throws MerfError as the task does for an option or a value of the curriculum that it does not have, and for rows of
   *   a file as `findOverlong` does
   */
  static async open<Row>(options: CourseOptions<Row>): Promise<Course<Row>> {
    const { curriculum, settings } = options;
    const stages = curriculum && (await Curriculum.open(curriculum.plan, curriculum.openTask, settings));
    const course = new Course(options, stages);
    for (const { rows, fitting } of course.stages) {
      await rows.prepare?.();
      await fitting.measure(rows, options);
    }
    return course;
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
    const { advantages: compared } = await judgementOf(drawn.groups, settings);
    let groups: EpisodeGroup<Row>[] = drawn.learned;
    let replayed: ReplayedGroup<Row>[] = [];
    if (this.#replay) {
      const silent = new Set(
        drawn.groups.filter((_, i) => isWithoutSignal(compared[i] as number[])) as EpisodeGroup<Row>[],
      );
      const places = groups.filter((group) => silent.has(group)).length;
      replayed = this.#replay.choose(step, places, { ...stage, tokenizer: policy.tokenizer });
      const left = [...replayed];
      groups = groups.map((group) => (silent.has(group) ? (left.shift() ?? group) : group));
    }
    const weights = stage.difficulty?.weights(groups);
    if (groups === drawn.groups && weights === undefined) {
      return { groups, advantages: compared, compared, replayed };
    }
    const { advantages } = await judgementOf(groups, settings, weights);
    return { groups, advantages, compared, replayed };
  }

  /** Takes note of a step that is over. */
  note(step: number, stage: CourseStage<Row>, drawn: Drawn<Row>, { compared }: StepLesson<Row>): void {
    const { groups, position } = drawn;
    stage.difficulty?.note(groups, compared);
    this.#replay?.note(step, stage, groups, compared);
    this.#curriculum?.note(step, position, shareRight(groups.flatMap(unhinted), stage.task.spec));
  }
}
