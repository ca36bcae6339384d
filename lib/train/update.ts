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
  /** True where the gradient was exactly 0 though the forest has something to learn. */
  dead?: true;
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
  return {
    stats,
    gradientNorm,
    learningRate,
    ...(!applied && { skipped: 'gradient' as const }),
    ...(gradientNorm === 0 && hasSignal(forest) && { dead: true as const }),
  };
}

function hasSignal(forest: Forest): boolean {
  return forest.some(({ train, children = [] }) => {
    const { advantage = 1 } = train ?? { advantage: 0 };
    const values = typeof advantage === 'number' ? [advantage] : Array.from(advantage);
    return values.some((value) => value !== 0) || hasSignal(children);
  });
}

/**
 * What to say of an update that did not do what updates are for; undefined for one that did.
 * @param step the step that it is of
 */
export function updateNotice(step: number, { skipped, dead }: UpdateResult): string | undefined {
  if (skipped) return `Step ${step}: the ${skipped} was not finite, so the update was skipped`;
  if (!dead) return undefined;
  return (
    `Step ${step}: the gradient was exactly 0 though there was something to learn: weights that too high a learning rate ` +
    'has moved too far end like that'
  );
}

/** Updates below this change hardly any float32 weight of ordinary size (0.02), whose neighbours are 2^-30 apart. */
const leastLearningRate = 1e-9;

/** What to say of settings with which hardly anything changes; undefined for others. */
export function smallnessNotice({ learningRate, maxGradNorm, epsilon }: UpdateSettings): string | undefined {
  if (learningRate < leastLearningRate) {
    return (
      `The learning rate of ${learningRate} is less than float32 weights of ordinary size can tell apart: hardly any of ` +
      'them will change'
    );
  }
  if (maxGradNorm > 0 && maxGradNorm < epsilon) {
    return (
      `A maxGradNorm of ${maxGradNorm} clips gradients below the epsilon of ${epsilon} that AdamW divides them by: hardly any ` +
      'weight will change'
    );
  }
  return undefined;
}
