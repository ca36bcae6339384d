import { invalidArgument } from '../../errors.js';
import { withMotivation } from '../../prompt/motivation.js';
import { generatedRows, loadSplits, maxDraws, readRows, requireRows, shuffledRows } from '../dataset.js';
import { Random } from '../random.js';
import type { ChatMessage, RowSource, Split, Task } from '../task.js';
import { type KnightsAndKnavesRow, parsePublishedRow } from './dataset.js';
import { generatePuzzle } from './generator.js';
import { answerLines, reasoning } from './reasoning.js';
import { knightsAndKnavesReward } from './reward.js';
import { solve } from './solver.js';

export interface KnightsAndKnavesOptions {
  /** How many people: a number, several, or words such as "3", "3-7" or "2,4" (default 2). From 2 to 8. */
  readonly people?: number | readonly number[] | string;
  /** How deep the claims of generated puzzles nest (default 1, as in the published ones). */
  readonly depth?: number;
  /** A .parquet or .jsonl file in the published layout, instead of generated puzzles. */
  readonly data?: string;
  /** Its test rows (default: one row in eight of `data`, by a hash of the row). */
  readonly testData?: string;
}

/** The system message without a motivation. */
export const knightsAndKnavesInstruction =
  'Find out who is a knight and who is a knave. First think between <think> and </think>. Then answer between ' +
  '<answer> and </answer>, one line for each person in the order in which they are introduced, like this:\n' +
  '<think>\nyour reasoning\n</think>\n<answer>\n(1) Zoey is a knight\n(2) ...\n</answer>';

/**
 * Knights and knaves: every inhabitant of an island either always tells the truth or always lies; from what they
 * say, find out who is what.
 *
 * @throws MerfError INVALID_ARGUMENT
 */
export async function knightsAndKnaves(
  options: KnightsAndKnavesOptions = {},
): Promise<Task<KnightsAndKnavesRow>> {
  const people = parsePeople(options.people ?? 2);
  const depth = parseDepth(options.depth ?? 1);
  const read = (file: string) => readRows(file, parsePublishedRow);
  const load = async (file: string) => requireRows(await read(file));
  const splits = await loadSplits(options, load, puzzleIdentity);
  return {
    name: 'knights-and-knaves',
    spec: knightsAndKnavesReward,
    messages: (row, motivation) =>
      withMotivation<ChatMessage>(
        [
          { role: 'system', content: knightsAndKnavesInstruction },
          { role: 'user', content: row.quiz },
        ],
        knightsAndKnavesReward.describe(motivation),
      ),
    rows({ split, seed }) {
      const rows = splits[split];
      return rows ? shuffledRows(rows, seed) : puzzles({ people, depth, split, seed });
    },
    read,
    load,
    reference: (row) => completionOf('', row.answer ?? answerLines(row.names, row.solution)),
    demonstrate: (row) => completionOf(reasoning(row), answerLines(row.names, row.solution)),
    check: { name: 'solver agrees', find: checkSolution },
  };
}

function puzzles(options: {
  people: readonly number[];
  depth: number;
  split: Split;
  seed: number | bigint;
}): RowSource<KnightsAndKnavesRow> {
  const { people, depth, split, seed } = options;
  return generatedRows({
    split,
    fingerprint: JSON.stringify(['knights-and-knaves', people, depth, String(seed)]),
    draw: (position, attempt) => {
      const count = new Random(seed, position).pick(people);
      return generatePuzzle({ people: count, depth, seed, index: position * maxDraws + attempt });
    },
    identity: puzzleIdentity,
  });
}

/** Puzzles with the same claims are the same puzzle, whatever the names and the wording. */
function puzzleIdentity(row: KnightsAndKnavesRow): string {
  return JSON.stringify(row.statements);
}

function completionOf(thinking: string, answer: string): string {
  return `<think>\n${thinking}\n</think>\n<answer>\n${answer}\n</answer>`;
}

function checkSolution(row: KnightsAndKnavesRow): string | undefined {
  const solutions = solve(row.statements, 2);
  const [found] = solutions;
  if (solutions.length !== 1 || !found) {
    return `the statements have ${solutions.length === 0 ? 'no solution' : 'more than one solution'}`;
  }
  const differs = found.findIndex((isKnight, i) => isKnight !== row.solution[i]);
  if (differs < 0) return undefined;
  const role = found[differs] ? 'knight' : 'knave';
  return `the solver finds that ${row.names[differs]} is a ${role}, the published solution says otherwise`;
}

function parsePeople(people: number | readonly number[] | string): number[] {
  const fail = () => invalidArgument('people', 'numbers from 2 to 8, such as 3, "3-7" or "2,4",', people);
  let counts: number[];
  if (typeof people === 'number') counts = [people];
  else if (typeof people === 'string') {
    counts = people.split(',').flatMap((part) => {
      const match = /^\s*(\d+)\s*(?:-\s*(\d+)\s*)?$/.exec(part);
      if (!match) throw fail();
      const first = Number(match[1]);
      const last = Number(match[2] ?? match[1]);
      if (last > 8 || last < first) throw fail();
      return Array.from({ length: last - first + 1 }, (_, i) => first + i);
    });
  } else if (Array.isArray(people)) counts = [...people];
  else throw fail();
  if (counts.length === 0 || counts.some((n) => !Number.isInteger(n) || n < 2 || n > 8)) throw fail();
  return [...new Set(counts)].sort((a, b) => a - b);
}

function parseDepth(depth: number): number {
  if (!Number.isInteger(depth) || depth < 1 || depth > 4)
    throw invalidArgument('depth', 'an integer from 1 to 4', depth);
  return depth;
}
