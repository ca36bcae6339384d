import { apply, equals, type Operation, type Rational, whole } from './rational.js';

/** An expression as a tree; a negated one is 0 minus it, so that a tree has numbers and operations alone. */
export type Expression =
  | { readonly kind: 'number'; readonly value: number }
  | {
      readonly kind: 'operation';
      readonly operation: Operation;
      readonly left: Expression;
      readonly right: Expression;
    };

export interface Reading {
  /** The exact value of the expression, without the "= …" that may follow it. */
  readonly value: Rational;
  /** Every number that is written in the expression, in the order of writing. */
  readonly numbers: readonly bigint[];
  /** Every operation that is used, signs included. */
  readonly operations: ReadonlySet<Operation>;
  /** Whether what follows an equals sign is the value; true where there is none. */
  readonly equationHolds: boolean;
}

/** Longer expressions are not read. */
export const maxLength = 1000;
/** Parentheses, signs and fractions may nest this deep. */
export const maxNesting = 50;

/**
 * Reads an arithmetic expression and evaluates it exactly: whole numbers in digits, + - * / (also as × · ⋅ ∗ ÷ ∕ − – and
 * as LaTeX's \times, \cdot, \div, \frac{}{}, \left and \right), signs, parentheses, one pair of $ … $, \( … \) or
 * \[ … \] around it all, and one number behind an equals sign. Everything else is refused, powers (`**`), decimal points,
 * thousands separators, floor division and products without a sign among it.
 *
 * @returns undefined for text that is no such expression, is too long, nests too deep, or divides by zero
 */
export function readExpression(text: string): Reading | undefined {
  if (text.length > maxLength) return undefined;
  const tokens = tokenize(withoutDelimiters(text.trim()));
  if (!tokens) return undefined;
  return new Reader(tokens).read();
}

/** An expression in words, with only the parentheses that it needs. */
export function formatExpression(expression: Expression): string {
  if (expression.kind === 'number') return String(expression.value);
  const { operation, left, right } = expression;
  const level = precedence(operation);
  const enclose = (operand: Expression, needed: (own: number) => boolean): string => {
    const inner = formatExpression(operand);
    return operand.kind === 'operation' && needed(precedence(operand.operation)) ? `(${inner})` : inner;
  };
  const associative = operation === '+' || operation === '*';
  const before = enclose(left, (own) => own < level);
  // Behind "-" and "/" an operation of the same precedence needs parentheses; a division behind "*" does not.
  const after = enclose(right, (own) => own < level || (own === level && !associative));
  return `${before} ${operation} ${after}`;
}

function precedence(operation: Operation): number {
  return operation === '+' || operation === '-' ? 1 : 2;
}

type Token = bigint | Operation | '(' | ')' | '{' | '}' | '=' | 'frac';

const signs: Readonly<Record<string, Token>> = {
  '+': '+',
  '-': '-',
  '\u2212': '-',
  '\u2013': '-',
  '*': '*',
  '\u00d7': '*',
  '\u00b7': '*',
  '\u22c5': '*',
  '\u2217': '*',
  '/': '/',
  '\u00f7': '/',
  '\u2215': '/',
  '(': '(',
  ')': ')',
  '{': '{',
  '}': '}',
  '=': '=',
};

const commands: Readonly<Record<string, Token>> = {
  '\\times': '*',
  '\\cdot': '*',
  '\\div': '/',
  '\\left(': '(',
  '\\right)': ')',
  '\\frac': 'frac',
  '\\dfrac': 'frac',
  '\\tfrac': 'frac',
};

const piece = /\s+|(0|[1-9][0-9]*)(?![0-9])|(\\left\(|\\right\)|\\[a-z]+)|([^\sa-z0-9\\])/y;

