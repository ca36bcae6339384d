import { RewardSpec } from '../../reward/spec.js';
import { thinkAndAnswerFormat } from '../tags.js';
import { readExpression } from './expression.js';
import { equals, type Operation, whole } from './rational.js';
import type { Puzzle, Rules, Use } from './solver.js';

export type Verdict = 'right' | 'wrong-value' | 'wrong-numbers' | 'unreadable';

/**
 * How an answer turns out. Numbers come before the value: an expression that reaches the target with numbers
 * that are not given, or with one used too often, is `wrong-numbers`. An "= …" behind it that does not hold
 * is `wrong-value`.
 */
export function judgeAnswer(answer: string, puzzle: Puzzle, rules: Rules): Verdict {
  const reading = readExpression(answer);
  if (!reading) return 'unreadable';
  if ([...reading.operations].some((operation) => !rules.operations.includes(operation))) return 'unreadable';
  if (!usesNumbers(reading.numbers, puzzle.numbers, rules.use)) return 'wrong-numbers';
  return reading.equationHolds && equals(reading.value, whole(puzzle.target)) ? 'right' : 'wrong-value';
}

function usesNumbers(used: readonly bigint[], given: readonly number[], use: Use): boolean {
  const left = new Map<bigint, number>();
  for (const number of given) left.set(BigInt(number), (left.get(BigInt(number)) ?? 0) + 1);
  for (const number of used) {
    const count = left.get(number) ?? 0;
    if (count === 0) return false;
    left.set(number, count - 1);
  }
  return use === 'at-most-once' || used.length === given.length;
}

/** How the rule for the numbers reads in a prompt. */
export const usePhrases: Readonly<Record<Use, string>> = {
  'exactly-once': 'every given number exactly once',
  'at-most-once': 'given numbers only, each at most once',
};

/** Lists operations as in "+, -, * and /". */
export function listOperations(operations: readonly Operation[]): string {
  return operations.length < 2
    ? operations.join('')
    : `${operations.slice(0, -1).join(', ')} and ${operations[operations.length - 1]}`;
}

/**
 * The reward of CountDown: format and correctness with the scores of the MeRF paper's knights and knaves
 * (arXiv 2506.18485). The public reward for the same data (TinyZero's `countdown.py`) distinguishes the same
 * outcomes, but gives 1, 0.1 and 0, and evaluates in floating point.
 */
export function countdownReward(rules: Rules): RewardSpec<Puzzle> {
  const phrase = usePhrases[rules.use];
  const operations = listOperations(rules.operations);
  return new RewardSpec<Puzzle>({
    name: 'countdown',
    components: [
      thinkAndAnswerFormat,
      {
        name: 'correctness',
        cases: [
          { name: 'right', score: 2, sentence: `if the answer uses ${phrase} and its value is the target` },
          {
            name: 'wrong-value',
            score: -1.5,
            sentence: `if the answer uses ${phrase}, but its value is not the target`,
          },
          {
            name: 'wrong-numbers',
            score: -1.5,
            sentence: `if the answer can be read, but does not use ${phrase}, whatever its value`,
          },
          {
            name: 'unreadable',
            score: -2,
            sentence:
              'if the answer cannot be read: it must be one expression of whole numbers, parentheses and ' +
              `${operations}, and have a value`,
          },
        ],
        verify: (completion, row) => judgeAnswer(completion.answer ?? '', row, rules),
      },
    ],
  });
}
