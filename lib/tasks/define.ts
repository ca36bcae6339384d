import { z } from 'zod';
import { describeValue, invalidArgument, MerfError } from '../errors.js';
import type { ChatMessage } from '../prompt/chat-template.js';
import { withMotivation } from '../prompt/motivation.js';
import type { RewardSpec } from '../reward/spec.js';
import { parseSettings, setting } from '../settings.js';
import {
  type Fields,
  generatedRows,
  identityOf,
  loadRows,
  readRows,
  shuffledRows,
  splitRows,
} from './dataset.js';
import type { Environment } from './environment.js';
import { Random } from './random.js';
import type { RowCheck, Split, Task } from './task.js';

/** Where a generated row stands: the seed of the rows, the position, and how often it was drawn there before. */
export interface Draw {
  readonly seed: number | bigint;
  readonly position: number;
  readonly attempt: number;
}

/**
 * Where rows come from: the path of a .jsonl or .parquet file, the rows themselves, or a function that makes one
 * from a seeded stream of random numbers, which must not draw from anything else.
 */
export type Data<Row> = string | readonly Row[] | ((random: Random, draw: Draw) => Row);

/** What a task consists of, once its options are known. */
export interface TaskParts<Row, State = unknown> {
  readonly spec: RewardSpec<Row>;
  /** The prompt of a row without a motivation, which is added to its system message. */
  messages(row: Row): readonly ChatMessage[];
  /** Rows where the option `data` names no file of them; a task without its own rows asks for that option. */
  readonly data?: Data<Row>;
  /** Rows to evaluate on (default: one in eight of the data, by a hash of the row, which training then leaves out). */
  readonly testData?: string | readonly Row[];
  /**
   * Turns a file's columns into a row and throws where they do not fit, as a zod schema's `parse` does (default: the
   * columns as they are).
   */
  parse?(fields: Fields): Row;
  /**
   * What makes two rows the same (default: their JSON): where rows are held out, the same ones stay together,
   * and standard errors take what is measured on them for one cluster.
   */
  identity?(row: Row): string;
  /** A completion that gets the highest total; `merf verify` checks that it does. */
  reference?(row: Row): string;
  /**
   * A completion with worked reasoning that gets the highest total, for `merf sft`: where there are many ways to reason
   * or to say so, one that `random` draws, since a model that has seen a single one has nothing left to try.
   */
  demonstrate?(row: Row, random: Random): string;
  /** What answers the model's turns, where an episode has several. */
  readonly environment?: Environment<Row, State>;
  /** What `merf verify` finds out about a row beyond the reference answer. */
  readonly check?: RowCheck<Row>;
}

interface Named {
  readonly name: string;
  /** One line for `merf tasks`. */
  readonly summary?: string;
}

/** A task without options of its own. */
export interface PlainTaskDefinition<Row, State = unknown> extends Named, TaskParts<Row, State> {}

/** A task that its options shape. */
export interface TaskDefinition<Shape extends z.ZodRawShape, Row, State = unknown> extends Named {
  /**
   * The options, each a zod schema with a description (`.meta({ description })`): flags of the command line, keys of
   * config files and messages about wrong values follow from it. A parsed value must be one that the schema takes again.
   */
  readonly options: Shape;
  create(
    options: z.output<z.ZodObject<Shape>> & DataOptions,
  ): TaskParts<Row, State> | Promise<TaskParts<Row, State>>;
}

/** The values of the options that every task has. */
export interface DataOptions {
  readonly data?: string | undefined;
  readonly testData?: string | undefined;
}

/** The options that every task has. */
export const dataShape = {
  data: setting(z.string().optional(), {
    group: 'Task',
    description: "a .jsonl or .parquet file of rows (default: the task's own rows)",
    path: true,
  }),
  testData: setting(z.string().optional(), {
    group: 'Task',
    description: 'rows to evaluate on (default: one in eight of the data, which training leaves out)',
    path: true,
  }),
};