function tokenize(text: string): Token[] | undefined {
  const tokens: Token[] = [];
  piece.lastIndex = 0;
  while (piece.lastIndex < text.length) {
    const match = piece.exec(text);
    if (!match) return undefined;
    const [, digits, command, sign] = match;
    if (digits !== undefined) tokens.push(BigInt(digits));
    else if (command !== undefined || sign !== undefined) {
      const known = command === undefined ? signs : commands;
      const key = command ?? (sign as string);
      const token = Object.hasOwn(known, key) ? known[key] : undefined;
      if (token === undefined) return undefined;
      tokens.push(token);
    }
  }
  return tokens;
}

const delimiters = [
  ['$$', '$$'],
  ['$', '$'],
  ['\\(', '\\)'],
  ['\\[', '\\]'],
] as const;

function withoutDelimiters(text: string): string {
  for (const [open, close] of delimiters) {
    if (text.length >= open.length + close.length && text.startsWith(open) && text.endsWith(close)) {
      return text.slice(open.length, -close.length);
    }
  }
  return text;
}

/** Thrown and caught in this file alone: what is read is no expression. */
class Unreadable extends Error {}

/**
 * A recursive-descent parser over
 *
 *     equation = sum ["=" sign number]
 *     sum      = product {("+" | "-") product}
 *     product  = factor {("*" | "/") factor}
 *     factor   = ("+" | "-") factor | number | "(" sum ")" | frac "{" sum "}" "{" sum "}"
 */
class Reader {
  readonly #tokens: readonly Token[];
  #position = 0;
  readonly #numbers: bigint[] = [];
  readonly #operations = new Set<Operation>();

  constructor(tokens: readonly Token[]) {
    this.#tokens = tokens;
  }

  read(): Reading | undefined {
    try {
      const value = this.#sum(0);
      const equationHolds = this.#take('=') ? equals(this.#claimedValue(), value) : true;
      if (this.#position < this.#tokens.length) return undefined;
      return { value, numbers: this.#numbers, operations: this.#operations, equationHolds };
    } catch (error) {
      if (error instanceof Unreadable) return undefined;
      throw error;
    }
  }

  #sum(depth: number): Rational {
    let value = this.#product(depth);
    for (;;) {
      const operation = this.#take('+', '-');
      if (!operation) return value;
      value = this.#apply(operation, value, this.#product(depth));
    }
  }

  #product(depth: number): Rational {
    let value = this.#factor(depth);
    for (;;) {
      const operation = this.#take('*', '/');
      if (!operation) return value;
      value = this.#apply(operation, value, this.#factor(depth));
    }
  }

  #factor(depth: number): Rational {
    if (depth > maxNesting) throw new Unreadable();
    const sign = this.#take('+', '-');
    if (sign) return this.#apply(sign, whole(0), this.#factor(depth + 1));
    if (this.#take('(')) return this.#enclosed(depth, ')');
    if (this.#take('frac')) {
      const above = this.#braced(depth);
      return this.#apply('/', above, this.#braced(depth));
    }
    const number = this.#number();
    this.#numbers.push(number);
    return whole(number);
  }

  #braced(depth: number): Rational {
    if (!this.#take('{')) throw new Unreadable();
    return this.#enclosed(depth, '}');
  }

  #enclosed(depth: number, close: ')' | '}'): Rational {
    const value = this.#sum(depth + 1);
    if (!this.#take(close)) throw new Unreadable();
    return value;
  }

  #claimedValue(): Rational {
    const negative = this.#take('-') !== undefined;
    const number = this.#number();
    return whole(negative ? -number : number);
  }

  #number(): bigint {
    const token = this.#tokens[this.#position];
    if (typeof token !== 'bigint') throw new Unreadable();
    this.#position++;
    return token;
  }

  #apply(operation: Operation, left: Rational, right: Rational): Rational {
    this.#operations.add(operation);
    const value = apply(operation, left, right);
    if (!value) throw new Unreadable();
    return value;
  }

  /** The next token where it is one of `wanted`, which is then behind the reader. */
  #take<T extends Exclude<Token, bigint>>(...wanted: readonly T[]): T | undefined {
    const token = this.#tokens[this.#position];
    const found = wanted.find((candidate) => candidate === token);
    if (found !== undefined) this.#position++;
    return found;
  }
}
