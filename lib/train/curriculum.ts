import { z } from 'zod';
import { invalidArgument, MerfError } from '../errors.js';
import type { RowSource, Task } from '../tasks/index.js';
import type { GrpoSettings } from './settings.js';

export type CurriculumSettings = Pick<
  GrpoSettings,
  'curriculum' | 'curriculumCorrect' | 'curriculumWindow' | 'seed'
>;

/** Opens the task with one of its options changed, whose value is the text that the curriculum has for it. */
export type OpenTask<Row> = (options: Readonly<Record<string, string>>) => Promise<Task<Row>>;

/** The values that an option takes one after another; by success where stages have no step to begin at. */
export interface CurriculumPlan {
  readonly option: string;
  readonly stages: readonly { readonly value: string; readonly step?: number }[];
}

/** What a step is drawn from. */
export interface CurriculumStage<Row> {
  /** How the metrics name it, as in `people=3`. */
  readonly name: string;
  readonly task: Task<Row>;
  readonly rows: RowSource<Row>;
}

const accepted =
  'OPTION=VALUE@STEP,VALUE@STEP with the first at step 0, such as "people=2@0,3@50", or OPTION=VALUE,VALUE, whose next ' +
  'value comes with success';

/**
 * Reads a curriculum over an option of the task: `people=2@0,3@50,2-5@100` by step, counted from 0, or `people=2,3,2-5`
 * by success.
 * @throws MerfError INVALID_ARGUMENT
 */
export function parseCurriculum(text: string): CurriculumPlan {
  // Far longer than any, and short enough for a search that tries every beginning.
  if (text.length > 10_000) throw invalidArgument('curriculum', 'at most 10,000 characters', text);
  const [, option = '', values = ''] = /^([A-Za-z]\w*)=(.+)$/.exec(text) ?? [];
  if (option === '') throw invalidArgument('curriculum', accepted, text);
  if (!values.includes('@')) {
    const stages = values.split(',').map((value) => ({ value: value.trim() }));
    if (stages.length < 2 || stages.some(({ value }) => value === '')) {
      throw invalidArgument('curriculum', accepted, text);
    }
    return { option, stages };
  }
  // A value may hold commas of its own: a stage ends behind its step.
  const stages = [...values.matchAll(/\s*([^@]+)@(\d+)\s*(?:,|$)/g)].map(([, value = '', step]) => ({
    value: value.trim(),
    step: Number(step),
  }));
  const read = stages.map(({ value, step }) => `${value}@${step}`).join(',');
  const rising = stages.every(({ step }, i) => i === 0 || step > (stages[i - 1]?.step as number));
  if (read !== values.replaceAll(/\s*([,@])\s*/g, '$1').trim() || stages[0]?.step !== 0 || !rising) {
    throw invalidArgument('curriculum', accepted, text);
  }
  return { option, stages };
}

/** The words of a curriculum with each value of its option changed. @throws MerfError INVALID_ARGUMENT */
export function mapCurriculum(text: string, change: (value: string) => string): string {
  const { option, stages } = parseCurriculum(text);
  const changed = stages.map(({ value, step }) => `${change(value)}${step === undefined ? '' : `@${step}`}`);
  return `${option}=${changed.join(',')}`;
}

const keptState = z.object({
  stage: z.int().min(0),
  positions: z.array(z.int().min(0)),
  correct: z.array(z.number()),
});

interface CurriculumState {
  stage: number;
  positions: number[];
  correct: number[];
}

/**
 * Training from easy to hard (curriculum learning, Bengio et al. 2009; over tasks of a language model Kimi k1.5,
 * arXiv:2501.12599): the task is opened once for each value of an option. Stages begin at steps that are given, or each
 * when `curriculumCorrect` of the completions of the last `curriculumWindow` steps were correct. Every stage has rows of
 * its own and goes through them from the first.
 */
export class Curriculum<Row> {
  readonly #plan: CurriculumPlan;
  readonly #stages: readonly CurriculumStage<Row>[];
  readonly #settings: CurriculumSettings;
  #state: CurriculumState;

  private constructor(
    plan: CurriculumPlan,
    stages: readonly CurriculumStage<Row>[],
    settings: CurriculumSettings,
  ) {
    this.#plan = plan;
    this.#stages = stages;
    this.#settings = settings;
    this.#state = { stage: 0, positions: stages.map(() => 0), correct: [] };
  }

  /** @throws MerfError as `open` does for an option or a value that the task does not have */
  static async open<Row>(
    plan: CurriculumPlan,
    open: OpenTask<Row>,
    settings: CurriculumSettings,
  ): Promise<Curriculum<Row>> {
    const stages: CurriculumStage<Row>[] = [];
    for (const { value } of plan.stages) {
      const task = await open({ [plan.option]: value });
      const rows = await task.rows({ split: 'train', seed: settings.seed });
      stages.push({ name: `${plan.option}=${value}`, task, rows });
    }
    return new Curriculum(plan, stages, settings);
  }

  get stages(): readonly CurriculumStage<Row>[] {
    return this.#stages;
  }

  /** Which stage step `step`, counted from 1, belongs to, and the position that its rows are drawn from. */
  at(step: number): { index: number; position: number } {
    const index = this.#stageOf(step);
    return { index, position: this.#state.positions[index] as number };
  }

  /** Takes note of what a step came to, once it is over: its share of correct completions and where it ended. */
  note(step: number, position: number, correct: number): void {
    const stage = this.#stageOf(step);
    this.#state.positions[stage] = position;
    this.#state.stage = stage;
    const { curriculumCorrect, curriculumWindow } = this.#settings;
    const recent = [...this.#state.correct, correct].slice(-curriculumWindow);
    const mean = recent.reduce((sum, share) => sum + share, 0) / recent.length;
    const passed = recent.length === curriculumWindow && mean >= curriculumCorrect;
    const advances = this.#bySuccess() && passed && stage + 1 < this.#stages.length;
    this.#state.correct = advances ? [] : recent;
    if (advances) this.#state.stage += 1;
  }

  save(): unknown {
    return this.#state;
  }

  load(state: unknown): void {
    const read = keptState.parse(state);
    const count = this.#stages.length;
    if (read.stage >= count || read.positions.length !== count) {
      throw new Error(`the curriculum has ${count} stages`);
    }
    this.#state = read;
  }

  #bySuccess(): boolean {
    return this.#plan.stages[0]?.step === undefined;
  }

  #stageOf(step: number): number {
    if (this.#bySuccess()) return this.#state.stage;
    return this.#plan.stages.findLastIndex((stage) => (stage.step as number) <= step - 1);
  }
}

/** @throws MerfError INVALID_CONFIG, INVALID_ARGUMENT */
export function checkCurriculum(
  text: string | undefined,
  given: { openTask?: unknown; rows?: unknown },
): CurriculumPlan | undefined {
  if (text === undefined) return undefined;
  const plan = parseCurriculum(text);
  if (given.openTask === undefined) {
    throw new MerfError('INVALID_CONFIG', `Expected openTask beside curriculum = ${JSON.stringify(text)}`);
  }
  if (given.rows !== undefined) {
    throw new MerfError(
      'INVALID_CONFIG',
      'Expected no rows beside a curriculum, whose stages have their own',
    );
  }
  return plan;
}
