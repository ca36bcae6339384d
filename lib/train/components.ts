// The value that TRL adds to standard deviations.
const epsilon = 1e-4;

/**
 * Group reward-decoupled normalisation (GDPO, arXiv:2601.05242): every component's scores are centred and divided by
 * their standard deviation within the group, so that a component with a wide range does not drown out the others; their
 * sums are then divided by their standard deviation over the batch. TRL calls it `normalize_then_sum`.
 *
 * @param groups by group and episode the score of each component, in the same order everywhere
 * @returns advantages by group and episode, 0 where all episodes of a group have the same scores
 */
export function normalizeThenSum(groups: readonly (readonly (readonly number[])[])[]): number[][] {
  const sums = groups.map((episodes) => {
    const components = episodes[0]?.length ?? 0;
    const total = new Array<number>(episodes.length).fill(0);
    for (let component = 0; component < components; component++) {
      const scores = episodes.map((episode) => episode[component] as number);
      // Equal scores teach nothing; their mean may differ from them by rounding, which must not become a direction.
      if (scores.every((score) => score === scores[0])) continue;
      const { mean, deviation } = moments(scores);
      for (const [i, score] of scores.entries()) {
        total[i] = (total[i] as number) + (score - mean) / (deviation + epsilon);
      }
    }
    return total;
  });
  // The sums of a group add up to 0, so their mean over the batch is 0 too and need not be taken off.
  const { deviation } = moments(sums.flat());
  return sums.map((group) => group.map((sum) => sum / (deviation + epsilon)));
}

/** The mean and the sample standard deviation (n - 1), which is 0 of fewer than two values. */
function moments(values: readonly number[]): { mean: number; deviation: number } {
  const mean = values.reduce((sum, value) => sum + value, 0) / values.length;
  if (values.length < 2) return { mean, deviation: 0 };
  const squares = values.reduce((sum, value) => sum + (value - mean) ** 2, 0);
  return { mean, deviation: Math.sqrt(squares / (values.length - 1)) };
}
