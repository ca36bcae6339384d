import * as z from 'zod';
import { countsOption } from '../counts.js';
import { type DataOptions, defineTask, type TaskParts } from '../define.js';
import { Random } from '../random.js';
import { maxDraws } from '../rows.js';
import { thinkAndAnswerText } from '../tags.js';
import { canonicalForm, maxTablePeople } from './canonical.js';
import { type KnightsAndKnavesRow, parsePublishedRow } from './dataset.js';
import { generatePuzzle } from './generator.js';
import { answerLines, reasoning } from './reasoning.js';
import { knightsAndKnavesReward } from './reward.js';
import { solve } from './solver.js';

const peopleExpected = 'expected numbers from 2 to 8, such as 3, "3-7" or "2,4"';

const people = countsOption(2, 8, peopleExpected);

const options = {
  people: people
    .prefault(2)
    .meta({ description: 'how many people, from 2 to 8, such as 3, 3-7 or 2,4 (default: 2)' }),
  depth: z
    .int()
    .min(1)
    .max(4)
    .default(1)
    .meta({ description: 'how deep the claims of generated puzzles nest, 1 to 4; published ones have 1' }),
};

export type KnightsAndKnavesOptions = z.input<z.ZodObject<typeof options>> & DataOptions;

/** The system message without a motivation. */
export const knightsAndKnavesInstruction =
  'Find out who is a knight and who is a knave. First think between <think> and </think>. Then answer between ' +
  '<answer> and </answer>, one line for each person in the order in which they are introduced, like this:\n' +
  '<think>\nyour reasoning\n</think>\n<answer>\n(1) Zoey is a knight\n(2) ...\n</answer>';

/**
 * Knights and knaves: every inhabitant of an island either always tells the truth or always lies; from what they
 * say, find out who is what.
 */
export const knightsAndKnaves = defineTask({
  name: 'knights-and-knaves',
  summary: 'puzzles about who always lies and who never does, generated or as published',
  options,
  create: ({ people, depth }): TaskParts<KnightsAndKnavesRow> => ({
    spec: knightsAndKnavesReward,
    messages: (row) => [
      { role: 'system', content: knightsAndKnavesInstruction },
      { role: 'user', content: row.quiz },
    ],
    data: (_, { seed, position, attempt }) => {
      const count = new Random(seed, position).pick(people);
      return generatePuzzle({ people: count, depth, seed, index: position * maxDraws + attempt });
    },
    parse: parsePublishedRow,
    identity: puzzleIdentity,
    reference: (row) => thinkAndAnswerText('', row.answer ?? answerLines(row.names, row.solution)),
    demonstrate: (row, random) =>
      thinkAndAnswerText(reasoning(row, random), answerLines(row.names, row.solution)),
    check: { name: 'solver agrees', find: checkSolution },
  }),
});

/**
 * Puzzles whose truth tables agree up to the order of people are the same puzzle, whatever the names and the
 * wording. For more people than truth tables are made for, the claims as they stand must agree.
 */
function puzzleIdentity({ statements }: KnightsAndKnavesRow): string {
  return statements.length <= maxTablePeople ? canonicalForm(statements) : JSON.stringify(statements);
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
