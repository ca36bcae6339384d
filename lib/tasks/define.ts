import { invalidArgument } from '../errors.js';
import { withMotivation } from '../prompt/motivation.js';
import type { RewardSpec } from '../reward/spec.js';
import {
  type Fields,
  generatedRows,
  identityOf,
  readRows,
  requireRows,
  shuffledRows,
  splitRows,
} from './dataset.js';
import { Random } from './random.js';
import type { ChatMessage, RowCheck, Split, Task } from './task.js';

/**
 * Where rows come from: the path of a .jsonl or .parquet file, the rows themselves, or a function that makes one
 * from a seeded stream of random numbers, which must not draw from anything else.
 */
export type Data<Row> = string | readonly Row[] | ((random: Random) => Row);

export interface TaskDefinition<Row> {
  readonly name: string;
  readonly spec: RewardSpec<Row>;
  /** The prompt of a row without a motivation, which is added to its system message. */
  messages(row: Row): readonly ChatMessage[];
  readonly data: Data<Row>;
  /** Rows to evaluate on (default: one in eight of `data`, by a hash of the row, which training then leaves out). */
  readonly testData?: string | readonly Row[];
  /**
   * Turns a file's columns into a row and throws where they do not fit, as a zod schema's `parse` does (default: the
   * columns as they are).
   */
  parse?(fields: Fields): Row;
  /** A completion that gets the highest total; `merf verify` checks that it does. */
  reference?(row: Row): string;
  /** A completion with worked reasoning that gets the highest total, for `merf sft`. */
  demonstrate?(row: Row): string;
  /** What `merf verify` finds out about a row beyond the reference answer. */
  readonly check?: RowCheck<Row>;
}

/**
 * A task of one's own: data, prompts and a reward. A module that exports it as `task` can be named on the command
 * line, `merf train --task ./my-task.ts`.
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
 * @throws MerfError FILE_NOT_FOUND, MALFORMED_FILE, EMPTY_DATASET for the data, INVALID_ARGUMENT
 */
export function defineTask<Row>(definition: TaskDefinition<Row>): Promise<Task<Row>> {
  const task = makeTask(definition);
  // A module exports the promise before anyone can await it; until then a failure is not an unhandled one.
  task.catch(() => undefined);
  return task;
}

async function makeTask<Row>(definition: TaskDefinition<Row>): Promise<Task<Row>> {
  const { name, spec, data, testData } = definition;
  if (typeof name !== 'string' || name === '') throw invalidArgument('name', 'the name of the task', name);
  if (typeof spec?.score !== 'function') throw invalidArgument('spec', 'a RewardSpec', spec);
  if (typeof definition.messages !== 'function') {
    throw invalidArgument('messages', "a function that makes a row's prompt", definition.messages);
  }
  const parse = (fields: Fields) => (definition.parse ? definition.parse(fields) : (fields as Row));
  const read = (file: string) => readRows(file, parse);
  const load = async (file: string) => requireRows(await read(file));
  const rowsOf = async (source: string | readonly Row[]) =>
    typeof source === 'string' ? load(source) : source;

  const splits: Partial<Record<Split, readonly Row[]>> = {};
  if (testData !== undefined) splits.test = await rowsOf(testData);
  if (typeof data === 'string' || Array.isArray(data)) {
    const all = await rowsOf(data as string | readonly Row[]);
    if (splits.test) splits.train = all;
    else Object.assign(splits, splitRows(all, identityOf, `the task ${name}`));
  } else if (typeof data !== 'function') {
    throw invalidArgument('data', "a file's path, an array of rows or a function that makes one", data);
  }

  return {
    name,
    spec,
    messages: (row, motivation) => withMotivation(definition.messages(row), spec.describe(motivation)),
    rows({ split, seed }) {
      const rows = splits[split];
      if (rows) return shuffledRows(rows, seed);
      const generate = data as (random: Random) => Row;
      // A stream a position; later attempts draw on where the one before stopped.
      let stream: { position: number; attempt: number; random: Random } | undefined;
      return generatedRows({
        split,
        fingerprint: JSON.stringify([name, generate.toString(), String(seed)]),
        draw: (position, attempt) => {
          if (!stream || stream.position !== position || stream.attempt !== attempt - 1) {
            stream = { position, attempt, random: new Random(seed, position) };
          }
          stream.attempt = attempt;
          return generate(stream.random);
        },
        identity: identityOf,
      });
    },
    read,
    load,
    ...(definition.reference && { reference: (row: Row) => definition.reference?.(row) as string }),
    ...(definition.demonstrate && { demonstrate: (row: Row) => definition.demonstrate?.(row) as string }),
    ...(definition.check && { check: definition.check }),
  };
}
