import { invalidArgument } from '../errors.js';

export type AdvantageKind = 'group' | 'batch' | 'leave_one_out';

// Keeps a group of nearly equal rewards from blowing up their differences; the value that TRL uses.
const epsilon = 1e-4;

/**
 * The advantage of each completion, in the shape of `rewards` (groups of completions of one prompt each):
 * - `group`: reward less the group's mean, over the group's standard deviation where `scale` (GRPO, Shao et al.
 *   2024; without scale Dr. GRPO, Liu et al. 2025);
 * - `batch`: the same with the standard deviation of the whole batch;
 * - `leave_one_out`: reward less the mean of the group's others (RLOO, Ahmadian et al. 2024); never scaled.
 *
 * Standard deviations are sample ones (n - 1). A group of one has advantage 0.
 */
export function groupAdvantages(
  rewards: readonly (readonly number[])[],
  options: { kind?: AdvantageKind; scale?: boolean } = {},
): number[][] {
  const { kind = 'group', scale = true } = options;
  for (const [i, group] of rewards.entries()) {
    for (const reward of group) {
      if (!Number.isFinite(reward)) throw invalidArgument('rewards', `finite numbers in group ${i}`, reward);
    }
  }
  const batchDeviation = standardDeviation(rewards.flat());
  return rewards.map((group) => {
    if (group.length < 2) return group.map(() => 0);
    const mean = group.reduce((sum, reward) => sum + reward, 0) / group.length;
    if (kind === 'leave_one_out')
      return group.map((reward) => ((reward - mean) * group.length) / (group.length - 1));
    const deviation = kind === 'batch' ? batchDeviation : standardDeviation(group);
    return group.map((reward) => (reward - mean) / (scale ? deviation + epsilon : 1));
  });
}

/** The sample standard deviation (n - 1); 0 of fewer than two values. */
export function standardDeviation(values: readonly number[]): number {
  if (values.length < 2) return 0;
  const mean = values.reduce((sum, value) => sum + value, 0) / values.length;
  return Math.sqrt(values.reduce((sum, value) => sum + (value - mean) ** 2, 0) / (values.length - 1));
}
