import type { ComputeEngine } from '@cortex-js/compute-engine';
import { isWords, type Token, Unreadable } from './latex.js';
import {
  type Arithmetic,
  isInteger,
  type Maybe,
  parseDecimal,
  type Rational,
  rational,
  type Value,
} from './value.js';

/** Values of an expression's variables. */
export type Assignment = ReadonlyMap<string, Value>;

export interface Expression {
  readonly variables: ReadonlySet<string>;
  /** Whether the imaginary unit occurs. */
  readonly isComplex: boolean;
  evaluate(arithmetic: Arithmetic, assignment: Assignment): Maybe;
}

/** Thrown where an expression needs the parser, which is loaded on first use: load it and start again. */
export const parserNeeded = Symbol('parser needed');

type Json = number | string | { readonly num: string } | readonly [string, ...Json[]];
type Node = (arithmetic: Arithmetic, assignment: Assignment) => Maybe;

let engine: ComputeEngine | undefined;
let loading: Promise<void> | undefined;

/** Loads the LaTeX parser, which takes a tenth of a second and most answers never need. */
export function loadParser(): Promise<void> {
  loading ??= import('@cortex-js/compute-engine').then((module) => {
    engine = new module.ComputeEngine();
  });
  return loading;
}

/**
 * The number that tokens write without any letters: a numeral, a fraction of numerals, a mixed number, or a power of
 * ten times a numeral. Undefined for all else.
 */
export function literalOf(tokens: readonly Token[]): Rational | undefined {
  const match =
    /^(?<sign>[-+]?) ?(?:(?<decimal>[\d.]+)|(?:(?<whole>\d+) )?\\frac \{ (?<top>-? ?\d+) \} \{ (?<bottom>\d+) \}|(?<over>[\d.]+) \/ (?<under>[\d.]+)|(?<factor>[\d.]+) (?:\\times|\\cdot|\*) 10 \^ \{ (?<exponent>[-+]? ?\d{1,4}) \})$/.exec(
      tokens.join(' '),
    )?.groups;
  if (!match) return undefined;
  const sign = match.sign === '-' ? -1n : 1n;
  const signed = (value: Rational | undefined) =>
    value && rational(sign * value.numerator, value.denominator);
  const { decimal, whole, top, bottom, over, under, factor, exponent } = match;
  if (decimal !== undefined) return signed(parseDecimal(decimal));
  if (factor !== undefined) return signed(parseDecimal(`${factor}e${exponent?.replace(' ', '')}`));
  if (over !== undefined) return signed(quotient(parseDecimal(over), parseDecimal(under as string)));
  const fraction = quotient(parseDecimal((top as string).replace(' ', '')), parseDecimal(bottom as string));
  if (whole === undefined || !fraction) return signed(fraction);
  if (fraction.numerator < 0n) return undefined;
  return signed(rational(BigInt(whole) * fraction.denominator + fraction.numerator, fraction.denominator));
}

function quotient(a: Rational | undefined, b: Rational | undefined): Rational | undefined {
  if (!a || !b || b.numerator === 0n) return undefined;
  return rational(a.numerator * b.denominator, a.denominator * b.numerator);
}

/** A constant expression. */
export function constant(value: Value): Expression {
  return { variables: new Set(), isComplex: false, evaluate: () => value };
}

const cache = new Map<string, Expression | Unreadable>();
const cacheSize = 500;

/**
 * Reads an expression: literals at once, all else through the LaTeX parser.
 *
 * @throws Unreadable; parserNeeded where the parser is needed and not loaded yet
 */
export function readExpression(tokens: readonly Token[]): Expression {
  const literal = literalOf(tokens);
  if (literal) return constant(literal);
  const key = tokens.join(' ');
  let read = cache.get(key);
  if (!read) {
    if (!engine) throw parserNeeded;
    read = parse(engine, tokens);
    if (cache.size >= cacheSize) cache.delete(cache.keys().next().value as string);
    cache.set(key, read);
  }
  if (read instanceof Unreadable) throw read;
  return read;
}

function parse(parser: ComputeEngine, tokens: readonly Token[]): Expression | Unreadable {
  try {
    const symbols = new Map<string, Value>();
    const latex = toLatex(tokens, symbols);
    const json = parser.parse(latex, { canonical: false }).json as Json;
    return new Compiler(symbols).compile(json);
  } catch (error) {
    // The parser recurses: an expression that is too deep for it overflows the stack.
    return error instanceof Unreadable ? error : new Unreadable(String(error));
  }
}

