import { existsSync, mkdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { whileReading, whileWriting, writeFileAtomically, writeFolderAtomically } from '../atomic-files.js';
import { describeValue, isDeviceLost, MerfError, type MerfErrorCode, throwIfAborted } from '../errors.js';
import type { Evaluation } from '../evaluate/index.js';
import {
  type Checkpoint,
  listCheckpoints,
  loadCheckpoint,
  type Progress,
  removeCheckpoint,
  removeLitter,
  type StatefulPolicy,
  saveCheckpoint,
} from './checkpoint.js';
import { Interruptions } from './interruptions.js';
import type { Kept } from './kept.js';
import { MetricsLog, type MetricsRow } from './metrics.js';
import { RunLock } from './run-lock.js';

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
  /** The step whose checkpoint a resumed run goes on from; later ones are removed. Default: the newest. */
  checkpoint?: number;
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
    signal: AbortSignal,
    progress: StepProgress,
  ) => Promise<{ metrics: Omit<MetricsRow, 'step'>; position: number }>;
}

/** What a step tells of itself while it goes on. */
export interface StepProgress {
  /** Set once the weights are about to change: a step that fails before leaves them as the last one made them. */
  updated: boolean;
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
    const { out, resume } = this.#options;
    let lock: RunLock | undefined;
    const progress: StepProgress = { updated: false };
    const interruptions = new Interruptions(
      signal,
      () => progress.updated,
      () => new MerfError('VERIFIER_TIMEOUT', 'The step did not end after a loop without an end was cut off'),
    );
    try {
      if (resume) readSavedRun(out);
      else whileWriting(out, () => mkdirSync(out, { recursive: true }));
      lock = RunLock.take(out);
      return await this.#run(lock, interruptions, progress, signal);
    } catch (error) {
      throw this.#explained(error);
    } finally {
      interruptions.close();
      lock?.release();
      this.#running = false;
    }
  }

  async #run(
    lock: RunLock,
    interruptions: Interruptions,
    progress: StepProgress,
    given: AbortSignal | undefined,
  ): Promise<RunResult> {
    const { policy, out, resume, settings, onEvent } = this.#options;
    const { signal } = interruptions;
    const { steps } = settings;
    const metricsLog = new MetricsLog(join(out, 'metrics.jsonl'));
    const checkpoints = join(out, 'checkpoints');
    this.#open(checkpoints);
    const loaded = resume ? await this.#load(checkpoints) : undefined;
    let step = loaded?.step ?? 0;
    let position = loaded?.position ?? 0;
    let saved = step;
    metricsLog.truncate(loaded ? step : -1);
    this.#options.discardAfter?.(step);
    onEvent?.({ type: 'start', step, steps, ...(loaded && { resumedFrom: loaded.path }) });

    const save = async () => {
      if (saved === step) return;
      lock.check();
      onEvent?.({ type: 'phase', phase: 'saving', step });
      const state = this.#options.state?.save();
      const kept = settings.keepCheckpoints;
      const path = await saveCheckpoint(checkpoints, policy, { step, position }, kept, state);
      saved = step;
      onEvent?.({ type: 'checkpoint', step, path });
    };
    /** What a failure comes to: the weights are saved where they are those of the last step. */
    const failing = async (error: unknown): Promise<unknown> => {
      const cause = given?.aborted ? error : (interruptions.failure ?? error);
      if (!progress.updated && !given?.aborted && !isDeviceLost(cause)) await save();
      return cause;
    };
    const evaluate = (after: number) =>
      interruptions.await(Promise.resolve(this.#options.evaluate?.(after, signal)));

    let last: MetricsRow | undefined;
    let fruitless = 0;
    if (step === 0) {
      try {
        const evaluation = await evaluate(0);
        if (evaluation) metricsLog.append({ step: 0, evaluation });
      } catch (error) {
        throw await failing(error);
      }
    }
    while (step < steps && !this.#stopping) {
      if (interruptions.failure) throw await failing(interruptions.failure);
      throwIfAborted(signal, `step ${step + 1}`);
      lock.check();
      const retriesBefore = policy.memory?.().retries;
      let result: Awaited<ReturnType<LoopOptions['step']>>;
      try {
        result = await interruptions.await(this.#options.step(step + 1, position, signal, progress));
      } catch (error) {
        throw await failing(error);
      }
      progress.updated = false;
      step += 1;
      position = result.position;
      const metrics: MetricsRow = { step, ...result.metrics };
      if (retriesBefore !== undefined) {
        metrics.memoryRetries = (policy.memory?.().retries ?? retriesBefore) - retriesBefore;
      }
      lock.check();
      try {
        const evaluation = await evaluate(step);
        if (evaluation) metrics.evaluation = evaluation;
      } catch (error) {
        metricsLog.append(metrics);
        throw await failing(error);
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
    if (interruptions.failure) throw interruptions.failure;
    lock.check();
    onEvent?.({ type: 'phase', phase: 'saving', step });
    const model = join(out, 'model');
    await writeFolderAtomically(model, (folder) => policy.save(folder));
    return { step, stopped: step < steps, model, ...(last && { metrics: last }) };
  }

  /** What failed, and what of the run is left where it was something that resuming goes on after. */
  #explained(error: unknown): unknown {
    if (!(error instanceof MerfError) || !leavesRun.has(error.code)) return error;
    const left = whatIsLeft(this.#options.out);
    return new MerfError(error.code, `${error.message}; ${left}`, { cause: error });
  }

  /** Checks the folder against this run, tidies it up and writes run.json. */
  #open(checkpoints: string): void {
    const { out, resume, kind, settings, identity, launch } = this.#options;
    const file = join(out, 'run.json');
    if (!resume && (existsSync(file) || existsSync(checkpoints) || existsSync(join(out, 'metrics.jsonl')))) {
      throw new MerfError(
        'INVALID_ARGUMENT',
        `${out} holds a run already: resume it, or choose another folder`,
      );
    }
    if (resume) {
      const differences = this.#differences(readSavedRun(out));
      if (differences.length > 0) {
        throw new MerfError('RESUME_MISMATCH', `Cannot resume ${out}: ${differences.join('; ')}`);
      }
    }
    removeLitter(out);
    const record: SavedRun = { kind, settings, identity, ...(launch && { launch }) };
    writeFileAtomically(file, `${JSON.stringify(record, null, 2)}\n`);
  }

  /** Loads the checkpoint to go on from, if there is one, and says of one that is not whole which older one is. */
  async #load(folder: string): Promise<(Checkpoint & Progress) | undefined> {
    const { policy, state, checkpoint: wanted } = this.#options;
    const all = listCheckpoints(folder);
    const load = async (from: Checkpoint) => ({ ...from, ...(await loadCheckpoint(from, policy, state)) });
    if (wanted !== undefined) {
      const chosen = all.find(({ step }) => step === wanted);
      if (chosen === undefined) {
        const steps = all.map(({ step }) => step).join(', ') || 'none';
        throw new MerfError(
          'INVALID_ARGUMENT',
          `Expected a step with a checkpoint in ${folder} (${steps}) for checkpoint but received ${wanted}`,
        );
      }
      const loaded = await load(chosen);
      for (const later of all) if (later.step > wanted) removeCheckpoint(later);
      return loaded;
    }
    const newest = all.at(-1);
    if (newest === undefined) return undefined;
    try {
      return await load(newest);
    } catch (error) {
      if (!isOfFiles(error)) throw error;
      for (const older of all.slice(0, -1).reverse()) {
        try {
          await load(older);
        } catch (another) {
          if (isOfFiles(another)) continue;
          throw error;
        }
        throw new MerfError(
          error.code,
          `The newest checkpoint, after step ${newest.step}, is not whole: ${error.message}; the one after step ` +
            `${older.step} is: resume from it with checkpoint ${older.step} (merf: --checkpoint ${older.step})`,
          { cause: error },
        );
      }
      throw new MerfError(
        error.code,
        `The newest checkpoint, after step ${newest.step}, is not whole: ${error.message}; there is no older one that is`,
        { cause: error },
      );
    }
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

/** What there is to go on from after a run in `out` has failed, in words. */
export function whatIsLeft(out: string): string {
  const last = listCheckpoints(join(out, 'checkpoints')).at(-1);
  return last
    ? `resume ${out}, which goes on after step ${last.step} from ${last.path}`
    : `${out} has no checkpoint yet, so the run has to be started again`;
}

/** Failures that have nothing to do with the run's own settings and files. */
const leavesRun: ReadonlySet<MerfErrorCode> = new Set<MerfErrorCode>([
  'DEVICE_LOST',
  'VERIFIER_FAILED',
  'VERIFIER_TIMEOUT',
  'ENVIRONMENT_FAILED',
  'ENVIRONMENT_TIMEOUT',
]);

function isOfFiles(error: unknown): error is MerfError {
  return (
    error instanceof MerfError && ['FILE_NOT_FOUND', 'FILE_FAILED', 'MALFORMED_FILE'].includes(error.code)
  );
}

/** What run.json says of the run in `out`. Throws FILE_NOT_FOUND or MALFORMED_FILE. */
export function readSavedRun(out: string): SavedRun {
  const file = join(out, 'run.json');
  if (!existsSync(file)) throw new MerfError('FILE_NOT_FOUND', `${out} holds no run to resume (no run.json)`);
  const text = whileReading(file, () => readFileSync(file, 'utf8'));
  let run: Partial<SavedRun> | null;
  try {
    run = JSON.parse(text) as Partial<SavedRun> | null;
  } catch (cause) {
    throw new MerfError('MALFORMED_FILE', `Cannot read ${file}: ${String(cause)}`, { cause });
  }
  const isObject = (value: unknown) => typeof value === 'object' && value !== null && !Array.isArray(value);
  const { kind, settings, identity, launch } = run ?? {};
  if ([settings, identity, launch ?? {}].every(isObject) && (kind === 'grpo' || kind === 'sft')) {
    return run as SavedRun;
  }
  throw new MerfError('MALFORMED_FILE', `Expected the kind, settings and identity of a run in ${file}`);
}

function show(value: unknown): string {
  return typeof value === 'object'
    ? JSON.stringify(value)
    : describeValue(value).replace(/ of type string$/, '');
}
