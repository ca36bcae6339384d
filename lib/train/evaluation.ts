import { type Evaluation, evaluate } from '../evaluate/index.js';
import { type MotivationView, parseMotivationView } from '../prompt/motivation.js';
import { limitsOf, PromptLengths, type RolloutPolicy } from '../rollout/index.js';
import type { RowSource, Task } from '../tasks/index.js';
import type { TrainingEvent } from './loop.js';
import { findOverlong, type OverlongOptions } from './overlong-rows.js';
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

/**
 * The rows whose prompts fit into the context under every view that is evaluated.
 * @throws MerfError as `findOverlong` does
 */
export async function fittingRows<Row>(
  rows: readonly Row[],
  options: {
    policy: RolloutPolicy;
    task: Task<Row>;
    views: readonly MotivationView[];
  } & Pick<OverlongOptions<Row>, 'filter' | 'setting' | 'onEvent' | 'signal'>,
): Promise<Row[]> {
  const { policy, task, views, ...others } = options;
  const lengths = new PromptLengths({ policy, task, views });
  const overlong = await findOverlong(rows, {
    ...others,
    what: 'prompts of evaluations',
    count: rows.length,
    measure: (row) => lengths.overlong(row),
    contextLength: policy.contextLength,
  });
  return rows.filter((row) => !overlong.has(row));
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
