import { invalidArgument } from '../errors.js';
import { type FloatDType, kernelCall, openDevice, type Tensor } from './device.js';

export type AdvantageKind = 'group' | 'batch' | 'leave_one_out';

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

export interface GroupAdvantagesArguments extends GroupAdvantagesOptions {
  /** [N] f32, the completions of one prompt beside each other. */
  rewards: Tensor<FloatDType>;
  /** [groups + 1], rising from 0 to N: where each prompt's completions begin. */
  groupOffsets: Int32Array;
}

/**
 * Advantages of completions over the others of their group; 0 for a group of one. Of a tensor of rewards it
 * gives a tensor [N] f32 on its device, of numbers, a group each, numbers in their shape, which the CPU
 * computes.
 * @throws MerfError INVALID_ARGUMENT, which names a reward that is not finite among numbers, DISPOSED,
 *   OUT_OF_MEMORY
 */
export function groupAdvantages(args: GroupAdvantagesArguments): Promise<Tensor<'f32'>>;
export function groupAdvantages(
  rewards: readonly (readonly number[])[],
  options?: GroupAdvantagesOptions,
): Promise<number[][]>;
export async function groupAdvantages(
  given: GroupAdvantagesArguments | readonly (readonly number[])[],
  options: GroupAdvantagesOptions = {},
): Promise<Tensor<'f32'> | number[][]> {
  return isNumbers(given) ? ofNumbers(given, options) : ofTensor(given);
}

function isNumbers(
  given: GroupAdvantagesArguments | readonly (readonly number[])[],
): given is readonly (readonly number[])[] {
  return Array.isArray(given);
}

async function ofTensor(args: GroupAdvantagesArguments): Promise<Tensor<'f32'>> {
  const call = kernelCall(args.rewards, 'rewards');
  return call.tensor(
    await call.device.groupAdvantages({
      rewards: call.handle(args.rewards, 'rewards'),
      groupOffsets: args.groupOffsets,
      kind: args.kind ?? 'group',
      scale: args.scale ?? true,
      epsilon: args.epsilon ?? 1e-4,
    }),
  );
}

async function ofNumbers(
  groups: readonly (readonly number[])[],
  options: GroupAdvantagesOptions,
): Promise<number[][]> {
  const flat: number[] = [];
  const groupOffsets = [0];
  for (const [i, group] of groups.entries()) {
    if (!Array.isArray(group)) throw invalidArgument(`rewards[${i}]`, 'an array of numbers', group);
    for (const [j, reward] of group.entries()) {
      if (!Number.isFinite(Math.fround(reward))) {
        throw invalidArgument(`rewards[${i}][${j}]`, 'a finite number', reward);
      }
      flat.push(reward);
    }
    // A group without completions has no advantages, and the kernel's groups have at least one each.
    if (group.length > 0) groupOffsets.push(flat.length);
  }
  if (flat.length === 0) return groups.map(() => []);
  const rewards = openDevice('cpu').tensor(Float32Array.from(flat));
  const tensor = await ofTensor({ ...options, rewards, groupOffsets: Int32Array.from(groupOffsets) });
  const advantages = await tensor.read();
  rewards.dispose();
  tensor.dispose();
  let from = 0;
  return groups.map(({ length }) => {
    from += length;
    return Array.from(advantages.subarray(from - length, from));
  });
}
