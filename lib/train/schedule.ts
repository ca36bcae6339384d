import { invalidArgument } from '../errors.js';

export type ScheduleKind = 'constant' | 'linear' | 'cosine';
export const scheduleKinds: readonly ScheduleKind[] = ['constant', 'linear', 'cosine'];

export interface ScheduleOptions {
  kind: ScheduleKind;
  /** The rate that warm-up rises to. */
  learningRate: number;
  /** Steps over which the rate rises linearly; 0 for none. */
  warmupSteps?: number;
  /** The step at which a linear or cosine decay reaches `minLearningRate`. */
  decaySteps?: number;
  minLearningRate?: number;
}

/**
 * The learning rate of step `step`, counted from 1. Warm-up gives step s the share s / warmupSteps of the rate;
 * linear and cosine fall from the end of warm-up to `decaySteps` and stay at `minLearningRate` after it.
 */
export function learningRateAt(step: number, options: ScheduleOptions): number {
  const { kind, learningRate, warmupSteps = 0, decaySteps = 0, minLearningRate = 0 } = options;
  if (!scheduleKinds.includes(kind)) throw invalidArgument('schedule', scheduleKinds.join(', '), kind);
  if (step <= warmupSteps) return (learningRate * step) / warmupSteps;
  if (kind === 'constant') return learningRate;
  const span = decaySteps - warmupSteps;
  // Step 1 without warm-up has the whole rate, and step decaySteps is the last whose rate is above the minimum.
  const progress = span <= 0 ? 1 : Math.min(1, (step - 1 - warmupSteps) / span);
  const share = kind === 'linear' ? 1 - progress : 0.5 * (1 + Math.cos(Math.PI * progress));
  return minLearningRate + (learningRate - minLearningRate) * share;
}
