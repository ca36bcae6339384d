/** log Gamma(x), x > 0, by Lanczos' approximation (g = 7, n = 9); relative error below 1e-14. */
function logGamma(x: number): number {
  const coefficients = [
    0.99999999999980993, 676.5203681218851, -1259.1392167224028, 771.32342877765313, -176.61502916214059,
    12.507343278686905, -0.13857109526572012, 9.9843695780195716e-6, 1.5056327351493116e-7,
  ];
  const sum = coefficients.reduce((total, c, i) => (i === 0 ? c : total + c / (x - 1 + i)), 0);
  const t = x + 6.5;
  return 0.5 * Math.log(2 * Math.PI) + (x - 0.5) * Math.log(t) - t + Math.log(sum);
}

/** P(chi-square with `degrees` of freedom >= statistic): the regularised upper incomplete gamma function. */
export function chiSquareTail(statistic: number, degrees: number): number {
  const a = degrees / 2;
  const x = statistic / 2;
  if (x <= 0) return 1;
  const scale = Math.exp(a * Math.log(x) - x - logGamma(a));
  if (x < a + 1) {
    let term = 1 / a;
    let sum = term;
    for (let n = 1; term > sum * 1e-16; ++n) {
      term *= x / (a + n);
      sum += term;
    }
    return 1 - scale * sum;
  }
  // Lentz's continued fraction.
  let b = x + 1 - a;
  let c = 1e300;
  let d = 1 / b;
  let h = d;
  for (let n = 1; n < 10_000; ++n) {
    const an = -n * (n - a);
    b += 2;
    d = 1 / (an * d + b);
    c = b + an / c;
    const delta = d * c;
    h *= delta;
    if (Math.abs(delta - 1) < 1e-15) break;
  }
  return scale * h;
}

/**
 * The p-value of Pearson's test that `counts` were drawn with `probabilities`. Cells expected fewer than 5 times are
 * merged into one; a draw of probability 0 gives 0.
 */
export function chiSquareTest(counts: ArrayLike<number>, probabilities: ArrayLike<number>): number {
  let total = 0;
  for (let i = 0; i < counts.length; ++i) total += counts[i] as number;
  let statistic = 0;
  let cells = 0;
  let restCount = 0;
  let restExpected = 0;
  for (let i = 0; i < probabilities.length; ++i) {
    const expected = total * (probabilities[i] as number);
    const count = counts[i] as number;
    if (expected === 0 && count > 0) return 0;
    if (expected < 5) {
      restCount += count;
      restExpected += expected;
    } else {
      statistic += (count - expected) ** 2 / expected;
      ++cells;
    }
  }
  if (restExpected > 0) {
    statistic += (restCount - restExpected) ** 2 / restExpected;
    ++cells;
  }
  return chiSquareTail(statistic, cells - 1);
}
