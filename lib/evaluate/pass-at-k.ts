import { invalidArgument } from '../errors.js';

/**
 * The unbiased estimate of the chance that at least one of `k` completions is correct, from `n` drawn of which
 * `correct` were: 1 - C(n - c, k) / C(n, k) (Chen et al. 2021, "Evaluating Large Language Models Trained on Code").
 */
export function passAtK(n: number, correct: number, k: number): number {
  if (!Number.isInteger(k) || k < 1 || k > n) throw invalidArgument('k', `an integer from 1 to n = ${n}`, k);
  if (!Number.isInteger(correct) || correct < 0 || correct > n) {
    throw invalidArgument('correct', `an integer from 0 to n = ${n}`, correct);
  }
  if (n - correct < k) return 1;
  // C(n - c, k) / C(n, k) as a product of ratios, which neither overflows nor cancels.
  let allWrong = 1;
  for (let i = n - correct + 1; i <= n; i++) allWrong *= 1 - k / i;
  return 1 - allWrong;
}
