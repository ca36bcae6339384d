import {
  type Answer,
  isName,
  orderOperators,
  parseAnswer,
  type Quantity,
  type Relation,
  reversed,
  type Tuple,
} from './answer.js';
import { choiceOf, compareChoices } from './choice.js';
import { constant, type Expression, loadParser, parserNeeded, readExpression } from './expression.js';
import { type Interval, intervalsOf, isOrder, variableOf } from './intervals.js';
import { hasCommaThousands, type Token, tokenize, Unreadable } from './latex.js';
import { areProportional, hasValue, haveSameValues, orderOf } from './sampling.js';
import { rational, renewBudget, TooMuchWork } from './value.js';

export interface EquivalenceOptions {
  /**
   * Largest relative difference of two constants that counts as none, such as 1e-4 for answers that may be
   * rounded (default 0: a rounded decimal is another number than the fraction that it approximates).
   */
  readonly tolerance?: number;
}

/**
 * Whether an answer says the same as the reference: numbers in any notation, expressions with equal values,
 * equations and inequalities that say the same, sets and lists in any order, tuples and matrices entry by
 * entry, intervals, multiple choice, words. Units and percent signs may be left out; where both are there
 * they must agree. Nothing is run and nothing is rounded. False where nothing decides.
 *
 * @param answer LaTeX or plain text, as `extractAnswer` gives it
 * @param reference the known answer
 */
export async function areEquivalent(
  answer: string,
  reference: string,
  options: EquivalenceOptions = {},
): Promise<boolean> {
  try {
    return compare(answer, reference, options);
  } catch (error) {
    if (error !== parserNeeded) throw error;
    await loadParser();
    return compare(answer, reference, options);
  }
}

/** Microseconds, roughly, that the arithmetic of one comparison may take. */
const maxWork = 300_000;

/** Why a reference cannot be read as an answer; undefined where it can. */
export async function whyUnreadable(reference: string): Promise<string | undefined> {
  if (choiceOf(reference)) return undefined;
  await loadParser();
  renewBudget(maxWork);
  let reason: string | undefined;
  for (const joinThousands of [true, false]) {
    try {
      check(parseAnswer(tokenize(reference, joinThousands)));
      return undefined;
    } catch (error) {
      if (!(error instanceof Unreadable || error instanceof TooMuchWork)) throw error;
      reason ??= error.message;
    }
  }
  return reason;
}

/** @throws Unreadable for an expression in the answer that has no value */
function check(answer: Answer): void {
  if (answer.kind === 'words') return;
  if (answer.kind === 'matrix') answer.rows.flat().forEach(check);
  else if (answer.kind === 'relation') answer.sides.forEach(check);
  else if (answer.kind === 'union') answer.parts.forEach(check);
  else if (answer.kind !== 'quantity') answer.items.forEach(check);
  else if (!isSpecial(answer.body) && answer.base === undefined) {
    if (!hasValue(readExpression(answer.body))) throw new Unreadable('the expression has no value');
  }
}

function compare(answer: string, reference: string, options: EquivalenceOptions): boolean {
  const [given, wanted] = [answer.trim(), reference.trim()];
  if (given === '' || wanted === '') return false;
  if (given === wanted) return true;
  const verdict = compareChoices(given, wanted);
  if (verdict !== undefined) return verdict;
  // Commas may part thousands or the items of a list; either reading will do where it fits the other answer.
  const comparison = new Comparison(options.tolerance ?? 0);
  renewBudget(maxWork);
  try {
    const readings = readingsOf(given);
    return readingsOf(wanted).some((right) => readings.some((left) => comparison.same(left, right)));
  } catch (error) {
    // An overflow of the stack or of a number's size is too much work as well.
    if (error instanceof TooMuchWork || error instanceof RangeError) return false;
    throw error;
  }
}

function readingsOf(text: string): Answer[] {
  const readings: Answer[] = [];
  for (const joinThousands of hasCommaThousands(text) ? [true, false] : [false]) {
    try {
      readings.push(parseAnswer(tokenize(text, joinThousands)));
    } catch (error) {
      // What cannot be read is equal to nothing but itself.
      if (!(error instanceof Unreadable)) throw error;
    }
  }
  return readings;
}

/** Items of unordered collections beyond this number are compared in their order alone. */
const maxUnordered = 24;

class Comparison {
  readonly #tolerance: number;

