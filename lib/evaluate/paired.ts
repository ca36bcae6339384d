import { MerfError } from '../errors.js';
import { clusteredMean } from './clustered.js';
import type { RowResult } from './evaluate.js';

export interface PairedDifference {
  /** Mean accuracy of the first less that of the second. */
  readonly difference: number;
  /** Standard error of `difference`, rows that the task takes for the same being one cluster. */
  readonly error: number;
  readonly rows: number;
  /** How many of the rows are distinct. */
  readonly clusters: number;
}

/**
 * How much more accurate one evaluation was than another on the same rows. Row by row, a hard row is hard for
 * both, so that the difference is known better than the two accuracies are.
 *
 * @param a what `evaluate` gave of each row, by its `onRow`
 * @throws MerfError INVALID_ARGUMENT where the two are not of the same rows in the same order
 */
export function pairedDifference(a: readonly RowResult[], b: readonly RowResult[]): PairedDifference {
  if (a.length !== b.length) {
    throw new MerfError(
      'INVALID_ARGUMENT',
      `Expected evaluations of the same rows but received ${a.length} rows and ${b.length}`,
    );
  }
  const differs = a.findIndex(({ identity }, i) => identity !== b[i]?.identity);
  if (differs >= 0) {
    throw new MerfError(
      'INVALID_ARGUMENT',
      `Expected evaluations of the same rows but they differ in row ${differs + 1}`,
    );
  }
  const { mean, error, clusters } = clusteredMean(
    a.map(({ accuracy }, i) => accuracy - (b[i] as RowResult).accuracy),
    a.map(({ identity }) => identity),
  );
  return { difference: mean, error, rows: a.length, clusters };
}
