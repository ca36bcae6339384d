/** An exact fraction in lowest terms with a positive denominator. */
export interface Rational {
  readonly numerator: bigint;
  readonly denominator: bigint;
}

export type Operation = '+' | '-' | '*' | '/';

export function whole(value: bigint | number): Rational {
  return { numerator: BigInt(value), denominator: 1n };
}

/** The result of `left operation right`; undefined for a division by zero. */
export function apply(operation: Operation, left: Rational, right: Rational): Rational | undefined {
  const { numerator: a, denominator: b } = left;
  const { numerator: c, denominator: d } = right;
  if (operation === '+') return reduced(a * d + c * b, b * d);
  if (operation === '-') return reduced(a * d - c * b, b * d);
  if (operation === '*') return reduced(a * c, b * d);
  return c === 0n ? undefined : reduced(a * d, b * c);
}

export function equals(left: Rational, right: Rational): boolean {
  return left.numerator === right.numerator && left.denominator === right.denominator;
}

/** As in "7", "-2" or "8/3". */
export function formatRational({ numerator, denominator }: Rational): string {
  return denominator === 1n ? `${numerator}` : `${numerator}/${denominator}`;
}

function reduced(numerator: bigint, denominator: bigint): Rational {
  let a = numerator < 0n ? -numerator : numerator;
  let b = denominator < 0n ? -denominator : denominator;
  while (b !== 0n) [a, b] = [b, a % b];
  const divisor = denominator < 0n ? -a : a;
  return { numerator: numerator / divisor, denominator: denominator / divisor };
}