  constructor(tolerance: number) {
    this.#tolerance = tolerance;
  }

  /** @param a the answer @param b the reference */
  same(a: Answer, b: Answer): boolean {
    if (a.source === b.source) return true;
    if (a.kind === 'words' || b.kind === 'words') return textOf(a) === textOf(b);
    const [left, right] = withoutNames(a, b);
    if (left !== a || right !== b) return this.same(left, right);
    if (isReals(a) || isReals(b) || isEmpty(a) || isEmpty(b)) return this.#sameSpecialSets(a, b);
    if (this.#areRegions(a, b)) return this.#sameRegions(a, b);
    if (a.kind === 'relation' || b.kind === 'relation') {
      return a.kind === 'relation' && b.kind === 'relation' && this.#sameRelations(a, b);
    }
    if (a.kind === 'matrix' || b.kind === 'matrix') return this.#sameMatrices(a, b);
    if (a.kind === 'quantity' && b.kind === 'quantity') return this.#sameQuantities(a, b);
    return this.#sameCollections(a, b);
  }

  #sameSpecialSets(a: Answer, b: Answer): boolean {
    if (isEmpty(a) || isEmpty(b)) return isEmpty(a) && isEmpty(b);
    const isAll = (answer: Answer) => {
      if (isReals(answer)) return true;
      const [interval, ...others] = intervalsOf(answer) ?? [];
      return others.length === 0 && interval?.low.source === '- \\infty' && isInfinity(interval.high);
    };
    return isAll(a) && isAll(b);
  }

