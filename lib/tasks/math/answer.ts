import { isWords, type Token, Unreadable } from './latex.js';
import { canonicalUnit, currencies } from './units.js';

/** An answer taken apart: what it is, down to the expressions, which `expression.ts` evaluates. */
export type Answer = Words | List | FiniteSet | Tuple | Union | Matrix | Relation | Quantity;

interface Common {
  /** The tokens in one spelling: equal sources say the same. */
  readonly source: string;
}

export interface Words extends Common {
  readonly kind: 'words';
  readonly words: string;
}

/** Items without brackets around them, in any order: `1, -2`, `3 \pm \sqrt{2}`, `x = 1 \text{ or } x = 2`. */
export interface List extends Common {
  readonly kind: 'list';
  readonly items: readonly Answer[];
}

export interface FiniteSet extends Common {
  readonly kind: 'set';
  readonly items: readonly Answer[];
}

/** Items in brackets, in their order; two of them may be the ends of an interval. */
export interface Tuple extends Common {
  readonly kind: 'tuple';
  readonly items: readonly Answer[];
  readonly open: string;
  readonly close: string;
}

export interface Union extends Common {
  readonly kind: 'union';
  readonly parts: readonly Answer[];
}

export interface Matrix extends Common {
  readonly kind: 'matrix';
  readonly rows: readonly (readonly Answer[])[];
}

/** Sides with an operator between each two: an equation, an inequality, a chain of them, or `x \in S`. */
export interface Relation extends Common {
  readonly kind: 'relation';
  readonly operators: readonly string[];
  readonly sides: readonly Answer[];
}

/** An expression, perhaps with a unit or a percent sign. */
export interface Quantity extends Common {
  readonly kind: 'quantity';
  readonly body: readonly Token[];
  /** The unit in one spelling, such as `dollar` or `cm^2`; the base of a numeral is none. */
  readonly unit?: string;
  readonly isPercent: boolean;
  /** The subscript of a numeral such as `52_8`; the body is its digits. */
  readonly base?: string;
}

const openers = new Set(['(', '[', '{', '\\{', '\\langle', '\\lfloor', '\\lceil']);
const closers = new Set([')', ']', '}', '\\}', '\\rangle', '\\rfloor', '\\rceil']);
export const orderOperators = new Set(['<', '>', '\\le', '\\ge']);
const relationOperators = new Set([
  ...orderOperators,
  ...'= \\ne \\in \\approx \\equiv \\sim \\cong \\subset \\subseteq \\to \\notin \\perp \\parallel'.split(
    ' ',
  ),
]);

/** @throws Unreadable */
export function parseAnswer(tokens: readonly Token[]): Answer {
  const source = tokens.join(' ');
  if (tokens.length === 0) throw new Unreadable('there is nothing');
  const [first] = tokens as [Token];
  if (tokens.length === 1 && isWords(first)) return { kind: 'words', source, words: first.slice(1) };

  const items = split(
    tokens,
    (token) => token === ',' || token === ';' || token === '"and' || token === '"or',
  );
  if (items.length > 1)
    return listOf(
      items.filter((item) => item.length > 0),
      source,
    );

  const parts = split(tokens, (token) => token === '\\cup');
  if (parts.length > 1) return { kind: 'union', source, parts: parts.map(parseAnswer) };

  const relation = parseRelation(tokens, source);
  if (relation) return relation;

  return parseBracketed(tokens, source) ?? parseAlternatives(tokens, source) ?? parseQuantity(tokens, source);
}

/** The pieces between separators outside of all brackets. @throws Unreadable where brackets do not match */
function split(tokens: readonly Token[], isSeparator: (token: Token) => boolean): Token[][] {
  const pieces: Token[][] = [[]];
  let depth = 0;
  for (const token of tokens) {
    if (opens(token)) depth++;
    else if (closes(token) && --depth < 0) throw new Unreadable('a bracket closes that never opened');
    if (depth === 0 && isSeparator(token)) pieces.push([]);
    else (pieces.at(-1) as Token[]).push(token);
  }
  if (depth > 0) throw new Unreadable('a bracket never closes');
  return pieces;
}

function opens(token: Token): boolean {
  return openers.has(token) || token.startsWith('\\begin{');
}

function closes(token: Token): boolean {
  return closers.has(token) || token.startsWith('\\end{');
}

