import { Decimal } from 'decimal.js';

/**
 * A number: an exact rational wherever the operations allow it, else a decimal, else a complex one of two
 * decimals. An operation that has no value (a division by 0, a root that is not real where complex numbers
 * are off, a result too large to be exact) gives undefined.
 */
export type Value = Rational | Real | Complex;

/** numerator / denominator in lowest terms, the denominator positive. */
export interface Rational {
  readonly kind: 'rational';
  readonly numerator: bigint;
  readonly denominator: bigint;
}

export interface Real {
  readonly kind: 'real';
  readonly value: Decimal;
}

export interface Complex {
  readonly kind: 'complex';
  readonly re: Decimal;
  readonly im: Decimal;
}

export type Maybe = Value | undefined;

/**
 * Exact numbers have at most so many bits; what would need more has no value, so that none is wrong in
 * silence.
 */
const maxBits = 1 << 17;
/** The largest number whose factorial is computed. */
const maxFactorial = 2000;
/** Arguments of periodic functions and of the exponential function are at most this large. */
const maxArgument = 1e6;

/** Thrown where evaluating takes more work than an answer is worth. */
export class TooMuchWork extends Error {}

/** Work that is left for the comparison at hand, in about microseconds. */
let budget = 0;

export function renewBudget(work: number): void {
  budget = work;
}

/** @throws TooMuchWork */
function spend(work: number): void {
  budget -= work;
  if (budget < 0) throw new TooMuchWork('the expression takes too much work');
}

export function rational(numerator: bigint, denominator = 1n): Rational {
  if (denominator === 1n) return { kind: 'rational', numerator, denominator };
  const divisor = gcd(numerator, denominator) * (denominator < 0n ? -1n : 1n);
  return { kind: 'rational', numerator: numerator / divisor, denominator: denominator / divisor };
}

/** The exact value of a decimal numeral such as `-1.50`, undefined where the text is none. */
export function parseDecimal(text: string): Rational | undefined {
  const match = /^([+-]?)(\d*)(?:\.(\d*))?(?:[eE]([+-]?\d{1,5}))?$/.exec(text);
  if (!match || !(match[2] || match[3])) return undefined;
  const fraction = match[3] ?? '';
  const digits = BigInt(`${match[1] === '-' ? '-' : ''}${match[2] || '0'}${fraction}`);
  const shift = Number(match[4] ?? 0) - fraction.length;
  if (Math.abs(shift) > 10_000) return undefined;
  return shift >= 0 ? rational(digits * 10n ** BigInt(shift)) : rational(digits, 10n ** BigInt(-shift));
}

export function isInteger(value: Maybe): value is Rational {
  return value?.kind === 'rational' && value.denominator === 1n;
}

function gcd(a: bigint, b: bigint): bigint {
  let [x, y] = [a < 0n ? -a : a, b < 0n ? -b : b];
  while (y !== 0n) [x, y] = [y, x % y];
  return x === 0n ? 1n : x;
}

function bitsOf(value: bigint): number {
  return value.toString(16).length * 4;
}

/** Arithmetic at a precision, over the real or the complex numbers. */
export class Arithmetic {
  readonly #D: typeof Decimal;
  /** Whether the root of -1 has a value. */
  readonly isComplex: boolean;
  readonly #pi: Decimal;

  /**
   * @param digits significant decimal digits
   * @param isComplex whether the root of -1 has a value
   */
  constructor(digits: number, isComplex: boolean) {
    // Numbers beyond 1e±9000 overflow to infinity or 0, which has no value here.
    this.#D = Decimal.clone({ precision: digits, defaults: true, maxE: 9000, minE: -9000 });
    this.isComplex = isComplex;
    this.#pi = this.#D.acos(-1);
  }

