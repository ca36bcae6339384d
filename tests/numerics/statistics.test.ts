import { expect, test } from '@jest/globals';
import { chiSquareTail, chiSquareTest } from '../support/statistics.js';

// The values are from tables of the chi-square distribution.
test.each([
  [3.841459, 1, 0.05],
  [18.307038, 10, 0.05],
  [135.806723, 100, 0.01],
  [0.5, 1, 0.4795001],
])('the tail of chi-square at %d with %d degrees of freedom is %d', (statistic, degrees, probability) => {
  expect(chiSquareTail(statistic, degrees)).toBeCloseTo(probability, 6);
});

test('the test accepts draws from the distribution and rejects those of another', () => {
  expect(chiSquareTest([250, 251, 499], [0.25, 0.25, 0.5])).toBeGreaterThan(0.9);
  expect(chiSquareTest([300, 251, 449], [0.25, 0.25, 0.5])).toBeLessThan(0.001);
  expect(chiSquareTest([1, 999], [0, 1])).toBe(0);
});
