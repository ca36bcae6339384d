import { MerfError } from '../../errors.js';
import type { Random } from '../random.js';
import type { Operation } from './rational.js';
import type { Puzzle } from './solver.js';

export interface GeneratorOptions {
  /** How many numbers a puzzle has; one of these, each as likely as the others. */
  readonly counts: readonly number[];
  /** Numbers are from 1 to this. */
  readonly largestNumber: number;
  /** Targets are from 1 to this. */
  readonly largestTarget: number;
  readonly operations: readonly Operation[];
}

/** How often a puzzle is drawn before the options count as impossible. */
const maxDraws = 100_000;
/** Greater intermediate results are given up. */
const largestResult = 1e9;

/**
 * A puzzle with a solution that uses every number once and whose every step is a positive whole number: numbers are
 * drawn, then joined two by two by random operations, and what comes out is the target where it is small enough and none
 * of the numbers. A division by 1 and a multiplication by 1 join nothing.
 *
 * @throws MerfError INVALID_ARGUMENT where the options leave too few puzzles to find one
 */
export function drawPuzzle(random: Random, options: GeneratorOptions): Puzzle {
  const { counts, largestNumber, largestTarget, operations } = options;
  const count = random.pick(counts);
  for (let draw = 0; draw < maxDraws; draw++) {
    const numbers = Array.from({ length: count }, () => 1 + random.below(largestNumber));
    const target = joinAll(random, numbers, operations);
    if (target === undefined || target > largestTarget || numbers.includes(target)) continue;
    return { numbers, target };
  }
  throw new MerfError(
    'INVALID_ARGUMENT',
    `Found no puzzle of ${count} numbers up to ${largestNumber} with ${operations.join(' ')} and a target up to ` +
      `${largestTarget} in ${maxDraws} draws`,
  );
}

function joinAll(random: Random, numbers: readonly number[], operations: readonly Operation[]) {
  const values = random.shuffle(numbers);
  while (values.length > 1) {
    const [a, b] = values.splice(random.below(values.length - 1), 2) as [number, number];
    const joined = join(random.pick(operations), Math.max(a, b), Math.min(a, b));
    if (joined === undefined) return undefined;
    values.splice(random.below(values.length + 1), 0, joined);
  }
  return values[0];
}

function join(operation: Operation, greater: number, lesser: number): number | undefined {
  if (operation === '+') return within(greater + lesser);
  if (operation === '-') return greater > lesser ? greater - lesser : undefined;
  if (lesser === 1) return undefined;
  if (operation === '*') return within(greater * lesser);
  return greater % lesser === 0 ? greater / lesser : undefined;
}

function within(value: number): number | undefined {
  return value <= largestResult ? value : undefined;
}
