import type { ComputeEngine } from '@cortex-js/compute-engine';
import { type Token, Unreadable } from './latex.js';
import { operations } from './operations.js';
import { toLatex } from './to-latex.js';
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

const notations = ['algebra', 'core', 'arithmetic', 'trigonometry'] as const;

/** Loads the LaTeX parser, which takes a tenth of a second and most answers never need. */
export function loadParser(): Promise<void> {
  loading ??= import('@cortex-js/compute-engine').then(({ ComputeEngine }) => {
    engine = new ComputeEngine();
    // The parser goes through its whole dictionary at every token: with the notation that answers need it is more
    // than twice as fast. The equals sign is that of the limits of sums.
    engine.latexDictionary = [
      ...notations.flatMap((notation) => [...ComputeEngine.getLatexDictionary(notation)]),
      ...ComputeEngine.getLatexDictionary().filter(
        (entry: { readonly name?: string }) => entry.name === 'Equal',
      ),
    ];
  });
  return loading;
}

const literal = new RegExp(
  `^(?<sign>[-+]?) ?(?:${[
    '(?<decimal>[\\d.]+)',
    '(?:(?<whole>\\d+) )?\\\\frac \\{ (?<top>-? ?\\d+) \\} \\{ (?<bottom>\\d+) \\}',
    '(?<over>[\\d.]+) / (?<under>[\\d.]+)',
    '(?<factor>[\\d.]+) (?:\\\\times|\\\\cdot|\\*) 10 \\^ \\{ (?<exponent>[-+]? ?\\d{1,4}) \\}',
  ].join('|')})$`,
);

/**
 * The number that tokens write without any letters: a numeral, a fraction of numerals, a mixed number, or a
 * power of ten times a numeral. Undefined for all else.
 */
export function literalOf(tokens: readonly Token[]): Rational | undefined {
  const match = literal.exec(tokens.join(' '))?.groups;
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
    const operation = Object.hasOwn(operations, name) ? operations[name] : undefined;
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
        typeof name === 'string' && !this.#bound.includes(name) && Object.hasOwn(operations, name)
          ? operations[name]
          : undefined;
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