function listOf(items: readonly Token[][], source: string): Answer {
  const parsed = items.map(parseAnswer);
  const [first] = parsed;
  if (!first) throw new Unreadable('there is nothing between the separators');
  if (parsed.length === 1) return first;
  // In "x = 1, 2" the variable is said once.
  if (first.kind === 'relation' && first.operators.join() === '=' && parsed.slice(1).every(isValue)) {
    parsed[0] = first.sides[1] as Answer;
  }
  return {
    kind: 'list',
    source,
    items: parsed.flatMap((item) => (item.kind === 'list' ? item.items : [item])),
  };
}

function isValue(answer: Answer): boolean {
  return answer.kind === 'quantity' || answer.kind === 'list';
}

function parseRelation(tokens: readonly Token[], source: string): Answer | undefined {
  const operators: Token[] = [];
  const pieces = split(tokens, (token) => {
    if (!relationOperators.has(token)) return false;
    operators.push(token);
    return true;
  });
  if (operators.length === 0) return undefined;
  // "= 5" and "\approx 5" say 5.
  if (pieces[0]?.length === 0 && operators.length === 1 && pieces[1]) return parseAnswer(pieces[1]);
  if (operators.join() === '\\in') return parseAnswer(pieces[1] as Token[]);
  const sides = pieces.map(parseAnswer);
  // The exact value of "\sqrt{5} \approx 2.236" counts; "x \approx 2.236" has no other.
  const rounded = operators.indexOf('\\approx');
  if (rounded > 0 || (rounded === 0 && !isName(sides[0] as Answer))) {
    const exact = sides.slice(0, rounded + 1);
    if (exact.length === 1) return exact[0];
    return { kind: 'relation', source, operators: operators.slice(0, rounded), sides: exact };
  }
  return { kind: 'relation', source, operators, sides };
}

/**
 * Whether a side of an equation only names the other: `x`, `x_1`, `f(x)`, `(x, y)`, `AB`, `\angle A`,
 * `\text{Area}`.
 */
export function isName(side: Answer): boolean {
  if (side.kind === 'words') return true;
  if (side.kind === 'tuple') return side.items.every(isName);
  return side.kind === 'quantity' && (namePattern.test(side.source) || figurePattern.test(side.source));
}

