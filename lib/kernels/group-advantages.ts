import { type FloatDType, kernelCall, type Tensor } from './device.js';

export interface GroupAdvantagesArguments {
  /** [N] f32, the completions of one prompt beside each other. */
  rewards: Tensor<FloatDType>;
  /** [groups + 1], rising from 0 to N: where each prompt's completions begin. */
  groupOffsets: Int32Array;
  /**
   * `group` (default): r - mean of the group, over its standard deviation (GRPO, arXiv:2402.03300; without `scale`
   * Dr. GRPO, arXiv:2503.20783). `batch`: r - mean of the group, over the standard deviation of the whole batch.
   * `leave_one_out`: r - mean of the group's others (RLOO, arXiv:2402.14740).
   */
  kind?: 'group' | 'batch' | 'leave_one_out' | undefined;
  /** Whether to divide by the standard deviation (of n - 1). Default true; leave_one_out does not. */
  scale?: boolean | undefined;
  /** Added to the standard deviation. Default 1e-4. */
  epsilon?: number | undefined;
}

/**
 * Advantages [N] f32 of completions over the others of their group; 0 for a group of one.
 * @throws MerfError INVALID_ARGUMENT, DISPOSED, OUT_OF_MEMORY
 */
export async function groupAdvantages(args: GroupAdvantagesArguments): Promise<Tensor<'f32'>> {
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