/** A task before its options are known. */
export interface TaskFactory<Row = unknown, Options = Readonly<Record<string, unknown>>> {
  readonly name: string;
  readonly summary: string;
  /** A strict schema of all its options, `data` and `testData` among them. */
  readonly options: z.ZodObject;
  /**
   * The task with these options; undefined values count as absent.
   * @throws MerfError INVALID_ARGUMENT naming the option, FILE_NOT_FOUND, MALFORMED_FILE, EMPTY_DATASET for the data
   */
  open(options?: Options & DataOptions): Promise<Task<Row>>;
}

/**
 * A task: data, prompts and a reward. A module that exports one as `task` can be named on the command line,
 * `merf train --task ./my-task.ts`.
 *
 *     export const task = defineTask({
 *       name: 'sums',
 *       spec: new RewardSpec({ name: 'sums', components: [{
 *         name: 'correctness',
 *         cases: [
 *           { name: 'right', score: 1, sentence: 'if the answer is the sum' },
 *           { name: 'wrong', score: 0, sentence: 'otherwise' },
 *         ],
 *         verify: (completion, row) => (Number(completion.answer) === row.a + row.b ? 'right' : 'wrong'),
 *       }] }),
 *       data: (random) => ({ a: random.below(100), b: random.below(100) }),
 *       messages: (row) => [{ role: 'user', content: `What is ${row.a} + ${row.b}?` }],
 *     });
 *
 * With options, `options` declares them and `create` makes the rest from their values:
 *
 *     export const task = defineTask({
 *       name: 'sums',
 *       options: { largest: z.int().min(1).default(100).meta({ description: 'largest number' }) },
 *       create: ({ largest }) => ({ spec, data: (random) => ({ a: random.below(largest), ... }), messages }),
 *     });
 *
 * @throws MerfError INVALID_ARGUMENT where the definition is none
 */
export function defineTask<Row, State = unknown>(
  definition: PlainTaskDefinition<Row, State>,
): TaskFactory<Row, Readonly<Record<never, unknown>>>;
export function defineTask<const Shape extends z.ZodRawShape, Row, State = unknown>(
  definition: TaskDefinition<Shape, Row, State>,
): TaskFactory<Row, z.input<z.ZodObject<Shape>>>;
export function defineTask<Row>(
  definition: PlainTaskDefinition<Row> | TaskDefinition<z.ZodRawShape, Row>,
): TaskFactory<Row> {
  const { name, summary = '' } = definition;
  if (typeof name !== 'string' || name === '') throw invalidArgument('name', 'the name of the task', name);
  const isPlain = !('create' in definition);
  if (isPlain) checkParts(definition);
  else if (typeof definition.create !== 'function') {
    throw invalidArgument('create', 'a function that makes the task of its options', definition.create);
  }
  const own = isPlain ? {} : checkedShape(definition.options, name);
  const options = z.strictObject({ ...own, ...dataShape });
  return {
    name,
    summary,
    options,
    async open(given = {}) {
      const kept = Object.fromEntries(Object.entries(given).filter(([, value]) => value !== undefined));
      const parsed = parseSettings(options, kept, `the options of the task ${name}`, 'INVALID_ARGUMENT');
      const parts = isPlain ? definition : await definition.create(parsed as never);
      if (!isPlain) checkParts(parts);
      return assemble(name, parts, parsed);
    },
  };
}

function checkParts<Row>(parts: TaskParts<Row>): void {
  if (typeof parts?.spec?.judge !== 'function') {
    throw invalidArgument('spec', 'a RewardSpec', parts?.spec);
  }
  if (typeof parts.messages !== 'function') {
    throw invalidArgument('messages', "a function that makes a row's prompt", parts.messages);
  }
  const { data, environment } = parts;
  if (data !== undefined && typeof data !== 'string' && typeof data !== 'function' && !Array.isArray(data)) {
    throw invalidArgument('data', "a file's path, an array of rows or a function that makes one", data);
  }
  if (environment !== undefined && typeof environment.reply !== 'function') {
    throw invalidArgument('environment.reply', 'a function', environment.reply);
  }
}

