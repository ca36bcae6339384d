import type { Expression } from './expression.js';
import { formatExpression } from './expression.js';
import { apply, equals, formatRational, type Operation, type Rational, whole } from './rational.js';
import type { Puzzle, Rules } from './solver.js';

/** A value that is at hand, with the expression that made it. */
interface Item {
  readonly value: Rational;
  readonly expression: Expression;
}

export interface WorkedSolution {
  /** The search in words, one attempt a line. */
  readonly lines: readonly string[];
  /** The expression of the last attempt, whose value is the target. */
  readonly solution: Expression;
}

/** So many attempts may fail before the solution is shown. */
const maxFailures = 2;

/**
 * A short search in words that ends at the target. Each attempt joins two of the numbers that are left until one is
 * left: the attempts that come first take the step whose result is nearest to the target, each another first step; where
 * none of them arrives, the last one is the given solution. Every equation is computed, so none can be wrong.
 */
export function workedSolution(puzzle: Puzzle, rules: Rules, solution: Expression): WorkedSolution {
  const target = whole(puzzle.target);
  const start = puzzle.numbers.map(
    (value): Item => ({ value: whole(value), expression: { kind: 'number', value } }),
  );
  const lines: string[] = [];
  for (let rank = 0; rank < maxFailures; rank++) {
    const attempt = greedyAttempt(start, puzzle.target, rules, rank);
    if (!attempt) break;
    const { steps, last } = attempt;
    if (equals(last.value, target)) {
      return { lines: [...lines, `Try ${steps.join(' ')} That is the target.`], solution: last.expression };
    }
    lines.push(`Try ${steps.join(' ')} Not ${puzzle.target}.`);
  }
  const steps = stepsOf(solution, start);
  const shown = steps.length > 0 ? steps.join(' ') : `${formatExpression(solution)}.`;
  return { lines: [...lines, `Try ${shown} That is the target.`], solution };
}

/** An attempt that starts with the `rank`-th nearest first step; undefined where there are not so many. */
function greedyAttempt(start: readonly Item[], target: number, rules: Rules, rank: number) {
  let items = start;
  const steps: string[] = [];
  for (;;) {
    const choice = nearestSteps(items, target, rules.operations)[steps.length === 0 ? rank : 0];
    if (!choice) return undefined;
    items = choice.left;
    steps.push(sentence(choice.operation, choice.first, choice.second, choice.result, items));
    const arrived = rules.use === 'at-most-once' && choice.result.value.numerator === BigInt(target);
    if (items.length === 1 || arrived) return { steps, last: choice.result };
  }
}

/** What may be done next with a positive whole result, the nearest to the target first. */
function nearestSteps(items: readonly Item[], target: number, operations: readonly Operation[]) {
  const steps: {
    operation: Operation;
    first: Item;
    second: Item;
    result: Item;
    left: Item[];
    distance: number;
  }[] = [];
  const results = new Set<string>();
  for (const [i, first] of items.entries()) {
    for (const [j, second] of items.entries()) {
      if (i === j) continue;
      for (const operation of operations) {
        if (j < i && (operation === '+' || operation === '*')) continue;
        const value = apply(operation, first.value, second.value);
        if (value?.denominator !== 1n || value.numerator < 1n) continue;
        const result = { value, expression: joined(operation, first.expression, second.expression) };
        const left = [...items.filter((_, k) => k !== i && k !== j), result];
        const key = left
          .map((item) => item.value.numerator)
          .sort()
          .join();
        if (results.has(key)) continue;
        results.add(key);
        const distance = Math.abs(Number(value.numerator) - target);
        steps.push({ operation, first, second, result, left, distance });
      }
    }
  }
  return steps.sort((a, b) => a.distance - b.distance);
}

/** The steps of an expression, innermost and leftmost first. */
function stepsOf(expression: Expression, start: readonly Item[]): string[] {
  let items = [...start];
  const used = new Set<Item>();
  const steps: string[] = [];
  const visit = (node: Expression): Item => {
    if (node.kind === 'number') {
      const given = start.find(
        (item) => Number(item.value.numerator) === node.value && !used.has(item),
      ) as Item;
      used.add(given);
      return given;
    }
    const first = visit(node.left);
    const second = visit(node.right);
    const result = { value: apply(node.operation, first.value, second.value) as Rational, expression: node };
    items = [...items.filter((item) => item !== first && item !== second), result];
    steps.push(sentence(node.operation, first, second, result, items));
    return result;
  };
  visit(expression);
  return steps;
}

function joined(operation: Operation, left: Expression, right: Expression): Expression {
  return { kind: 'operation', operation, left, right };
}

function sentence(
  operation: Operation,
  first: Item,
  second: Item,
  result: Item,
  items: readonly Item[],
): string {
  const equation = `${operand(first)} ${operation} ${operand(second)} = ${formatRational(result.value)}`;
  if (items.length === 1) return `${equation}.`;
  return `${equation}, left ${items.map((item) => formatRational(item.value)).join(' ')}.`;
}

/** A fraction in parentheses, so that its stroke is not taken for a division of the step. */
function operand({ value }: Item): string {
  return value.denominator === 1n ? formatRational(value) : `(${formatRational(value)})`;
}
