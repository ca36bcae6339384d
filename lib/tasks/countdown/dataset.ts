import { describeValue } from '../../errors.js';
import type { Fields } from '../rows.js';
import { type Puzzle, problemOf } from './solver.js';

/**
 * A row of the public data (Countdown-Tasks-3to4): columns `target` and `nums`, or `numbers` as its rewards
 * call them.
 *
 * @throws Error that names the column at fault
 */
export function parsePuzzle(fields: Fields): Puzzle {
  const column = fields.nums === undefined ? 'numbers' : 'nums';
  const list = fields[column];
  if (!Array.isArray(list)) {
    throw new Error(`Expected a list of numbers in column nums or numbers but found ${describeValue(list)}`);
  }
  const puzzle = {
    numbers: list.map((item) => numberIn(column, item)),
    target: numberIn('target', fields.target),
  };
  const problem = problemOf(puzzle);
  if (problem !== undefined) throw new Error(problem);
  return puzzle;
}

function numberIn(column: string, value: unknown): number {
  if (typeof value === 'number') return value;
  throw new Error(`Expected numbers in column ${column} but found ${describeValue(value)}`);
}
