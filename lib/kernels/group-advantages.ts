import {
  defaultEpsilon,
  type GroupAdvantagesOptions,
  groupAdvantages as ofNumbers,
} from '../group-advantages.js';
import { cancellable } from '../native.js';
import { type FloatDType, kernelCall, type Tensor } from './device.js';

export type { AdvantageKind, GroupAdvantagesOptions } from '../group-advantages.js';

export interface GroupAdvantagesArguments extends GroupAdvantagesOptions {
  /** [N] f32, the completions of one prompt beside each other. */
  rewards: Tensor<FloatDType>;
  /** [groups + 1], rising from 0 to N: where each prompt's completions begin. */
  groupOffsets: Int32Array;
  /** Ends the kernel early: on the CPU in its midst, on other devices before it begins. */
  signal?: AbortSignal | undefined;
}

/**
 * Advantages of completions over the others of their group; 0 for a group of one. Of a tensor of rewards it
 * gives a tensor [N] f32 on its device, of numbers, a group each, numbers in their shape, which are the same.
 * @throws MerfError INVALID_ARGUMENT, which names a reward that is not finite among numbers, DISPOSED,
 *   OUT_OF_MEMORY, ABORTED
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
  const advantages = await cancellable('groupAdvantages', args.signal, (cancel) =>
    call.device.groupAdvantages(
      {
        rewards: call.handle(args.rewards, 'rewards'),
        groupOffsets: args.groupOffsets,
        kind: args.kind ?? 'group',
        scale: args.scale ?? true,
        epsilon: args.epsilon ?? defaultEpsilon,
      },
      cancel,
    ),
  );
  return call.tensor(advantages);
}
