import type { Arithmetic, Maybe } from './value.js';
import { isInteger, rational } from './value.js';

/** A function of values, with how many it takes. */
export interface Operation {
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
export const operations: Readonly<Record<string, Operation>> = {
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
