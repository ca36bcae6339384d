import { type Fields, listField, textField } from '../rows.js';
import { type BinaryKind, type Claim, personsOf } from './claim.js';
import type { Puzzle } from './generator.js';

/** A puzzle, generated or read from a file in the layout of the published data set. */
export interface KnightsAndKnavesRow extends Puzzle {
  /** The published answer, where the file has one: one line a person, as in `(1) Zoey is a knight`. */
  readonly answer?: string;
}

const isText = (value: unknown): value is string => typeof value === 'string';
const isBoolean = (value: unknown): value is boolean => typeof value === 'boolean';

/**
 * A row of the published data set (columns `quiz`, `names`, `solution`, `statements` and, if there is one,
 * `solution_text_format`).
 *
 * @throws Error that names the column at fault
 */
export function parsePublishedRow(fields: Fields): KnightsAndKnavesRow {
  const names = listField(fields, 'names', 'names', isText);
  const solution = listField(fields, 'solution', 'booleans', isBoolean);
  const statements = parseStatements(textField(fields, 'statements'));
  for (const [column, length] of [
    ['solution', solution.length],
    ['statements', statements.length],
  ] as const) {
    if (length !== names.length) {
      throw new Error(
        `Expected ${names.length} items in column ${column}, one for each name, but found ${length}`,
      );
    }
  }
  const answer = fields.solution_text_format;
  return {
    quiz: textField(fields, 'quiz'),
    names,
    solution,
    statements,
    ...(isText(answer) ? { answer } : {}),
  };
}

/**
 * Reads the `statements` column: a Python tuple with one formula a person, over `('telling-truth', i)`,
 * `('lying', i)`, `('not', f)`, `('and', f, g, …)`, `('or', f, g, …)`, `('->', f, g)` and `('<=>', f, g)`.
 *
 * @throws Error that names the character at fault
 */
export function parseStatements(text: string): Claim[] {
  const value = parseTuple(text);
  const claims = value.map((item) => toClaim(item));
  for (const person of claims.flatMap(personsOf)) {
    if (person >= claims.length) {
      throw new Error(
        `Expected persons from 0 to ${claims.length - 1} in column statements but found ${person}`,
      );
    }
  }
  return claims;
}

type Term = string | number | Term[];

const token = /\s*(?:([(),])|'([^'\\]*)'|"([^"\\]*)"|(\d{1,9}))/y;
const maxDepth = 100;

function parseTuple(text: string): Term[] {
  token.lastIndex = 0;
  const fail = (at: number, expected: string): never => {
    const found = at < text.length ? JSON.stringify(text.slice(at, at + 12)) : 'the end';
    throw new Error(`Expected ${expected} at character ${at + 1} of column statements but found ${found}`);
  };
  const next = (expected: string): RegExpExecArray => {
    const at = token.lastIndex;
    return token.exec(text) ?? fail(at, expected);
  };
  const term = (depth: number): Term => {
    const at = token.lastIndex;
    const match = next('a formula');
    const word = match[2] ?? match[3];
    if (word !== undefined) return word;
    if (match[4] !== undefined) return Number(match[4]);
    if (match[1] !== '(' || depth > maxDepth) return fail(at, `a formula nested at most ${maxDepth} deep`);
    const items: Term[] = [];
    for (;;) {
      const before = token.lastIndex;
      if (next('a formula or ")"')[1] === ')') return items;
      token.lastIndex = before;
      items.push(term(depth + 1));
      const separatorAt = token.lastIndex;
      const separator = next('"," or ")"')[1];
      if (separator === ')') return items;
      if (separator !== ',') fail(separatorAt, '"," or ")"');
    }
  };
  const value = term(0);
  if (text.slice(token.lastIndex).trim() !== '') fail(token.lastIndex, 'the end');
  return Array.isArray(value) ? value : fail(0, '"("');
}

const binaryKinds: Readonly<Record<string, BinaryKind>> = { and: 'and', or: 'or', '->': 'if', '<=>': 'iff' };

function toClaim(term: Term): Claim {
  const [operator, ...operands] = Array.isArray(term) ? term : [term];
  const [first] = operands;
  if (
    (operator === 'telling-truth' || operator === 'lying') &&
    operands.length === 1 &&
    typeof first === 'number'
  ) {
    return { kind: operator === 'lying' ? 'knave' : 'knight', person: first };
  }
  if (operator === 'not' && first !== undefined && operands.length === 1) {
    return { kind: 'not', claim: toClaim(first) };
  }
  const kind =
    typeof operator === 'string' && Object.hasOwn(binaryKinds, operator) ? binaryKinds[operator] : undefined;
  const joinable = kind === 'and' || kind === 'or';
  if (kind && operands.length >= 2 && (joinable || operands.length === 2)) {
    const claims = operands.map(toClaim);
    return claims.slice(1).reduce((left, right): Claim => ({ kind, left, right }), claims[0] as Claim);
  }
  throw new Error(
    'Expected a formula over telling-truth, lying, not, and, or, ->, <=> in column statements but found ' +
      JSON.stringify(term).slice(0, 80),
  );
}
