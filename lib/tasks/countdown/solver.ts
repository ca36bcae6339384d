import { invalidArgument, MerfError } from '../../errors.js';
import type { Expression } from './expression.js';
import type { Operation } from './rational.js';

/** Whether an expression must use every given number, or may leave some out. No number is used twice. */
export type Use = 'exactly-once' | 'at-most-once';

export interface Puzzle {
  /** Positive whole numbers, equal ones among them or not. */
  readonly numbers: readonly number[];
  /** A positive whole number. */
  readonly target: number;
}

export interface Rules {
  readonly use: Use;
  readonly operations: readonly Operation[];
}

export const allOperations: readonly Operation[] = ['+', '-', '*', '/'];
/** More numbers than this are refused. */
export const maxNumbers = 6;

/**
 * What is wrong with a puzzle, undefined where nothing is. Besides counts and signs that is a bound: the product of
 * `target + 1` and every `number + 1` must not exceed 2^53, so that the solver is exact. Reason: of every value that can
 * be made from some numbers, written as a fraction that is never reduced, numerator plus denominator stay within the
 * product of `number + 1` over those numbers; this holds for a number alone and is kept by each operation.
 */
export function problemOf({ numbers, target }: Puzzle): string | undefined {
  if (numbers.length < 1 || numbers.length > maxNumbers) {
    return `Expected 1 to ${maxNumbers} numbers but found ${numbers.length}`;
  }
  const wrong = [...numbers, target].find((value) => !Number.isSafeInteger(value) || value < 1);
  if (wrong !== undefined) return `Expected positive whole numbers and target but found ${wrong}`;
  const bound = numbers.reduce((product, number) => product * (number + 1), target + 1);
  if (bound <= 2 ** 53) return undefined;
  return 'Expected numbers and a target whose product, each increased by 1, is at most 2^53 but found greater ones';
}

/**
 * An expression over the numbers with the target's value, undefined where there is none. One whose every intermediate
 * result is a positive whole number is preferred, and with `at-most-once` one of few numbers.
 *
 * The search is goal-directed. The values of every subset of up to three numbers are enumerated once. To reach a goal
 * from a larger set, it is divided in two: for each value of the smaller part and each operation, the larger part has
 * one value left that it must reach, which is the next goal, and which three numbers reach is one look-up.
 *
 * @throws MerfError INVALID_ARGUMENT for numbers that `problemOf` objects to
 */
export function solve(puzzle: Puzzle, rules: Rules): Expression | undefined {
  const problem = problemOf(puzzle);
  if (problem !== undefined) throw new MerfError('INVALID_ARGUMENT', problem);
  if (rules.operations.length === 0) throw invalidArgument('operations', 'at least one of + - * /', '');
  for (const wholeOnly of [true, false]) {
    const search = new Search(puzzle.numbers, rules.operations, wholeOnly);
    for (const subset of subsetsFor(puzzle.numbers.length, rules.use)) {
      const found = search.reach(subset, puzzle.target, 1);
      if (found) return found;
    }
  }
  return undefined;
}

/** Subsets as bit masks: all numbers, or every non-empty choice of them with the smallest first. */
function subsetsFor(count: number, use: Use): number[] {
  const all = (1 << count) - 1;
  if (use === 'exactly-once') return [all];
  return Array.from({ length: all }, (_, i) => i + 1).sort((a, b) => sizeOf(a) - sizeOf(b) || a - b);
}

function sizeOf(subset: number): number {
  let size = 0;
  for (let rest = subset; rest !== 0; rest &= rest - 1) size++;
  return size;
}

/** A value that a subset reaches, as a fraction that is not reduced, with a positive denominator. */
interface Value {
  readonly numerator: number;
  readonly denominator: number;
  readonly expression: Expression;
}

/** Values by their quotient in double precision; the few different fractions that share one stand in one list. */
type Table = Map<number, Value[]>;

/** Subsets of this size at most have tables. */
const tableSize = 3;

class Search {
  readonly #numbers: readonly number[];
  readonly #operations: ReadonlySet<Operation>;
  readonly #wholeOnly: boolean;
  readonly #tables = new Map<number, Table>();

  constructor(numbers: readonly number[], operations: readonly Operation[], wholeOnly: boolean) {
    this.#numbers = numbers;
    this.#operations = new Set(operations);
    this.#wholeOnly = wholeOnly;
  }