const numeral = /^\d*\.?\d+$/;
/** Tokens that the parser reads as they stand, beside numerals and single letters. */
const passed = new Set([
  ...[
    '+',
    '-',
    '/',
    '(',
    ')',
    '[',
    ']',
    '{',
    '}',
    '^',
    '!',
    '|',
    ',',
    '\\times',
    '\\cdot',
    '\\div',
    '\\frac',
    '\\sqrt',
  ],
  ...[
    '\\pi',
    '\\sin',
    '\\cos',
    '\\tan',
    '\\cot',
    '\\sec',
    '\\csc',
    '\\arcsin',
    '\\arccos',
    '\\arctan',
    '\\sinh',
  ],
  ...[
    '\\cosh',
    '\\tanh',
    '\\coth',
    '\\ln',
    '\\log',
    '\\exp',
    '\\max',
    '\\min',
    '\\lfloor',
    '\\rfloor',
    '\\lceil',
  ],
  ...['\\rceil', '\\sum', '\\prod', '=', '\\bmod', '\\mod'],
]);
const greek =
  /^\\(?:alpha|beta|gamma|delta|epsilon|varepsilon|zeta|eta|theta|iota|kappa|lambda|mu|nu|xi|rho|sigma|tau|upsilon|phi|chi|psi|omega|Gamma|Delta|Theta|Lambda|Xi|Sigma|Phi|Psi|Omega|ell)$/;
/** Functions that are written as a symbol before parentheses, since the parser does not know them by their command. */
const applied: Readonly<Record<string, string>> = {
  '\\binom': 'binomial',
  '\\gcd': 'gcd',
  '\\lcm': 'lcm',
  '\\arccot': 'arccot',
  '\\arcsec': 'arcsec',
  '\\arccsc': 'arccsc',
  '\\arcsinh': 'arcsinh',
  '\\arccosh': 'arccosh',
  '\\arctanh': 'arctanh',
};

/**
 * The LaTeX that the parser is given. What it reads otherwise than people do is made plain: mixed numbers, numerals
 * with a slash between, subscripts, binomial coefficients; numerals too long for a double become symbols.
 *
 * @param symbols receives the values of such numerals
 */
function toLatex(tokens: readonly Token[], symbols: Map<string, Value>): string {
  const latex: string[] = [];
  const write = (token: Token) => {
    if (numeral.test(token)) {
      if (token.length <= 15) latex.push(token);
      else {
        const name = `numeral${symbols.size}`;
        symbols.set(name, parseDecimal(token) as Value);
        latex.push(`\\mathrm{${name}}`);
      }
    } else if (/^[a-zA-Z]$/.test(token) || passed.has(token) || greek.test(token)) latex.push(token);
    else throw new Unreadable(`${token} has no meaning here`);
  };
  for (let i = 0; i < tokens.length; i++) {
    const token = tokens[i] as Token;
    const next = tokens[i + 1];
    const previous = tokens[i - 1];
    if (isSign(token) && isSign(next) && isSign(tokens[i + 2])) {
      throw new Unreadable('three signs stand side by side');
    }
    if (numeral.test(token) && next !== undefined && numeral.test(next)) {
      throw new Unreadable('two numerals stand side by side');
    }
    if (numeral.test(token) && next === '\\frac' && !isFactor(previous)) {
      const fraction = /^\\frac \{ (\d+) \} \{ (\d+) \}/.exec(tokens.slice(i + 1, i + 8).join(' '));
      if (fraction && /^\d+$/.test(token)) {
        latex.push('(', token, '+', `\\frac{${fraction[1]}}{${fraction[2]}}`, ')');
        i += 7;
        continue;
      }
    }
    const after = tokens[i + 2] ?? '';
    if (numeral.test(token) && next === '/' && numeral.test(after) && !isFactor(previous)) {
      const following = tokens[i + 3];
      if (following !== '^' && following !== '!') {
        latex.push('\\frac', '{');
        write(token);
        latex.push('}', '{');
        write(after);
        latex.push('}');
        i += 2;
        continue;
      }
    }
    if (token === '\\binom') {
      const [top, afterTop] = group(tokens, i + 1);
      const [bottom, end] = group(tokens, afterTop);
      latex.push(`\\mathrm{binomial}(${toLatex(top, symbols)},${toLatex(bottom, symbols)})`);
      i = end - 1;
      continue;
    }
    if (
      token === '^' &&
      next === '{' &&
      tokens[i + 2] === '-' &&
      tokens[i + 3] === '1' &&
      tokens[i + 4] === '}'
    ) {
      // The inverse of a function, or a reciprocal.
      latex.push('^{-1}');
      i += 4;
      continue;
    }
    if (next === '_' && (/^[a-zA-Z]$/.test(token) || greek.test(token))) {
      const [subscript, end] = group(tokens, i + 2);
      const name = `${token}${subscript.join('')}`.replace(/[^a-zA-Z0-9]/g, '');
      latex.push(`\\mathrm{${name}sub}`);
      i = end - 1;
      continue;
    }
    if (token === '_') {
      if (!['\\log', '\\sum', '\\prod'].includes(previous ?? ''))
        throw new Unreadable('a subscript of nothing');
      latex.push('_');
      continue;
    }
    if (Object.hasOwn(applied, token)) {
      latex.push(`\\mathrm{${applied[token]}}`);
      continue;
    }
    if (token === '*') {
      if (next === '*') {
        latex.push('^');
        i++;
      } else latex.push('\\times');
    } else if (token === ':') latex.push('\\div');
    else if (token === '°') latex.push('^{\\circ}');
    else if (isWords(token)) throw new Unreadable('there are words in the expression');
    else write(token);
  }
  // The parser minds white space before a factorial; a command is parted from the letter after it.
  return latex.join(' ').replace(/(?<!\\[a-zA-Z]+) | (?![a-zA-Z])/g, '');
}

