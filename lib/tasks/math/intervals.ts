import { type Answer, orderOperators, type Quantity, type Relation, reversed } from './answer.js';

/** A set of real numbers between two ends. */
export interface Interval {
  readonly low: Answer;
  readonly high: Answer;
  readonly isLowClosed: boolean;
  readonly isHighClosed: boolean;
}

const infinity: Quantity = { kind: 'quantity', source: '\\infty', body: ['\\infty'], isPercent: false };
const minusInfinity: Quantity = {
  kind: 'quantity',
  source: '- \\infty',
  body: ['-', '\\infty'],
  isPercent: false,
};

/** Whether a relation is an inequality or a chain of them. */
export function isOrder(relation: Relation): boolean {
  return relation.operators.every((operator) => orderOperators.has(operator));
}

function isVariable(answer: Answer | undefined): answer is Quantity {
  return answer?.kind === 'quantity' && /^(?:[a-zA-Z]|\\(?!infty|pi$)[a-z]+)$/.test(answer.source);
}

/** The variable that inequalities are about, where they name one. */
export function variableOf(answer: Answer): string | undefined {
  if (answer.kind === 'list') return answer.items.map(variableOf).find((name) => name !== undefined);
  return answer.kind === 'relation' ? answer.sides.find(isVariable)?.source : undefined;
}

/**
 * The intervals that an answer is made of: brackets, unions of them, inequalities solved for one variable.
 */
export function intervalsOf(answer: Answer): Interval[] | undefined {
  if (answer.kind === 'union' || answer.kind === 'list') {
    const parts = (answer.kind === 'union' ? answer.parts : answer.items).map(intervalsOf);
    if (answer.kind === 'list' && new Set(answer.items.map(variableOf)).size !== 1) return undefined;
    return parts.every((part) => part !== undefined) ? parts.flat() : undefined;
  }
  if (answer.kind === 'tuple') {
    const [low, high] = answer.items;
    if (answer.items.length !== 2 || !low || !high || !/[([]/.test(answer.open)) return undefined;
    return [{ low, high, isLowClosed: answer.open === '[', isHighClosed: answer.close === ']' }];
  }
  if (answer.kind !== 'relation' || !isOrder(answer)) return undefined;
  const upward = answer.operators.every((operator) => operator === '<' || operator === '\\le');
  const { operators, sides } = upward ? answer : reversed(answer);
  if (!operators.every((operator) => operator === '<' || operator === '\\le')) return undefined;
  const [first, second, third] = sides;
  const isClosed = operators.map((operator) => operator === '\\le');
  if (sides.length === 3 && first && third && isVariable(second)) {
    return [
      { low: first, high: third, isLowClosed: isClosed[0] === true, isHighClosed: isClosed[1] === true },
    ];
  }
  if (sides.length !== 2 || !first || !second) return undefined;
  if (isVariable(first)) {
    return [{ low: minusInfinity, high: second, isLowClosed: false, isHighClosed: isClosed[0] === true }];
  }
  if (isVariable(second)) {
    return [{ low: first, high: infinity, isLowClosed: isClosed[0] === true, isHighClosed: false }];
  }
  return undefined;
}