  /** Whether both are sets of real numbers and one is written as only a set can be. */
  #areRegions(a: Answer, b: Answer): boolean {
    const isRegion = (answer: Answer) =>
      answer.kind === 'union' ||
      (answer.kind === 'tuple' && (answer.open === '[' || answer.close === ']')) ||
      (answer.kind === 'relation' && answer.operators.every((operator) => orderOperators.has(operator))) ||
      (answer.kind === 'list' && answer.items.every((item) => item.kind === 'relation' && isOrder(item)));
    return (isRegion(a) || isRegion(b)) && intervalsOf(a) !== undefined && intervalsOf(b) !== undefined;
  }

  #sameRegions(a: Answer, b: Answer): boolean {
    const [left, right] = [intervalsOf(a) as Interval[], intervalsOf(b) as Interval[]];
    if (variableOf(a) && variableOf(b) && variableOf(a) !== variableOf(b)) return false;
    return this.#sameInAnyOrder(
      left,
      right,
      (x, y) =>
        x.isLowClosed === y.isLowClosed &&
        x.isHighClosed === y.isHighClosed &&
        this.same(x.low, y.low) &&
        this.same(x.high, y.high),
    );
  }

  #sameRelations(a: Relation, b: Relation): boolean {
    const [left, right] = [shortened(a), shortened(b)];
    if (left.sides.length !== right.sides.length) return false;
    if (left.sides.length > 2) {
      return [right, reversed(right)].some(
        (other) =>
          left.operators.join() === other.operators.join() &&
          left.sides.every((side, i) => this.same(side, other.sides[i] as Answer)),
      );
    }
    const [operator] = left.operators as [string];
    const sidesMatch = (other: Relation) =>
      operator === other.operators[0] &&
      left.sides.every((side, i) => this.same(side, other.sides[i] as Answer));
    if (sidesMatch(right) || sidesMatch(reversed(right))) return true;
    const isDirected = orderOperators.has(operator);
    if (!isDirected && operator !== '=' && operator !== '\\ne') return false;
    const other = right.operators[0] === operator ? right : reversed(right);
    if (other.operators[0] !== operator) return false;
    const [first, second] = [sidesOf(left), sidesOf(other)];
    return first !== undefined && second !== undefined && areProportional(first, second, isDirected);
  }

  #sameMatrices(a: Answer, b: Answer): boolean {
    const [left, right] = [rowsOf(a), rowsOf(b)];
    if (!left || !right || (a.kind !== 'matrix' && b.kind !== 'matrix')) return false;
    // A tuple stands for a row or for a column.
    const flat = a.kind !== 'matrix' || b.kind !== 'matrix';
    const isVector = (rows: readonly (readonly Answer[])[]) =>
      rows.length === 1 || rows.every((row) => row.length === 1);
    if (flat) {
      if (!isVector(left) || !isVector(right)) return false;
      return this.#sameInOrder(left.flat(), right.flat());
    }
    return (
      left.length === right.length &&
      left.every((row, i) => this.#sameInOrder(row, right[i] as readonly Answer[]))
    );
  }

  #sameCollections(a: Answer, b: Answer): boolean {
    const [left, right] = [itemsOf(a), itemsOf(b)];
    if (!left || !right) return false;
    const hasOrder = a.kind === 'tuple' || b.kind === 'tuple';
    if (!hasOrder) {
      const isSet = a.kind === 'set' && b.kind === 'set';
      if (isSet) return this.#covers(left, right) && this.#covers(right, left);
      return this.#sameInAnyOrder(left, right, (x, y) => this.same(x, y));
    }
    // A tuple is no set, and the brackets around two numbers say whether the ends of an interval belong to
    // it.
    if (a.kind === 'set' || b.kind === 'set') return false;
    if (a.kind === 'tuple' && b.kind === 'tuple' && left.length === 2) {
      const closed = ({ open, close }: Tuple) => `${open === '['} ${close === ']'}`;
      if (closed(a) !== closed(b)) return false;
    }
    return this.#sameInOrder(left, right);
  }

  #covers(items: readonly Answer[], others: readonly Answer[]): boolean {
    if (items.length > maxUnordered || others.length > maxUnordered) return this.#sameInOrder(items, others);
    return items.every((item) => others.some((other) => this.same(item, other)));
  }

  #sameInOrder(a: readonly Answer[], b: readonly Answer[]): boolean {
    return a.length === b.length && a.every((item, i) => this.same(item, b[i] as Answer));
  }

  #sameInAnyOrder<T>(a: readonly T[], b: readonly T[], same: (x: T, y: T) => boolean): boolean {
    if (a.length !== b.length) return false;
    if (a.length > maxUnordered) return a.every((item, i) => same(item, b[i] as T));
    const rest = [...b];
    return a.every((item) => {
      const found = rest.findIndex((other) => same(item, other));
      if (found >= 0) rest.splice(found, 1);
      return found >= 0;
    });
  }

  #sameQuantities(a: Quantity, b: Quantity): boolean {
    if (a.unit !== undefined && b.unit !== undefined && a.unit !== b.unit) return false;
    if (a.base !== undefined || b.base !== undefined) return sameInBases(a, b);
    if (a.isPercent === b.isPercent) return this.#sameBodies(a.body, b.body);
    // A number without the sign may be the percentage or the share, but what is below 1 is a share.
    const [percent, plain] = a.isPercent ? [a.body, b.body] : [b.body, a.body];
    const share = ['\\frac', '{', ...percent, '}', '{', '100', '}'];
    return this.#sameBodies(share, plain) || (!isBelowOne(percent) && this.#sameBodies(percent, plain));
  }

  #sameBodies(a: readonly Token[], b: readonly Token[]): boolean {
    if (a.join(' ') === b.join(' ')) return true;
    if (isSpecial(a) || isSpecial(b)) return isInfinite(a) && isInfinite(b) && signOf(a) === signOf(b);
    const [left, right] = [expressionOf(a), expressionOf(b)];
    return left !== undefined && right !== undefined && haveSameValues(left, right, this.#tolerance);
  }
}

/** The expression of some tokens, undefined where they are none. */
function expressionOf(body: readonly Token[]): Expression | undefined {
  try {
    return readExpression(body);
  } catch (error) {
    if (error instanceof Unreadable) return undefined;
    throw error;
  }
}

function isBelowOne(body: readonly Token[]): boolean {
  const expression = expressionOf(body);
  if (!expression) return false;
  const [one, minusOne] = [
    orderOf(expression, constant(rational(1n))),
    orderOf(expression, constant(rational(-1n))),
  ];
  return one !== undefined && minusOne !== undefined && one < 0 && minusOne > 0;
}

const specials = new Set(['\\infty', '\\R', '\\emptyset']);

function isSpecial(body: readonly Token[]): boolean {
  return body.length <= 2 && body.some((token) => specials.has(token));
}

function isInfinite(body: readonly Token[]): boolean {
  return body.at(-1) === '\\infty';
}

function signOf(body: readonly Token[]): string {
  return body.length > 1 && body[0] === '-' ? '-' : '+';
}