function isSign(token: Token | undefined): boolean {
  return token === '+' || token === '-';
}

/** Whether what stands before a numeral binds it, so that it begins no fraction or mixed number. */
function isFactor(token: Token | undefined): boolean {
  return (
    token === '^' || token === '_' || token === '/' || token === '\\div' || token === '!' || token === ')'
  );
}

/** The tokens of the group that begins at `start`, and where it ends. */
function group(tokens: readonly Token[], start: number): [inner: readonly Token[], end: number] {
  if (tokens[start] !== '{') throw new Unreadable('an argument is missing');
  let depth = 0;
  for (let i = start; i < tokens.length; i++) {
    if (tokens[i] === '{') depth++;
    else if (tokens[i] === '}' && --depth === 0) return [tokens.slice(start + 1, i), i + 1];
  }
  throw new Unreadable('a brace never closes');
}

const maxNodes = 1000;
const maxTerms = 1000;

/** Turns what the parser found into a function of the variables. */
class Compiler {
  readonly #symbols: ReadonlyMap<string, Value>;
  readonly #variables = new Set<string>();
  /** Variables that a sum or product binds, with how often. */
  readonly #bound: string[] = [];
  #isComplex = false;
  #nodes = 0;

  constructor(symbols: ReadonlyMap<string, Value>) {
    this.#symbols = symbols;
  }

