import { invalidArgument } from './errors.js';

export type AdvantageKind = 'group' | 'batch' | 'leave_one_out';
const kinds: readonly AdvantageKind[] = ['group', 'batch', 'leave_one_out'];

export interface GroupAdvantagesOptions {
  /**
   * `group` (default): r - mean of the group, over its standard deviation (GRPO, arXiv:2402.03300; without
   * `scale` Dr. GRPO, arXiv:2503.20783). `batch`: r - mean of the group, over the standard deviation of the
   * whole batch. `leave_one_out`: r - mean of the group's others (RLOO, arXiv:2402.14740).
   */
  kind?: AdvantageKind | undefined;
  /** Whether to divide by the standard deviation (of n - 1). Default true; leave_one_out does not. */
  scale?: boolean | undefined;
  /**
   * Added to the standard deviation, so that a group of nearly equal rewards does not blow up their
   * differences. Default 1e-4, the value that TRL uses.
   */
  epsilon?: number | undefined;
}

export const defaultEpsilon = 1e-4;

/**
 * Advantages of completions over the others of their group; 0 for a group of one. They are computed in float64 from
 * rewards rounded to float32, and rounded to it at last: the numbers of the kernel that does the same over tensors.
 *
 * @param rewards by group and completion
 * @returns advantages in the same shape
 * @throws MerfError INVALID_ARGUMENT, which names a reward that is not finite
 */
export function groupAdvantages(
  rewards: readonly (readonly number[])[],
  options: GroupAdvantagesOptions = {},
): number[][] {
  const { kind = 'group', scale = true, epsilon = defaultEpsilon } = options;
  if (!kinds.includes(kind)) throw invalidArgument('kind', `one of ${kinds.join(', ')}`, kind);
  if (typeof scale !== 'boolean') throw invalidArgument('scale', 'true or false', scale);
  if (!(typeof epsilon === 'number' && epsilon >= 0 && Number.isFinite(Math.fround(epsilon)))) {
    throw invalidArgument('epsilon', 'a non-negative float32', epsilon);
  }
  if (!Array.isArray(rewards)) throw invalidArgument('rewards', 'an array of groups', rewards);
  const added = Math.fround(epsilon);
  const groups = rewards.map(checkedGroup);
  const batchFactor = kind === 'batch' && scale ? 1 / (moments(groups.flat()).deviation + added) : 1;
  return groups.map((group) => {
    const { mean, deviation } = moments(group);
    const count = group.length;
    // r - (sum - r) / (n - 1) = (r - mean) * n / (n - 1)
    const ofOthers = count / (count - 1);
    const ofGroup = scale ? 1 / (deviation + added) : 1;
    const factor = kind === 'group' ? ofGroup : kind === 'batch' ? batchFactor : ofOthers;
    return group.map((reward) => {
      const centred = reward - mean;
      // A group of equal rewards has no direction to push, and with epsilon 0 its factor is infinite.
      return centred === 0 ? 0 : Math.fround(centred * factor);
    });
  });
}

function checkedGroup(group: readonly number[], i: number): number[] {
  if (!Array.isArray(group)) throw invalidArgument(`rewards[${i}]`, 'an array of numbers', group);
  return group.map((reward, j) => {
    const rounded = Math.fround(reward);
    if (typeof reward === 'number' && Number.isFinite(rounded)) return rounded;
    throw invalidArgument(`rewards[${i}][${j}]`, 'a finite number', reward);
  });
}

/** The mean and the sample standard deviation (n - 1), which is 0 of fewer than two values. */
function moments(values: readonly number[]): { mean: number; deviation: number } {
  let sum = 0;
  for (const value of values) sum += value;
  const mean = sum / values.length;
  if (values.length < 2) return { mean, deviation: 0 };
  let squares = 0;
  for (const value of values) squares += (value - mean) * (value - mean);
  return { mean, deviation: Math.sqrt(squares / (values.length - 1)) };
}
