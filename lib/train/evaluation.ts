import { type Evaluation, evaluate } from '../evaluate/index.js';
import { parseMotivationView } from '../prompt/motivation.js';
import { limitsOf, type RolloutPolicy } from '../rollout/index.js';
import type { RowSource, Task } from '../tasks/index.js';
import type { TrainingEvent } from './loop.js';
import type { EvaluationSettings } from './settings.js';

// The order of held-out rows does not depend on a run's seed, so that runs compare.
const heldOutSeed = 0;

/** The first `count` rows that `task` holds out, or all where it has fewer. */
export async function heldOutRows<Row>(task: Task<Row>, count: number): Promise<Row[]> {
  return firstRows(await task.rows({ split: 'test', seed: heldOutSeed }), count);
}

export function firstRows<Row>(source: RowSource<Row>, count: number): Row[] {
  const length = Math.min(count, source.size ?? count);
  return Array.from({ length }, (_, i) => source.at(i));
}

/** The evaluation that is due after `step`, by view of the motivation; undefined where none is. */
export async function evaluateDuringTraining<Row>(options: {
  policy: RolloutPolicy;
  task: Task<Row>;
  rows: readonly Row[];
  settings: EvaluationSettings;
  step: number;
  onEvent?: ((event: TrainingEvent) => void) | undefined;
  signal?: AbortSignal | undefined;
}): Promise<Record<string, Evaluation> | undefined> {
  const { policy, task, rows, settings, step, onEvent, signal } = options;
  const { evaluateEvery, steps } = settings;
  if (evaluateEvery === 0 || (step % evaluateEvery !== 0 && step !== steps)) return undefined;
  onEvent?.({ type: 'phase', phase: 'evaluating', step });
  const results: Record<string, Evaluation> = {};
  for (const text of settings.evaluateMotivations) {
    results[text] = await evaluate(policy, task, rows, {
      samples: settings.evaluateSamples,
      ...(settings.passAt && { passAt: settings.passAt }),
      motivation: parseMotivationView(text),
      ...limitsOf(settings),
      temperature: settings.evaluateTemperature,
      seed: settings.seed,
      signal,
    });
  }
  onEvent?.({ type: 'evaluation', step, results });
  return results;
}