function checkedShape(shape: z.ZodRawShape, name: string): z.ZodRawShape {
  for (const [key, schema] of Object.entries(shape)) {
    if (key in dataShape) {
      throw new MerfError(
        'INVALID_ARGUMENT',
        `Expected no option ${key} of the task ${name}: all tasks have it`,
      );
    }
    if (typeof (schema as Partial<z.ZodType>)?.safeParse !== 'function') {
      throw invalidArgument(`option ${key} of the task ${name}`, 'a zod schema', schema);
    }
  }
  return shape;
}

async function assemble<Row>(
  name: string,
  parts: TaskParts<Row>,
  options: Record<string, unknown>,
): Promise<Task<Row>> {
  const { spec } = parts;
  const { data = parts.data, testData = parts.testData } = options as Pick<
    TaskParts<Row>,
    'data' | 'testData'
  >;
  const identity = (row: Row) => parts.identity?.(row) ?? identityOf(row);
  const parse = (fields: Fields) => (parts.parse ? parts.parse(fields) : (fields as Row));
  const read = (file: string) => readRows(file, parse);
  const load = (file: string) => loadRows(file, parse);
  const rowsOf = async (source: string | readonly Row[]) =>
    typeof source === 'string' ? load(source) : source;

  const splits: Partial<Record<Split, readonly Row[]>> = {};
  if (testData !== undefined) splits.test = await rowsOf(testData);
  if (data !== undefined && typeof data !== 'function') {
    const all = await rowsOf(data);
    if (splits.test) splits.train = all;
    else Object.assign(splits, await splitRows(all, identity));
  }

  const generated = (split: Split, seed: number | bigint) => {
    if (typeof data !== 'function') {
      throw new MerfError(
        'INVALID_ARGUMENT',
        `Expected the option data, a .jsonl or .parquet file, for the task ${name}, which has no rows of its own`,
      );
    }
    // A stream a position; later attempts draw on where the one before stopped.
    let stream: { position: number; attempt: number; random: Random } | undefined;
    return generatedRows({
      split,
      fingerprint: JSON.stringify([
        name,
        withoutFiles(options),
        data.toString(),
        parts.identity?.toString(),
        String(seed),
      ]),
      draw: (position, attempt) => {
        if (!stream || stream.position !== position || stream.attempt !== attempt - 1) {
          stream = { position, attempt, random: new Random(seed, position) };
        }
        stream.attempt = attempt;
        return data(stream.random, { seed, position, attempt });
      },
      identity,
    });
  };

  return {
    name,
    options,
    spec,
    messages: (row, motivation) => withMotivation(parts.messages(row), spec.describe(motivation)),
    rows({ split, seed }) {
      const rows = splits[split];
      if (rows?.length === 0) {
        const { train, test } = splits as Record<Split, readonly Row[]>;
        throw new MerfError(
          'EMPTY_DATASET',
          `Expected rows enough to hold one in eight out but the ${train.length + test.length} of ` +
            `${typeof data === 'string' ? data : `the task ${name}`} leave none to ${split}: give test rows of their own`,
        );
      }
      return rows ? shuffledRows(rows, seed) : generated(split, seed);
    },
    read,
    load,
    identity,
    ...(parts.reference && { reference: (row: Row) => parts.reference?.(row) as string }),
    ...(parts.demonstrate && {
      demonstrate: (row: Row, random = new Random(0)) => parts.demonstrate?.(row, random) as string,
    }),
    ...(parts.environment && { environment: parts.environment }),
    ...(parts.check && { check: parts.check }),
  };
}

/** The options that say what rows are like; which file they come from is told by the rows themselves. */
function withoutFiles(options: Readonly<Record<string, unknown>>): Record<string, unknown> {
  return Object.fromEntries(Object.entries(options).filter(([key]) => !(key in dataShape)));
}

/** What of `value` keeps it from being a task before its options are known; undefined where nothing does. */
export function whatIsNoTask(value: unknown): string | undefined {
  if (typeof value !== 'object' || value === null) return `it is ${describeValue(value)}`;
  const { name, options, open } = value as Partial<TaskFactory>;
  if (typeof name !== 'string') return `its name is ${describeValue(name)}`;
  if (typeof open !== 'function') return `its open is ${describeValue(open)}`;
  if (typeof options?.safeParse !== 'function') return `its options are ${describeValue(options)}`;
  return undefined;
}