  get pi(): Value {
    return { kind: 'real', value: this.#pi };
  }

  get e(): Value {
    return { kind: 'real', value: this.#D.exp(1) };
  }

  get i(): Maybe {
    return this.#complex(new this.#D(0), new this.#D(1));
  }

  /** The absolute value as a double, for tolerances. */
  magnitude(a: Value): Decimal {
    const [re, im] = this.#parts(a);
    return im.isZero() ? re.abs() : re.times(re).plus(im.times(im)).sqrt();
  }

  add(a: Maybe, b: Maybe): Maybe {
    if (!a || !b) return undefined;
    spend(2);
    if (a.kind === 'rational' && b.kind === 'rational') {
      return bounded(
        a.denominator === 1n && b.denominator === 1n
          ? rational(a.numerator + b.numerator)
          : rational(
              a.numerator * b.denominator + b.numerator * a.denominator,
              a.denominator * b.denominator,
            ),
      );
    }
    if (a.kind !== 'complex' && b.kind !== 'complex')
      return this.#real(this.#decimal(a).plus(this.#decimal(b)));
    const [[ar, ai], [br, bi]] = [this.#parts(a), this.#parts(b)];
    return this.#complex(ar.plus(br), ai.plus(bi));
  }

  negate(a: Maybe): Maybe {
    return this.multiply(rational(-1n), a);
  }

  multiply(a: Maybe, b: Maybe): Maybe {
    if (!a || !b) return undefined;
    spend(2);
    if (a.kind === 'rational' && b.kind === 'rational') {
      return bounded(rational(a.numerator * b.numerator, a.denominator * b.denominator));
    }
    if (a.kind !== 'complex' && b.kind !== 'complex')
      return this.#real(this.#decimal(a).times(this.#decimal(b)));
    const [[ar, ai], [br, bi]] = [this.#parts(a), this.#parts(b)];
    return this.#complex(ar.times(br).minus(ai.times(bi)), ar.times(bi).plus(ai.times(br)));
  }

  divide(a: Maybe, b: Maybe): Maybe {
    if (!a || !b || this.isZero(b)) return undefined;
    if (b.kind === 'rational') return this.multiply(a, rational(b.denominator, b.numerator));
    if (b.kind === 'real') return this.multiply(a, this.#real(new this.#D(1).div(b.value)));
    const square = b.re.times(b.re).plus(b.im.times(b.im));
    return this.multiply(a, this.#complex(b.re.div(square), b.im.neg().div(square)));
  }

  power(base: Maybe, exponent: Maybe): Maybe {
    if (!base || !exponent) return undefined;
    if (exponent.kind === 'rational') {
      if (exponent.denominator === 1n) return this.#integerPower(base, exponent.numerator);
      const root = this.root(base, exponent.denominator);
      // In the real numbers the cube root of -8 is -2; its principal complex power is another number.
      if (root && (!this.isComplex || isPositive(base))) return this.#integerPower(root, exponent.numerator);
    }
    if (this.isZero(base)) return isPositive(exponent) ? rational(0n) : undefined;
    return this.exp(this.multiply(exponent, this.ln(base)));
  }

  /**
   * The root of a whole degree: exact where it is rational, the real one of a negative number for odd
   * degrees.
   */
  root(a: Maybe, degree: bigint): Maybe {
    if (!a || degree < 1n || degree > 10_000n) return undefined;
    if (degree === 1n) return a;
    spend(100);
    if (a.kind === 'rational') {
      const numerator = exactRoot(a.numerator, degree);
      const denominator = exactRoot(a.denominator, degree);
      if (numerator !== undefined && denominator !== undefined) return rational(numerator, denominator);
    }
    if (a.kind !== 'complex') {
      const x = this.#decimal(a);
      if (!x.isNegative() || x.isZero()) return this.#real(this.#positiveRoot(x, degree));
      if (!this.isComplex) {
        return degree % 2n === 1n ? this.#real(this.#positiveRoot(x.neg(), degree).neg()) : undefined;
      }
    }
    return this.exp(this.divide(this.ln(a), rational(degree)));
  }

  exp(a: Maybe): Maybe {
    if (!a) return undefined;
    spend(200);
    const [re, im] = this.#parts(a);
    if (re.abs().gt(2e4) || im.abs().gt(maxArgument)) return undefined;
    const scale = re.exp();
    return im.isZero() ? this.#real(scale) : this.#complex(scale.times(im.cos()), scale.times(im.sin()));
  }

  /** The natural logarithm, its principal branch where complex numbers are on. */
  ln(a: Maybe): Maybe {
    if (!a || this.isZero(a)) return undefined;
    spend(200);
    const [re, im] = this.#parts(a);
    if (im.isZero() && re.isPositive()) return this.#real(re.ln());
    return this.#complex(this.magnitude(a).ln(), this.#D.atan2(im, re));
  }

  /**
   * Exact where the logarithm is a whole number or a fraction with a small denominator, as of 8 to the base
   * 4.
   */
  logarithm(a: Maybe, base: Maybe): Maybe {
    const result = this.divide(this.ln(a), this.ln(base));
    if (result?.kind !== 'real' || a?.kind !== 'rational' || base?.kind !== 'rational') return result;
    for (const denominator of [1n, 2n, 3n]) {
      const scaled = result.value.times(Number(denominator));
      const nearest = scaled.round();
      if (scaled.minus(nearest).abs().gt(1e-20) || nearest.abs().gt(10_000)) continue;
      const numerator = BigInt(nearest.toFixed());
      const [left, right] = [this.#integerPower(a, denominator), this.#integerPower(base, numerator)];
      if (left && right && this.compare(left, right) === 0) return rational(numerator, denominator);
    }
    return result;
  }

  abs(a: Maybe): Maybe {
    if (!a) return undefined;
    if (a.kind === 'rational') return a.numerator < 0n ? rational(-a.numerator, a.denominator) : a;
    return this.#real(this.magnitude(a));
  }

  floor(a: Maybe): Maybe {
    if (a?.kind === 'rational') {
      const quotient = a.numerator / a.denominator;
      return rational(
        a.numerator < 0n && quotient * a.denominator !== a.numerator ? quotient - 1n : quotient,
      );
    }
    // A decimal that lies this close to a whole number may be on either side of it.
    if (a?.kind !== 'real' || a.value.minus(a.value.round()).abs().lt(1e-20)) return undefined;
    return parseDecimal(a.value.floor().toFixed());
  }

  /** Sine and cosine at once, from which all the trigonometric functions follow. */
  sinCos(a: Maybe): readonly [sin: Maybe, cos: Maybe] {
    if (!a) return [undefined, undefined];
    if (a.kind === 'rational' && a.numerator === 0n) return [rational(0n), rational(1n)];
    spend(300);
    if (a.kind !== 'complex') {
      const x = this.#decimal(a);
      if (x.abs().gt(maxArgument)) return [undefined, undefined];
      return [this.#real(x.sin()), this.#real(x.cos())];
    }
    const forward = this.exp(this.multiply(this.i, a));
    const backward = this.exp(this.negate(this.multiply(this.i, a)));
    return [
      this.divide(this.subtract(forward, backward), this.multiply(rational(2n), this.i)),
      this.divide(this.add(forward, backward), rational(2n)),
    ];
  }

  subtract(a: Maybe, b: Maybe): Maybe {
    return this.add(a, this.negate(b));
  }

  /** Inverse functions of real arguments. */
  inverse(name: 'asin' | 'acos' | 'atan' | 'asinh' | 'acosh' | 'atanh', a: Maybe): Maybe {
    if (!a || a.kind === 'complex') return undefined;
    spend(300);
    return this.#real(this.#decimal(a)[name]());
  }

  factorial(a: Maybe): Maybe {
    if (!isInteger(a) || a.numerator < 0n || a.numerator > maxFactorial) return undefined;
    spend(Number(a.numerator));
    let product = 1n;
    for (let k = 2n; k <= a.numerator; k++) product *= k;
    return rational(product);
  }

  binomial(n: Maybe, k: Maybe): Maybe {
    if (!isInteger(n) || !isInteger(k) || n.numerator < 0n || n.numerator > maxFactorial) return undefined;
    if (k.numerator < 0n || k.numerator > n.numerator) return rational(0n);
    return this.divide(
      this.factorial(n),
      this.multiply(this.factorial(k), this.factorial(this.subtract(n, k))),
    );
  }

  /** What is left of a division of rationals by a positive one. */
  modulo(a: Maybe, b: Maybe): Maybe {
    if (a?.kind !== 'rational' || b?.kind !== 'rational' || b.numerator <= 0n) return undefined;
    return this.subtract(a, this.multiply(b, this.floor(this.divide(a, b))));
  }

  gcd(a: Maybe, b: Maybe): Maybe {
    return isInteger(a) && isInteger(b) ? rational(gcd(a.numerator, b.numerator)) : undefined;
  }

  isZero(a: Value): boolean {
    if (a.kind === 'rational') return a.numerator === 0n;
    return a.kind === 'real' ? a.value.isZero() : a.re.isZero() && a.im.isZero();
  }

  /**
   * Negative, zero or positive as `a` is less than, equal to or greater than `b`; undefined for complex
   * numbers.
   */
  compare(a: Maybe, b: Maybe): number | undefined {
    if (!a || !b || a.kind === 'complex' || b.kind === 'complex') return undefined;
    if (a.kind === 'rational' && b.kind === 'rational') {
      const difference = a.numerator * b.denominator - b.numerator * a.denominator;
      return difference < 0n ? -1 : difference > 0n ? 1 : 0;
    }
    return this.#decimal(a).comparedTo(this.#decimal(b));
  }

  #integerPower(base: Value, exponent: bigint): Maybe {
    if (exponent < 0n) return this.divide(rational(1n), this.#integerPower(base, -exponent));
    if (base.kind === 'rational') {
      if (base.denominator === 1n && base.numerator >= -1n && base.numerator <= 1n) {
        return exponent === 0n || (base.numerator === -1n && exponent % 2n === 0n) ? rational(1n) : base;
      }
      const bits = Math.max(bitsOf(base.numerator), bitsOf(base.denominator));
      if (exponent > BigInt(maxBits) || bits * Number(exponent) > maxBits) return undefined;
      spend((bits * Number(exponent)) / 100);
      return rational(base.numerator ** exponent, base.denominator ** exponent);
    }
    if (exponent > BigInt(maxBits)) return undefined;
    spend(100);
    if (base.kind === 'real') return this.#real(base.value.pow(Number(exponent)));
    let result: Maybe = rational(1n);
    let square: Maybe = base;
    for (let rest = exponent; rest > 0n; rest >>= 1n) {
      if (rest & 1n) result = this.multiply(result, square);
      square = this.multiply(square, square);
    }
    return result;
  }

  #positiveRoot(x: Decimal, degree: bigint): Decimal {
    if (degree === 2n) return x.sqrt();
    if (degree === 3n) return x.cbrt();
    return x.isZero() ? x : x.ln().div(Number(degree)).exp();
  }

  #decimal(a: Rational | Real): Decimal {
    if (a.kind === 'real') return a.value;
    const numerator = this.#rounded(a.numerator);
    return a.denominator === 1n ? numerator : numerator.div(this.#rounded(a.denominator));
  }

  /** A whole number in about as many digits as count: functions of thousands of digits take minutes. */
  #rounded(a: bigint): Decimal {
    const surplus = bitsOf(a) - 8 * this.#D.precision;
    if (surplus <= 0) return new this.#D(a.toString());
    return new this.#D((a >> BigInt(surplus)).toString()).times(new this.#D(2).pow(surplus));
  }

  #parts(a: Value): readonly [re: Decimal, im: Decimal] {
    return a.kind === 'complex' ? [a.re, a.im] : [this.#decimal(a), new this.#D(0)];
  }

  #real(value: Decimal): Maybe {
    return value.isFinite() ? { kind: 'real', value } : undefined;
  }

  #complex(re: Decimal, im: Decimal): Maybe {
    if (!re.isFinite() || !im.isFinite()) return undefined;
    if (im.isZero()) return this.#real(re);
    return this.isComplex ? { kind: 'complex', re, im } : undefined;
  }
}

function bounded(value: Rational): Maybe {
  const isSmall = (part: bigint) => {
    if (part < 2n ** 64n && part > -(2n ** 64n)) return true;
    const bits = bitsOf(part);
    spend(bits / 100);
    return bits <= maxBits;
  };
  return isSmall(value.numerator) && isSmall(value.denominator) ? value : undefined;
}

function isPositive(value: Value): boolean {
  if (value.kind === 'rational') return value.numerator > 0n;
  return value.kind === 'real' && value.value.isPositive() && !value.value.isZero();
}

/** The whole root of a whole number, undefined where there is none. */
function exactRoot(a: bigint, degree: bigint): bigint | undefined {
  if (a < 0n) {
    const root = degree % 2n === 1n ? exactRoot(-a, degree) : undefined;
    return root === undefined ? undefined : -root;
  }
  if (a < 2n) return a;
  const bits = BigInt(bitsOf(a));
  if (degree >= bits) return undefined;
  // Newton's method from above.
  let x = 1n << (bits / degree + 1n);
  for (;;) {
    const next = ((degree - 1n) * x + a / x ** (degree - 1n)) / degree;
    if (next >= x) break;
    x = next;
  }
  return x ** degree === a ? x : undefined;
}