  compile(json: Json): Expression {
    const evaluate = this.#node(json);
    return { variables: this.#variables, isComplex: this.#isComplex, evaluate };
  }

  #node(json: Json | undefined): Node {
    if (++this.#nodes > maxNodes) throw new Unreadable('the expression is too long');
    if (json === undefined) throw new Unreadable('an operand is missing');
    if (typeof json === 'number') return this.#numeral(String(json));
    if (typeof json === 'string') return this.#symbol(json);
    if (!Array.isArray(json)) return this.#numeral((json as { num: string }).num);
    const [name, ...operands] = json as readonly [string, ...Json[]];
    if (name === 'InvisibleOperator') return this.#product(operands);
    if (name === 'Sum' || name === 'Product') return this.#series(name, operands);
    if (name === 'Apply') return this.#inverse(operands);
    if (name === 'Delimiter' && operands.length > 2) throw new Unreadable('odd delimiters');
    if (name === 'Delimiter') return this.#node(operands[0]);
    const operation = operations[name];
    if (!operation || operands.length < operation.least || operands.length > operation.most) {
      throw new Unreadable(`${name} of ${operands.length} operands has no meaning here`);
    }
    const nodes = operands.map((operand) => this.#node(operand));
    return (arithmetic, assignment) =>
      operation.apply(
        arithmetic,
        nodes.map((node) => node(arithmetic, assignment)),
      );
  }

  #numeral(text: string): Node {
    const value = parseDecimal(text);
    if (!value) throw new Unreadable(`${text} is no numeral`);
    return () => value;
  }

  #symbol(name: string): Node {
    const known = this.#symbols.get(name);
    if (known) return () => known;
    if (this.#bound.includes(name)) return (_, assignment) => assignment.get(name);
    if (name === 'Pi') return (arithmetic) => arithmetic.pi;
    if (name === 'e' || name === 'ExponentialE') return (arithmetic) => arithmetic.e;
    if (name === 'i' || name === 'ImaginaryUnit') {
      this.#isComplex = true;
      return (arithmetic) => arithmetic.i;
    }
    if (name === 'Nothing' || name.endsWith('Infinity')) throw new Unreadable(`${name} is no number`);
    this.#variables.add(name);
    return (_, assignment) => assignment.get(name);
  }

  /** Factors side by side; a function's name among them is applied to the factor that follows. */
  #product(operands: readonly Json[]): Node {
    const factors: Node[] = [];
    for (let i = 0; i < operands.length; i++) {
      const name = operands[i];
      const operation =
        typeof name === 'string' && !this.#bound.includes(name) ? operations[name] : undefined;
      if (!operation) {
        factors.push(this.#node(name));
        continue;
      }
      const nodes = argumentsOf(operands[++i]).map((operand) => this.#node(operand));
      if (nodes.length < operation.least || nodes.length > operation.most)
        throw new Unreadable('odd arguments');
      factors.push((arithmetic, assignment) =>
        operation.apply(
          arithmetic,
          nodes.map((node) => node(arithmetic, assignment)),
        ),
      );
    }
    return (arithmetic, assignment) =>
      factors.reduce<Maybe>(
        (product, factor) => product && arithmetic.multiply(product, factor(arithmetic, assignment)),
        rational(1n),
      );
  }

  /** A sum or product over whole numbers. */
  #series(name: 'Sum' | 'Product', operands: readonly Json[]): Node {
    const [term, limits] = operands;
    const [, index, from, to] = (Array.isArray(limits) ? limits : []) as (Json | undefined)[];
    if (typeof index !== 'string') throw new Unreadable('odd limits');
    const [first, last] = [this.#node(from), this.#node(to)];
    this.#bound.push(index);
    const body = this.#node(term);
    this.#bound.pop();
    return (arithmetic, assignment) => {
      const [least, greatest] = [first(arithmetic, assignment), last(arithmetic, assignment)];
      if (!isInteger(least) || !isInteger(greatest)) return undefined;
      if (greatest.numerator - least.numerator > maxTerms) return undefined;
      let result: Maybe = rational(name === 'Sum' ? 0n : 1n);
      for (let k = least.numerator; k <= greatest.numerator && result; k++) {
        const value = body(arithmetic, new Map([...assignment, [index, rational(k)]]));
        result = name === 'Sum' ? arithmetic.add(result, value) : arithmetic.multiply(result, value);
      }
      return result;
    };
  }

  /** `\sin^{-1} x`, which is the inverse function of a trigonometric one. */
  #inverse([inverted, operand]: readonly Json[]): Node {
    const name = Array.isArray(inverted) && inverted[0] === 'InverseFunction' ? inverted[1] : undefined;
    return this.#node([`Arc${String(name).toLowerCase()}`, operand as Json]);
  }
}

function argumentsOf(operand: Json | undefined): readonly Json[] {
  if (operand === undefined) throw new Unreadable('an argument is missing');
  if (!Array.isArray(operand) || operand[0] !== 'Delimiter') return [operand];
  const inner = operand[1] as Json | undefined;
  if (Array.isArray(inner) && inner[0] === 'Sequence') return inner.slice(1) as Json[];
  return inner === undefined ? [] : [inner];
}

interface Operation {
  readonly least: number;
  readonly most: number;
  apply(arithmetic: Arithmetic, operands: readonly Maybe[]): Maybe;
}

const one = rational(1n);
const two = rational(2n);

function unary(apply: (arithmetic: Arithmetic, operand: Maybe) => Maybe): Operation {
  return { least: 1, most: 1, apply: (arithmetic, [operand]) => apply(arithmetic, operand) };
}

function binary(apply: (arithmetic: Arithmetic, left: Maybe, right: Maybe) => Maybe): Operation {
  return { least: 2, most: 2, apply: (arithmetic, [left, right]) => apply(arithmetic, left, right) };
}

function folded(apply: (arithmetic: Arithmetic, left: Maybe, right: Maybe) => Maybe): Operation {
  return {
    least: 1,
    most: Number.POSITIVE_INFINITY,
    apply: (arithmetic, [first, ...rest]) =>
      rest.reduce((left, right) => left && apply(arithmetic, left, right), first),
  };
}

const sin = unary((a, x) => a.sinCos(x)[0]);
const cos = unary((a, x) => a.sinCos(x)[1]);
const over = (top: 0 | 1 | undefined, bottom: 0 | 1): Operation =>
  unary((a, x) => {
    const values = a.sinCos(x);
    return a.divide(top === undefined ? one : values[top], values[bottom]);
  });
const inverse = (name: Parameters<Arithmetic['inverse']>[0], ofReciprocal = false): Operation =>
  unary((a, x) => a.inverse(name, ofReciprocal ? a.divide(one, x) : x));
const hyperbolic = (sign: 1 | -1): Operation =>
  unary((a, x) => {
    const backward = a.exp(a.negate(x));
    return a.divide(a.add(a.exp(x), sign > 0 ? backward : a.negate(backward)), two);
  });
const quotientOf = (top: Operation, bottom: Operation): Operation =>
  unary((a, x) => a.divide(top.apply(a, [x]), bottom.apply(a, [x])));
const sinh = hyperbolic(-1);
const cosh = hyperbolic(1);
const log: Operation = {
  least: 1,
  most: 2,
  apply: (a, [x, base]) => a.logarithm(x, base ?? rational(10n)),
};
const lcm = folded((a, x, y) => {
  const divisor = a.gcd(x, y);
  return divisor && a.abs(a.divide(a.multiply(x, y), divisor));
});
const arccot = unary((a, x) => a.subtract(a.divide(a.pi, two), a.inverse('atan', x)));

/** By the parser's names, and by the names that `toLatex` gives to what the parser does not know. */
const operations: Readonly<Record<string, Operation>> = {
  Add: folded((a, x, y) => a.add(x, y)),
  Subtract: binary((a, x, y) => a.subtract(x, y)),
  Negate: unary((a, x) => a.negate(x)),
  Multiply: folded((a, x, y) => a.multiply(x, y)),
  Divide: binary((a, x, y) => a.divide(x, y)),
  Rational: binary((a, x, y) => a.divide(x, y)),
  Power: binary((a, x, y) => a.power(x, y)),
  Square: unary((a, x) => a.multiply(x, x)),
  Sqrt: unary((a, x) => a.root(x, 2n)),
  Root: binary((a, x, degree) =>
    isInteger(degree) ? a.root(x, degree.numerator) : a.power(x, a.divide(one, degree)),
  ),
  Abs: unary((a, x) => a.abs(x)),
  Floor: unary((a, x) => a.floor(x)),
  Ceil: unary((a, x) => a.negate(a.floor(a.negate(x)))),
  Factorial: unary((a, x) => a.factorial(x)),
  Exp: unary((a, x) => a.exp(x)),
  Ln: unary((a, x) => a.ln(x)),
  Log: log,
  Lb: unary((a, x) => a.logarithm(x, two)),
  Sin: sin,
  Cos: cos,
  Tan: over(0, 1),
  Cot: over(1, 0),
  Sec: over(undefined, 1),
  Csc: over(undefined, 0),
  Arcsin: inverse('asin'),
  Arccos: inverse('acos'),
  Arctan: inverse('atan'),
  Arccot: arccot,
  arccot,
  arcsec: inverse('acos', true),
  Arcsec: inverse('acos', true),
  arccsc: inverse('asin', true),
  Arccsc: inverse('asin', true),
  Sinh: sinh,
  Cosh: cosh,
  Tanh: quotientOf(sinh, cosh),
  Coth: quotientOf(cosh, sinh),
  arcsinh: inverse('asinh'),
  arccosh: inverse('acosh'),
  arctanh: inverse('atanh'),
  Degrees: unary((a, x) => a.divide(a.multiply(x, a.pi), rational(180n))),
  Max: folded((a, x, y) => extreme(a, x, y, 1)),
  Min: folded((a, x, y) => extreme(a, x, y, -1)),
  Mod: binary((a, x, y) => a.modulo(x, y)),
  GCD: folded((a, x, y) => a.gcd(x, y)),
  gcd: folded((a, x, y) => a.gcd(x, y)),
  LCM: lcm,
  lcm,
  binomial: binary((a, n, k) => a.binomial(n, k)),
};

function extreme(arithmetic: Arithmetic, x: Maybe, y: Maybe, sign: 1 | -1): Maybe {
  const order = arithmetic.compare(x, y);
  if (order === undefined) return undefined;
  return order * sign >= 0 ? x : y;
}