const namePattern = /^(?:[a-zA-Z]|\\[a-z]+)(?: _ \{ \S+ \})?(?: ')?(?: \( [a-zA-Z](?: , [a-zA-Z])* \))?$/;

/** Angles and lines, by their points. */
const figurePattern = /^(?:(?:m )?\\angle|[A-Z])(?: [A-Z]){1,3}$/;

const mirrored: Readonly<Record<string, string>> = { '<': '>', '>': '<', '\\le': '\\ge', '\\ge': '\\le' };

/** The relation read from right to left: `2 < x` for `x > 2`. */
export function reversed(relation: Relation): Relation {
  return {
    ...relation,
    operators: relation.operators.map((operator) => mirrored[operator] ?? operator).reverse(),
    sides: [...relation.sides].reverse(),
  };
}

/** What stands in one pair of brackets as a whole. */
function parseBracketed(tokens: readonly Token[], source: string): Answer | undefined {
  const [open] = tokens as [Token];
  const close = tokens.at(-1) as Token;
  if (!opens(open) || !closes(close) || tokens.length < 2) return undefined;
  let depth = 0;
  for (const [i, token] of tokens.entries()) {
    if (opens(token)) depth++;
    else if (closes(token) && --depth === 0 && i < tokens.length - 1) return undefined;
  }
  const inner = tokens.slice(1, -1);
  if (open === '\\{') return parseSet(inner, source);
  if (open === '{' && close === '}') return parseAnswer(inner);
  if (open.startsWith('\\begin{')) return parseMatrix(open, close, inner, source);
  if (!['(', '[', '\\langle'].includes(open)) return undefined;
  const items = split(inner, (token) => token === ',' || token === ';');
  if (items.length > 1) return { kind: 'tuple', source, items: items.map(parseAnswer), open, close };
  return open === '\\langle' || inner.length === 0 ? undefined : parseAnswer(inner);
}

function parseSet(inner: readonly Token[], source: string): Answer {
  if (inner.length === 0) return { kind: 'set', source, items: [] };
  const builder = split(inner, (token) => token === '|' || token === ':');
  // The condition of "{x : x > 2}" counts.
  if (
    builder.length === 2 &&
    split(builder[1] as Token[], (token) => relationOperators.has(token)).length > 1
  ) {
    return parseAnswer(builder[1] as Token[]);
  }
  const items = split(inner, (token) => token === ',' || token === ';').map(parseAnswer);
  return {
    kind: 'set',
    source,
    items: items.flatMap((item) => (item.kind === 'list' ? item.items : [item])),
  };
}

function parseMatrix(open: Token, close: Token, inner: readonly Token[], source: string): Answer | undefined {
  const name = open.slice('\\begin{'.length, -1);
  if (close !== `\\end{${name}}` || !/^(?:[pbB]?matrix|smallmatrix|array)$/.test(name)) return undefined;
  const rows = split(inner, (token) => token === '\\\\').filter((row) => row.length > 0);
  return {
    kind: 'matrix',
    source,
    rows: rows.map((row) => split(row, (token) => token === '&').map(parseAnswer)),
  };
}

/** The two values of an expression with ±, whose signs all change together. */
function parseAlternatives(tokens: readonly Token[], source: string): Answer | undefined {
  if (!tokens.some((token) => token === '\\pm' || token === '\\mp')) return undefined;
  const choose = (plus: Token, minus: Token) =>
    parseAnswer(tokens.map((token) => (token === '\\pm' ? plus : token === '\\mp' ? minus : token)));
  return { kind: 'list', source, items: [choose('+', '-'), choose('-', '+')] };
}

function parseQuantity(tokens: readonly Token[], source: string): Answer {
  const body = [...tokens];
  let unit = '';
  let isPercent = false;
  // The argument of a sine is in degrees, not the sine.
  const isAngle = !tokens.some((token) => /^\\(?:sin|cos|tan|cot|sec|csc)$/.test(token));
  while (body.length > 1 && isWords(body[0])) body.shift();
  const sign = body[0] === '-' ? 1 : 0;
  const currency = currencies[body[sign] ?? ''];
  if (currency) {
    body.splice(sign, 1);
    unit = currency;
  }
  for (;;) {
    const last = body.at(-1);
    const power =
      body.length > 4 && last === '}' && body.at(-3) === '{' && body.at(-4) === '^' ? body.at(-2) : undefined;
    if (isWords(last)) {
      unit = `${last?.slice(1)} ${unit}`;
      body.pop();
    } else if (power !== undefined && isWords(body.at(-5))) {
      unit = `${body.at(-5)?.slice(1)}^${power} ${unit}`;
      body.splice(-5);
    } else if (last === '%' || (last === '°' && isAngle) || currencies[last ?? '']) {
      if (last === '%') isPercent = true;
      else unit = `${last === '°' ? 'degree' : currencies[last as string]} ${unit}`;
      body.pop();
    } else if ((last === 'C' || last === 'F') && body.at(-2) === '°') {
      unit = `${last} ${unit}`;
      body.pop();
    } else if (last === '/' && unit !== '') {
      unit = `per ${unit}`;
      body.pop();
    } else break;
  }
  const words = canonicalUnit(unit);
  if (words === 'percent') isPercent = true;
  if (body.length === 0) {
    if (words === '') throw new Unreadable('there is nothing');
    return { kind: 'words', source, words };
  }
  const base = baseOf(body);
  return {
    kind: 'quantity',
    source,
    body: base === undefined ? body : body.slice(0, 1),
    isPercent,
    ...(words === '' || words === 'percent' ? {} : { unit: words }),
    ...(base === undefined ? {} : { base }),
  };
}

/** The base of `52_8` or `52_{\text{eight}}`: a numeral with a number as its subscript. */
function baseOf(body: readonly Token[]): string | undefined {
  if (body.length !== 5 || body[1] !== '_' || !/^\d+$/.test(body[0] as string)) return undefined;
  const subscript = body[3] as string;
  if (/^\d{1,2}$/.test(subscript)) return subscript;
  const word = isWords(subscript) ? numberWords.indexOf(subscript.slice(1)) : -1;
  return word < 2 ? undefined : String(word);
}

const numberWords = 'zero one two three four five six seven eight nine ten eleven twelve'.split(' ');
