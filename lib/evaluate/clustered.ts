import { MerfError } from '../errors.js';

export interface ClusteredMean {
  readonly mean: number;
  /** The standard error of the mean; 0 where there is one cluster alone, which tells nothing of it. */
  readonly error: number;
  /** How many clusters there are. */
  readonly clusters: number;
}

/**
 * The mean of values, and its standard error where values of one cluster go together and clusters are
 * independent: the cluster-robust variance C / (C - 1) * sum over clusters of (sum of the cluster's
 * residuals)^2 / n^2 (Liang and Zeger 1986, "Longitudinal data analysis using generalized linear models";
 * Miller 2024, "Adding error bars to evals", arXiv 2411.00640, without the factor). Where every value is a
 * cluster, that is the usual standard error.
 *
 * @param clusters which cluster each value is of
 * @throws MerfError INVALID_ARGUMENT without values, or where there are not as many clusters
 */
export function clusteredMean(values: readonly number[], clusters: readonly string[]): ClusteredMean {
  const { length } = values;
  if (length === 0) {
    throw new MerfError('INVALID_ARGUMENT', 'Expected at least one of values but received none');
  }
  if (clusters.length !== length) {
    throw new MerfError(
      'INVALID_ARGUMENT',
      `Expected a cluster for each of ${length} values but received ${clusters.length}`,
    );
  }
  const mean = values.reduce((sum, value) => sum + value, 0) / length;
  const residuals = new Map<string, number>();
  values.forEach((value, i) => {
    const cluster = clusters[i] as string;
    residuals.set(cluster, (residuals.get(cluster) ?? 0) + (value - mean));
  });
  const count = residuals.size;
  let squares = 0;
  for (const residual of residuals.values()) squares += residual * residual;
  const error = count === 1 ? 0 : Math.sqrt((squares * count) / (count - 1)) / length;
  return { mean, error, clusters: count };
}
