import { throwIfAborted } from '../errors.js';
import type { Forest, Loss, LossStats, Policy } from '../policy/index.js';
import { emptyStatistics } from '../policy/loss.js';
import { learningRateAt, type ScheduleKind } from './schedule.js';

export interface UpdateSettings {
  learningRate: number;
  schedule: ScheduleKind;
  warmupSteps: number;
  decaySteps?: number | undefined;
  minLearningRate: number;
  beta1: number;
  beta2: number;
  epsilon: number;
  weightDecay: number;
  maxGradNorm: number;
  batchTokens?: number | undefined;
}

export interface UpdateResult {
  /** Undefined where the loss was not finite. */
  stats?: LossStats;
  /** Before clipping. */
  gradientNorm: number;
  learningRate: number;
  /** What was not finite, so that nothing was updated. */
  skipped?: 'loss' | 'gradient';
}

/**
 * One optimizer update on the loss over `forest`, skipped where the loss or the gradient is not finite. An empty forest
 * has no gradient; the optimizer's moments move the weights all the same.
 * @param options.beforeUpdate called once the weights are about to change
 * @throws MerfError ABORTED before the weights change
 */
export async function update(
  policy: Pick<Policy, 'forwardBackward' | 'optimStep' | 'zeroGradients'>,
  forest: Forest,
  loss: Loss,
  settings: UpdateSettings,
  options: { step: number; signal?: AbortSignal | undefined; beforeUpdate: () => void },
): Promise<UpdateResult> {
  const { step, signal, beforeUpdate } = options;
  const learningRate = learningRateAt(step, { kind: settings.schedule, ...settings });
  const stats =
    forest.length === 0
      ? { ...emptyStatistics(), logprobs: [] }
      : await policy.forwardBackward(forest, loss, { maxTokens: settings.batchTokens, signal });
  // Where the signal fires behind the last gradient, they wait for an update that does not come.
  if (signal?.aborted) await policy.zeroGradients();
  throwIfAborted(signal, `step ${step}`);
  if (!stats.finite) return { gradientNorm: Number.NaN, learningRate, skipped: 'loss' };
  beforeUpdate();
  const { beta1, beta2, epsilon, weightDecay, maxGradNorm } = settings;
  const { gradientNorm, applied } = await policy.optimStep({
    learningRate,
    beta1,
    beta2,
    epsilon,
    weightDecay,
    maxGradNorm,
  });
  return { stats, gradientNorm, learningRate, ...(!applied && { skipped: 'gradient' }) };
}

export function skippedNotice(step: number, skipped: 'loss' | 'gradient'): string {
  return `Step ${step}: the ${skipped} was not finite, so the update was skipped`;
}
