import * as z from 'zod';
import { MerfError } from '../../errors.js';
import { countsOption } from '../counts.js';
import { type DataOptions, defineTask, type TaskParts } from '../define.js';
import { thinkAndAnswerText } from '../tags.js';
import { parsePuzzle } from './dataset.js';
import { formatExpression } from './expression.js';
import { drawPuzzle } from './generator.js';
import type { Operation } from './rational.js';
import { workedSolution } from './reasoning.js';
import { countdownReward, listOperations, usePhrases } from './reward.js';
import { allOperations, maxNumbers, type Puzzle, problemOf, type Rules, solve } from './solver.js';

const numbersExpected = `expected numbers from 2 to ${maxNumbers}, such as 3 or "3-4"`;

const numbers = countsOption(2, maxNumbers, numbersExpected);

const operationsExpected = 'expected some of + - * /, such as "+-*"';

const operations = z
  .union([z.string(), z.array(z.string())], operationsExpected)
  .transform((given, context) => {
    const signs = typeof given === 'string' ? [...given.replace(/[\s,]/g, '')] : given;
    if (signs.length > 0 && signs.every((sign) => allOperations.includes(sign as Operation))) {
      return allOperations.filter((operation) => signs.includes(operation));
    }
    context.addIssue({ code: 'custom', message: operationsExpected });
    return z.NEVER;
  });

const options = {
  numbers: numbers.prefault('3-4').meta({
    description: `how many numbers a generated puzzle has, from 2 to ${maxNumbers}, such as 3 or 3-4`,
  }),
  largestNumber: z.int().min(1).max(100_000).default(100).meta({
    description: 'the largest number of generated puzzles',
  }),
  largestTarget: z.int().min(1).max(1_000_000).default(100).meta({
    description: 'the largest target of generated puzzles',
  }),
  use: z.enum(['exactly-once', 'at-most-once']).default('exactly-once').meta({
    description: 'whether every number must be used',
  }),
  operations: operations.prefault('+-*/').meta({ description: 'the operations that are allowed' }),
};

export type CountdownOptions = z.input<z.ZodObject<typeof options>> & DataOptions;

/**
 * CountDown: reach a target with given numbers, by + - * / and parentheses. Generated puzzles have a solution
 * that uses every number; files have the columns of the public data, Countdown-Tasks-3to4: `target` and
 * `nums`.
 *
 * Each number is to be used exactly once by default. So has it TinyZero, which published that data: the
 * prompt of its `countdown.py` says that "each number can only be used once", and its reward compares the
 * sorted numbers of the equation with all the given ones.
 */
export const countdown = defineTask({
  name: 'countdown',
  summary: 'reach a target number from given numbers by arithmetic',
  options,
  create(chosen): TaskParts<Puzzle> {
    const rules: Rules = { use: chosen.use, operations: chosen.operations };
    const settings = {
      counts: chosen.numbers,
      largestNumber: chosen.largestNumber,
      largestTarget: chosen.largestTarget,
      operations: chosen.operations,
    };
    requireSolvable(settings);
    const instruction = instructionFor(rules);
    return {
      spec: countdownReward(rules),
      messages: (row) => [
        { role: 'system', content: instruction },
        { role: 'user', content: `Numbers: ${row.numbers.join(', ')}\nTarget: ${row.target}` },
      ],
      data: (random) => drawPuzzle(random, settings),
      parse: parsePuzzle,
      identity: puzzleIdentity,
      reference: (row) => thinkAndAnswerText('', formatExpression(solutionOf(row, rules))),
      demonstrate: (row) => {
        const { lines, solution } = workedSolution(row, rules, solutionOf(row, rules));
        return thinkAndAnswerText(lines.join('\n'), formatExpression(solution));
      },
      check: {
        name: 'solver finds one',
        find: (row) => (solve(row, rules) ? undefined : problemWithout(row, rules)),
      },
    };
  },
});

/** The system message without a motivation. */
export function instructionFor(rules: Rules): string {
  const [first] = rules.operations as [Operation];
  const last = rules.operations.at(-1) as Operation;
  return (
    `Reach the target with the given numbers: use ${usePhrases[rules.use]}, with ` +
    `${listOperations(rules.operations)} and parentheses. First think between <think> and </think>. Then ` +
    'answer between <answer> and </answer> with one expression, like this:\n' +
    `<think>\nyour reasoning\n</think>\n<answer>\n(8 ${first} 4) ${last} 2\n</answer>`
  );
}

/**
 * The greatest numbers and target must be ones that the solver takes, so that every smaller puzzle is too.
 */
function requireSolvable(settings: {
  counts: readonly number[];
  largestNumber: number;
  largestTarget: number;
}) {
  const { counts, largestNumber, largestTarget } = settings;
  const count = Math.max(...counts);
  const greatest = new Array<number>(count).fill(largestNumber);
  if (problemOf({ numbers: greatest, target: largestTarget }) === undefined) return;
  throw new MerfError(
    'INVALID_ARGUMENT',
    'Expected a smaller largestNumber, largestTarget or count of numbers for the task countdown: ' +
      `${count} numbers up to ${largestNumber} with a target up to ${largestTarget} are too much to be ` +
      'solved exactly',
  );
}

function solutionOf(row: Puzzle, rules: Rules) {
  const solution = solve(row, rules);
  if (!solution) throw new MerfError('INVALID_ARGUMENT', problemWithout(row, rules));
  return solution;
}

function problemWithout(row: Puzzle, rules: Rules): string {
  return `the numbers ${row.numbers.join(', ')} do not reach ${row.target}, ${usePhrases[rules.use]}`;
}

/** Puzzles with the same numbers and target are the same puzzle, whatever the order. */
function puzzleIdentity({ numbers, target }: Puzzle): string {
  return JSON.stringify([[...numbers].sort((a, b) => a - b), target]);
}