  /** An expression over exactly the numbers of `subset` with the value `numerator / denominator`. */
  reach(subset: number, numerator: number, denominator: number): Expression | undefined {
    const size = sizeOf(subset);
    if (size <= tableSize) return find(this.#table(subset), numerator, denominator)?.expression;
    for (const part of properParts(subset)) {
      const partSize = sizeOf(part);
      if (2 * partSize > size) continue;
      for (const values of this.#table(part).values()) {
        for (const value of values) {
          const found = this.#complete(subset ^ part, value, numerator, denominator);
          if (found) return found;
        }
      }
    }
    return undefined;
  }

  /** Joins `value` with an expression over `rest` so that the two make the goal n/d. */
  #complete(rest: number, value: Value, n: number, d: number): Expression | undefined {
    const { numerator: p, denominator: q, expression: known } = value;
    const join = (operation: Operation, a: number, b: number, knownFirst = false) => {
      if (!this.#operations.has(operation) || !this.#admits(a, b)) return undefined;
      const other = b < 0 ? this.reach(rest, -a, -b) : this.reach(rest, a, b);
      if (!other) return undefined;
      const [left, right] = knownFirst ? [known, other] : [other, known];
      return { kind: 'operation', operation, left, right } as const;
    };
    return (
      join('+', n * q - p * d, d * q) ??
      join('*', n * q, d * p) ??
      join('-', n * q + p * d, d * q) ??
      join('-', p * d - n * q, d * q, true) ??
      (p === 0 ? undefined : join('/', n * p, d * q)) ??
      (n === 0 || p === 0 ? undefined : join('/', p * d, q * n, true))
    );
  }

  /** Whether a fraction may be an intermediate result. */
  #admits(numerator: number, denominator: number): boolean {
    if (denominator === 0) return false;
    return !this.#wholeOnly || (numerator % denominator === 0 && numerator / denominator > 0);
  }

  #table(subset: number): Table {
    let table = this.#tables.get(subset);
    if (!table) {
      table = this.#enumerate(subset);
      this.#tables.set(subset, table);
    }
    return table;
  }

  #enumerate(subset: number): Table {
    const table: Table = new Map();
    if (sizeOf(subset) === 1) {
      const number = this.#numbers[Math.log2(subset)] as number;
      add(table, { numerator: number, denominator: 1, expression: { kind: 'number', value: number } });
      return table;
    }
    for (const part of properParts(subset)) {
      for (const left of [...this.#table(part).values()].flat()) {
        for (const right of [...this.#table(subset ^ part).values()].flat()) {
          this.#combine(table, left, right, part < (subset ^ part));
        }
      }
    }
    return table;
  }

  /** Adds what each operation makes of two values; the commutative ones of one order alone. */
  #combine(table: Table, left: Value, right: Value, commutative: boolean): void {
    const { numerator: a, denominator: b, expression: first } = left;
    const { numerator: c, denominator: d, expression: second } = right;
    const put = (operation: Operation, numerator: number, denominator: number) => {
      if (!this.#operations.has(operation) || !this.#admits(numerator, denominator)) return;
      const expression = { kind: 'operation', operation, left: first, right: second } as const;
      const sign = denominator < 0 ? -1 : 1;
      add(table, { numerator: sign * numerator, denominator: sign * denominator, expression });
    };
    if (commutative) {
      put('+', a * d + c * b, b * d);
      put('*', a * c, b * d);
    }
    put('-', a * d - c * b, b * d);
    put('/', a * d, b * c);
  }
}

function add(table: Table, value: Value): void {
  const key = value.numerator / value.denominator;
  const values = table.get(key);
  if (!values) table.set(key, [value]);
  else if (!values.some((known) => same(known, value.numerator, value.denominator))) values.push(value);
}

function find(table: Table, numerator: number, denominator: number): Value | undefined {
  return table.get(numerator / denominator)?.find((value) => same(value, numerator, denominator));
}

function same(value: Value, numerator: number, denominator: number): boolean {
  const left = value.numerator * denominator;
  const right = numerator * value.denominator;
  if (Math.abs(left) < 2 ** 53 && Math.abs(right) < 2 ** 53) return left === right;
  return BigInt(value.numerator) * BigInt(denominator) === BigInt(numerator) * BigInt(value.denominator);
}

/** Every part of a subset but none and all. */
function* properParts(subset: number): Generator<number> {
  for (let part = (subset - 1) & subset; part !== 0; part = (part - 1) & subset) yield part;
}
