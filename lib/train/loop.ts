import { existsSync, mkdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { writeFileAtomically, writeFolderAtomically } from '../atomic-files.js';
import { describeValue, isDeviceLost, MerfError, throwIfAborted } from '../errors.js';
import type { Evaluation } from '../evaluate/index.js';
import {
  type Checkpoint,
  listCheckpoints,
  loadCheckpoint,
  type StatefulPolicy,
  saveCheckpoint,
} from './checkpoint.js';
import type { Kept } from './kept.js';
import { MetricsLog, type MetricsRow } from './metrics.js';

export type Phase = 'rollout' | 'training' | 'evaluating' | 'saving';

/** What happens in a run, for terminals and logs. */
export type TrainingEvent =
  | { type: 'start'; step: number; steps: number; resumedFrom?: string }
  | { type: 'phase'; phase: Phase; step: number }
  | { type: 'step'; step: number; steps: number; metrics: MetricsRow }
  | { type: 'evaluation'; step: number; results: Record<string, Evaluation> }
  | { type: 'checkpoint'; step: number; path: string }
  | { type: 'notice'; message: string };

export interface SavedRun {
  kind: 'grpo' | 'sft';
  /** Every setting of the run, defaults included. */
  settings: Record<string, unknown>;
  /** What the run was given, told apart by content: model, task, data. */
  identity: Record<string, string>;
  /** How the command line was called, so that --resume needs nothing else. */
  launch?: Record<string, unknown>;
}

export interface LoopPolicy extends StatefulPolicy {
  save(folder: string): Promise<void>;
  memory?(): { retries?: number };
}

export interface LoopOptions {
  kind: SavedRun['kind'];
  policy: LoopPolicy;
  out: string;
  resume: boolean;
  settings: { steps: number; saveEvery: number; keepCheckpoints: number } & Record<string, unknown>;
  /** The settings in which a resumed run may not differ. */
  matters: readonly string[];
  /** What a run has whose run.json, written before there was such a setting, does not name it. */
  defaults: Readonly<Record<string, unknown>>;
  identity: Record<string, string>;
  launch?: Record<string, unknown>;
  onEvent?: (event: TrainingEvent) => void;
  /** Drops what a step that is to be done again left behind. */
  discardAfter?: (step: number) => void;
  /** What the steps keep from one to the next beside the policy, as JSON: it goes into checkpoints and comes back. */
  state?: Kept;
  /** The evaluation due after `step` (0: before the first), or undefined. */
  evaluate?: (step: number, signal?: AbortSignal) => Promise<Record<string, unknown> | undefined>;
  /** Does step `step`, counted from 1, from row `position` on. */
  step: (
    step: number,
    position: number,
    signal?: AbortSignal,
  ) => Promise<{ metrics: Omit<MetricsRow, 'step'>; position: number }>;
}

export interface RunResult {
  /** Steps done, by this call and those before it. */
  step: number;
  /** True where stop() ended the run before its last step. */
  stopped: boolean;
  /** The folder that the trained model was saved to, in Hugging Face layout. */
  model: string;
  /** The last step's row of metrics.jsonl, or undefined where no step was left to do. */
  metrics?: MetricsRow;
}

// After so many steps in a row without one finite update the weights will not recover.
const hopelessSteps = 10;

/**
 * The life of a run, whatever a step is: its folder, metrics, evaluations, checkpoints, resuming and stopping.
 * Layout of the folder: run.json, metrics.jsonl, completions/, checkpoints/step-000050/, model/.
 */
export class TrainingLoop {
  readonly #options: LoopOptions;
  #stopping = false;
  #running = false;

  constructor(options: LoopOptions) {
    this.#options = options;
  }

  /** Ends the run after the step in progress, which is then saved. */
  stop(): void {
    this.#stopping = true;
  }

  async run(signal?: AbortSignal): Promise<RunResult> {
    if (this.#running) throw new MerfError('BUSY', 'This trainer is running already');
    this.#running = true;
    try {
      return await this.#run(signal);
    } catch (error) {
      throw this.#explained(error);
    } finally {
      this.#running = false;
    }
  }

  async #run(signal?: AbortSignal): Promise<RunResult> {
    const { policy, out, settings, onEvent } = this.#options;
    const { steps } = settings;
    const metricsLog = new MetricsLog(join(out, 'metrics.jsonl'));
    const checkpoints = join(out, 'checkpoints');
    const checkpoint = this.#open(checkpoints);
    let step = checkpoint?.step ?? 0;
    let position = checkpoint?.position ?? 0;
    let saved = step;
    if (checkpoint) {
      await loadCheckpoint(checkpoint, policy);
      if (checkpoint.state !== undefined) this.#options.state?.load(checkpoint.state);
    }
    metricsLog.truncate(checkpoint ? step : -1);
    this.#options.discardAfter?.(step);
    onEvent?.({ type: 'start', step, steps, ...(checkpoint && { resumedFrom: checkpoint.path }) });

    const save = async () => {
      if (saved === step) return;
      onEvent?.({ type: 'phase', phase: 'saving', step });
      const progress = { step, position };
      const state = this.#options.state?.save();
      const path = await saveCheckpoint(checkpoints, policy, progress, settings.keepCheckpoints, state);
      saved = step;
      onEvent?.({ type: 'checkpoint', step, path });
    };

    let last: MetricsRow | undefined;
    let fruitless = 0;
    if (step === 0) {
      const evaluation = await this.#options.evaluate?.(0, signal);
      if (evaluation) metricsLog.append({ step: 0, evaluation });
    }
    while (step < steps && !this.#stopping) {
      throwIfAborted(signal, `step ${step + 1}`);
      const retriesBefore = policy.memory?.().retries;
      let result: Awaited<ReturnType<LoopOptions['step']>>;
      try {
        result = await this.#options.step(step + 1, position, signal);
      } catch (error) {
        // A step that fails before its first update leaves the weights as the last step made them.
        if (error instanceof StepFailed) {
          if (!error.updated && !signal?.aborted && !isDeviceLost(error.cause)) await save();
          throw error.cause;
        }
        throw error;
      }
      step += 1;
      position = result.position;
      const metrics: MetricsRow = { step, ...result.metrics };
      if (retriesBefore !== undefined) {
        metrics.memoryRetries = (policy.memory?.().retries ?? retriesBefore) - retriesBefore;
      }
      try {
        const evaluation = await this.#options.evaluate?.(step, signal);
        if (evaluation) metrics.evaluation = evaluation;
      } catch (error) {
        metricsLog.append(metrics);
        if (!signal?.aborted && !isDeviceLost(error)) await save();
        throw error;
      }
      metricsLog.append(metrics);
      last = metrics;
      onEvent?.({ type: 'step', step, steps, metrics });
      fruitless = metrics.updates === 0 ? fruitless + 1 : 0;
      if (fruitless === hopelessSteps) {
        throw new MerfError(
          'NON_FINITE',
          `No update of the last ${hopelessSteps} steps was finite; the last checkpoint holds the weights before them`,
        );
      }
      if (fruitless === 0 && settings.saveEvery > 0 && step % settings.saveEvery === 0) await save();
    }
    await save();
    onEvent?.({ type: 'phase', phase: 'saving', step });
    const model = join(out, 'model');
    await writeFolderAtomically(model, (folder) => policy.save(folder));
    return { step, stopped: step < steps, model, ...(last && { metrics: last }) };
  }

  /** Where the GPU was lost, and with it the weights: what of the run is left. */
  #explained(error: unknown): unknown {
    if (!isDeviceLost(error)) return error;
    const { out } = this.#options;
    const last = listCheckpoints(join(out, 'checkpoints')).at(-1);
    const left = last
      ? `resume ${out}, which goes on after step ${last.step} from ${last.path}`
      : `${out} has no checkpoint yet, so the run has to be started again`;
    return new MerfError('DEVICE_LOST', `${error.message}; ${left}`, { cause: error });
  }

  /** Checks the folder against this run, writes run.json, and returns the checkpoint to go on from. */
  #open(checkpoints: string): Checkpoint | undefined {
    const { out, resume, kind, settings, identity, launch } = this.#options;
    const file = join(out, 'run.json');
    if (!resume && (existsSync(file) || existsSync(checkpoints) || existsSync(join(out, 'metrics.jsonl')))) {
      throw new MerfError(
        'INVALID_ARGUMENT',
        `${out} holds a run already: resume it, or choose another folder`,
      );
    }
    if (resume) {
      const before = readSavedRun(out);
      const differences = this.#differences(before);
      if (differences.length > 0) {
        throw new MerfError('RESUME_MISMATCH', `Cannot resume ${out}: ${differences.join('; ')}`);
      }
    }
    mkdirSync(out, { recursive: true });
    const record: SavedRun = { kind, settings, identity, ...(launch && { launch }) };
    writeFileAtomically(file, `${JSON.stringify(record, null, 2)}\n`);
    return resume ? listCheckpoints(checkpoints).at(-1) : undefined;
  }

  #differences(before: SavedRun): string[] {
    const { kind, settings, identity, matters, defaults } = this.#options;
    if (before.kind !== kind) return [`kind was ${before.kind} and is ${kind}`];
    const differences: string[] = [];
    const compare = (key: string, was: unknown, is: unknown) => {
      if (JSON.stringify(was) !== JSON.stringify(is))
        differences.push(`${key} was ${show(was)} and is ${show(is)}`);
    };
    for (const key of matters) compare(key, before.settings[key] ?? defaults[key], settings[key]);
    for (const key of new Set([...Object.keys(before.identity), ...Object.keys(identity)])) {
      compare(key, before.identity[key], identity[key]);
    }
    return differences;
  }
}

/** Thrown by a step's function around what went wrong, to say whether the weights had changed by then. */
export class StepFailed extends Error {
  readonly updated: boolean;

  constructor(cause: unknown, updated: boolean) {
    super('A training step failed', { cause });
    this.updated = updated;
  }
}

/** What run.json says of the run in `out`. Throws FILE_NOT_FOUND or MALFORMED_FILE. */
export function readSavedRun(out: string): SavedRun {
  const file = join(out, 'run.json');
  if (!existsSync(file)) throw new MerfError('FILE_NOT_FOUND', `${out} holds no run to resume (no run.json)`);
  try {
    const run = JSON.parse(readFileSync(file, 'utf8')) as SavedRun;
    if (typeof run.settings === 'object' && typeof run.identity === 'object') return run;
  } catch (cause) {
    throw new MerfError('MALFORMED_FILE', `Cannot read ${file}: ${String(cause)}`, { cause });
  }
  throw new MerfError('MALFORMED_FILE', `Expected settings and identity in ${file}`);
}

function show(value: unknown): string {
  return typeof value === 'object'
    ? JSON.stringify(value)
    : describeValue(value).replace(/ of type string$/, '');
}