function isInfinity(answer: Answer): boolean {
  return answer.kind === 'quantity' && isInfinite(answer.body) && signOf(answer.body) === '+';
}

function isReals(answer: Answer): boolean {
  return answer.kind === 'quantity' && answer.body.join() === '\\R';
}

function isEmpty(answer: Answer): boolean {
  if (answer.kind === 'set') return answer.items.length === 0;
  return answer.kind === 'quantity' && answer.body.join() === '\\emptyset';
}

/** What an answer says as text, for comparisons with words. */
function textOf(answer: Answer): string {
  return answer.source
    .replace(/["\s{}]/g, '')
    .replace(/^(?:the|an?)(?=[a-z]{3})/, '')
    .toLowerCase();
}

/** Leaves "x =" out where only one of the two has it. */
function withoutNames(a: Answer, b: Answer): readonly [Answer, Answer] {
  const isNamed = (answer: Answer): answer is Relation =>
    answer.kind === 'relation' &&
    answer.operators.every((operator) => operator === '=' || operator === '\\approx');
  const isPlain = (answer: Answer) =>
    answer.kind !== 'relation' &&
    !(answer.kind === 'list' && answer.items.some((item) => item.kind === 'relation'));
  if (isNamed(a) && isPlain(b)) return [a.sides.at(-1) as Answer, b];
  if (isNamed(b) && isPlain(a) && isName(b.sides[0] as Answer)) return [a, b.sides.at(-1) as Answer];
  if (a.kind === 'list' && isPlain(b)) return [valuesOf(a), b];
  if (b.kind === 'list' && isPlain(a)) return [a, valuesOf(b)];
  return [a, b];
}

/** A list of "x = 1" and "x = 2" as the list of 1 and 2, where the name is one and the same. */
function valuesOf(list: Answer): Answer {
  if (list.kind !== 'list') return list;
  const names = new Set<string>();
  const values = list.items.map((item) => {
    const [name, value] = item.kind === 'relation' && item.operators.join() === '=' ? item.sides : [];
    if (!name || !value || !isName(name)) return undefined;
    names.add(name.source);
    return value;
  });
  if (names.size !== 1 || !values.every((value) => value !== undefined)) return list;
  return { kind: 'list', source: values.map((value) => value.source).join(' , '), items: values };
}

/** A chain of equations by its two ends, as "x = 2 + 3 = 5". */
function shortened(relation: Relation): Relation {
  const { operators, sides } = relation;
  if (operators.length < 2 || operators.some((operator) => operator !== '=')) return relation;
  return { ...relation, operators: ['='], sides: [sides[0] as Answer, sides.at(-1) as Answer] };
}

function sidesOf(relation: Relation): readonly [Expression, Expression] | undefined {
  const [left, right] = relation.sides.map((side) =>
    side.kind === 'quantity' && !isSpecial(side.body) ? expressionOf(side.body) : undefined,
  );
  return left && right ? [left, right] : undefined;
}

function rowsOf(answer: Answer): readonly (readonly Answer[])[] | undefined {
  if (answer.kind === 'matrix') return answer.rows;
  return answer.kind === 'tuple' ? [answer.items] : undefined;
}

/** The items of a collection; a single answer stands for the collection of it. */
function itemsOf(answer: Answer): readonly Answer[] | undefined {
  if (answer.kind === 'list' || answer.kind === 'set' || answer.kind === 'tuple') return answer.items;
  return answer.kind === 'quantity' ? [answer] : undefined;
}

/**
 * Numerals with a base: the same digits, or the same number in two bases. A base that one leaves out is the
 * other's.
 */
function sameInBases(a: Quantity, b: Quantity): boolean {
  const [left, right] = [a.body[0] as string, b.body[0] as string];
  if (a.base === undefined || b.base === undefined || a.base === b.base) {
    return a.body.length === 1 && b.body.length === 1 && left.replace(/^0+/, '') === right.replace(/^0+/, '');
  }
  const [x, y] = [valueInBase(left, Number(a.base)), valueInBase(right, Number(b.base))];
  return x !== undefined && x === y;
}

function valueInBase(digits: string, base: number): bigint | undefined {
  let value = 0n;
  for (const digit of digits) {
    if (Number(digit) >= base || digits.length > 200) return undefined;
    value = value * BigInt(base) + BigInt(digit);
  }
  return value;
}
