import { Random } from '../random.js';
import type { Assignment, Expression } from './expression.js';
import { Arithmetic, rational, type Value } from './value.js';

/** Significant digits of values that are not exact, and of the second look where they are tiny. */
const digits = 60;
const manyDigits = 200;

const arithmetics = new Map<string, Arithmetic>();

function arithmeticOf(precision: number, isComplex: boolean): Arithmetic {
  const key = `${precision} ${isComplex}`;
  let arithmetic = arithmetics.get(key);
  if (!arithmetic) {
    arithmetic = new Arithmetic(precision, isComplex);
    arithmetics.set(key, arithmetic);
  }
  return arithmetic;
}

/** What a point says: that the claim holds or fails there, or nothing. */
type Verdict = boolean | undefined;
type Judge = (values: readonly Value[], arithmetic: Arithmetic, assignment: Assignment) => Verdict;

/**
 * Whether two expressions have the same values: exactly for rational ones, else to 40 digits, at random
 * points where there are variables. Variables are real, and points count where both sides have a value, which
 * is a complex one where the imaginary unit occurs or too few real ones exist. False where nothing can be
 * decided.
 *
 * @param tolerance largest relative difference of constants that counts as none
 */
export function haveSameValues(left: Expression, right: Expression, tolerance = 0): boolean {
  return sample([left, right], ([a, b], arithmetic, assignment) => {
    const close = areClose(a as Value, b as Value, arithmetic);
    if (close === true || close === 'tiny') {
      if (close === true) return true;
      return again(left, right, arithmetic, assignment);
    }
    if (tolerance > 0 && assignment.size === 0) {
      const difference = arithmetic.subtract(a, b);
      const limit = arithmetic.magnitude(b as Value).times(tolerance);
      return difference !== undefined && arithmetic.magnitude(difference).lte(limit);
    }
    return close;
  });
}

/**
 * Whether two relations, each given by its two sides, say the same: their differences of sides are in one
 * ratio, whatever the variables are, and for inequalities a positive one.
 */
export function areProportional(
  left: readonly [Expression, Expression],
  right: readonly [Expression, Expression],
  isDirected: boolean,
): boolean {
  if (![...left, ...right].some((side) => side.variables.size > 0)) return false;
  let ratio: Value | undefined;
  return sample([...left, ...right], ([a, b, c, d], arithmetic) => {
    const first = difference(a as Value, b as Value, arithmetic);
    const second = difference(c as Value, d as Value, arithmetic);
    if (!first || !second) return undefined;
    if (arithmetic.isZero(first) || arithmetic.isZero(second)) {
      return arithmetic.isZero(first) && arithmetic.isZero(second) ? undefined : false;
    }
    const here = arithmetic.divide(first, second);
    if (!here) return undefined;
    if (isDirected && arithmetic.compare(here, rational(0n)) !== 1) return false;
    ratio ??= here;
    return areClose(here, ratio, arithmetic) === true;
  });
}

/** Less than, equal or greater as numbers compare; undefined for what is no real constant. */
export function orderOf(left: Expression, right: Expression): number | undefined {
  if (left.variables.size > 0 || right.variables.size > 0) return undefined;
  const arithmetic = arithmeticOf(digits, false);
  return arithmetic.compare(left.evaluate(arithmetic, new Map()), right.evaluate(arithmetic, new Map()));
}

/** Whether there is a value at all, at some point. */
export function hasValue(expression: Expression): boolean {
  return sample([expression], () => true, 1);
}

/** How many points must agree where there are variables, and how many are enough. */
const least = 3;
const enough = 5;

function sample(expressions: readonly Expression[], judge: Judge, needed = least): boolean {
  const modes = expressions.some((expression) => expression.isComplex) ? [true] : [false, true];
  const variables = [...new Set(expressions.flatMap((expression) => [...expression.variables]))].sort();
  for (const isComplex of modes) {
    const arithmetic = arithmeticOf(digits, isComplex);
    let agreed = 0;
    for (const assignment of pointsFor(variables)) {
      const values: Value[] = [];
      for (const expression of expressions) {
        const value = expression.evaluate(arithmetic, assignment);
        if (value) values.push(value);
      }
      if (values.length < expressions.length) continue;
      const verdict = judge(values, arithmetic, assignment);
      if (verdict === false) return false;
      if (verdict === true && ++agreed >= enough) return true;
    }
    if (agreed >= (variables.length === 0 ? 1 : needed)) return true;
  }
  return false;
}

/**
 * Numbers of several kinds: of either sign, positive, between 0 and 1, whole. The denominators are odd, so
 * that powers of negative numbers have real values.
 */
const kinds: readonly ((random: Random) => Value)[] = [
  (random) => rational(BigInt(random.below(195) - 97), random.pick([3n, 7n, 11n, 13n])),
  (random) => rational(BigInt(1 + random.below(97)), random.pick([3n, 7n, 11n, 13n])),
  (random) => rational(BigInt(1 + random.below(96)), 97n),
  (random) => rational(BigInt(1 + random.below(12))),
];
const order = [0, 1, 0, 2, 1, 0, 3, 3, 2, 1, 3, 3, 0, 2];

const none: readonly Assignment[] = [new Map()];

function* pointsFor(variables: readonly string[]): Iterable<Assignment> {
  if (variables.length === 0) return yield* none;
  for (const [stream, kind] of order.entries()) {
    const random = new Random(271_828, stream);
    const draw = kinds[kind] as (random: Random) => Value;
    yield new Map(variables.map((variable) => [variable, draw(random)]));
  }
}

/** `tiny` where both are so small that only more digits tell them from 0 and each other. */
function areClose(a: Value, b: Value, arithmetic: Arithmetic): Verdict | 'tiny' {
  if (a.kind === 'rational' && b.kind === 'rational') return arithmetic.compare(a, b) === 0;
  const difference = arithmetic.subtract(a, b);
  if (!difference) return undefined;
  const [x, y] = [arithmetic.magnitude(a), arithmetic.magnitude(b)];
  const larger = x.gt(y) ? x : y;
  if (larger.lt(1e-30)) return 'tiny';
  const isClose = arithmetic.magnitude(difference).lte(larger.times(1e-40));
  // Whole units of larger numbers than this are lost: equal digits prove nothing.
  return isClose && larger.gt(1e35) ? undefined : isClose;
}

function again(left: Expression, right: Expression, arithmetic: Arithmetic, assignment: Assignment): Verdict {
  const precise = arithmeticOf(manyDigits, arithmetic.isComplex);
  const [a, b] = [left.evaluate(precise, assignment), right.evaluate(precise, assignment)];
  if (!a || !b) return undefined;
  const [x, y] = [precise.magnitude(a), precise.magnitude(b)];
  if (x.lt(1e-150) && y.lt(1e-150)) return true;
  const difference = precise.subtract(a, b);
  return difference && precise.magnitude(difference).lte((x.gt(y) ? x : y).times(1e-40));
}

/** The difference of two sides, exactly 0 where they agree in all the digits that they have. */
function difference(a: Value, b: Value, arithmetic: Arithmetic): Value | undefined {
  const result = arithmetic.subtract(a, b);
  if (!result || result.kind === 'rational') return result;
  const [x, y] = [arithmetic.magnitude(a), arithmetic.magnitude(b)];
  return arithmetic.magnitude(result).lte((x.gt(y) ? x : y).times(1e-50)) ? rational(0n) : result;
}
