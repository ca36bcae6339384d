/** The largest absolute difference; NaN where the lengths differ or a value is not finite. */
export function largestGap(actual: ArrayLike<number>, expected: ArrayLike<number>): number {
  if (actual.length !== expected.length) return Number.NaN;
  let gap = 0;
  for (let i = 0; i < expected.length; ++i) {
    const difference = Math.abs((actual[i] as number) - (expected[i] as number));
    if (!(difference < Number.POSITIVE_INFINITY)) return Number.NaN;
    gap = Math.max(gap, difference);
  }
  return gap;
}

/** ||actual - expected|| / ||expected||, the relative error of a whole tensor; NaN where the lengths differ. */
export function relativeError(actual: ArrayLike<number>, expected: ArrayLike<number>): number {
  if (actual.length !== expected.length) return Number.NaN;
  let difference = 0;
  let norm = 0;
  for (let i = 0; i < expected.length; ++i) {
    difference += ((actual[i] as number) - (expected[i] as number)) ** 2;
    norm += (expected[i] as number) ** 2;
  }
  return Math.sqrt(difference / norm);
}
