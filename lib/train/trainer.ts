import { existsSync } from 'node:fs';
import { join } from 'node:path';
import { MerfError } from '../errors.js';
import type { Evaluation } from '../evaluate/index.js';
import { groupAdvantages } from '../kernels/group-advantages.js';
import { countTokens, forestOf, type Loss, type Policy } from '../policy/index.js';
import {
  formatMotivation,
  type Motivation,
  type MotivationView,
  motivationAt,
  parseMotivation,
} from '../prompt/motivation.js';
import {
  branchesOf,
  collect,
  countDrawn,
  type EpisodeGroup,
  EpisodeTally,
  limitsOf,
  type RolloutPolicy,
} from '../rollout/index.js';
import { keysThatMatter, parseSettings } from '../settings.js';
import { type RowSource, shuffledRows, type Task } from '../tasks/index.js';
import { CompletionLog, recordsOf } from './completions.js';
import { evaluateDuringTraining, heldOutRows } from './evaluation.js';
import { contentHash, fingerprint } from './identity.js';
import { type RunResult, StepFailed, type TrainingEvent, TrainingLoop } from './loop.js';
import { type GrpoOptions, type GrpoSettings, grpoSchema } from './settings.js';
import { skippedNotice, type UpdateResult, update } from './update.js';

/** What a trainer asks of a policy: the four primitives and the files. `Policy` has it all. */
export type TrainablePolicy = Omit<RolloutPolicy, 'tokenizer'> &
  Pick<
    Policy,
    'forwardBackward' | 'optimStep' | 'zeroGradients' | 'tokenizer' | 'save' | 'saveState' | 'loadState'
  > &
  Partial<Pick<Policy, 'memory'>> & { readonly path?: string };

export type ReferencePolicy = Pick<Policy, 'score'>;

export interface TrainerOptions<Row> extends GrpoOptions {
  policy: TrainablePolicy;
  task: Task<Row>;
  /** Rows to train on (default: the task's own). */
  rows?: readonly Row[];
  /** Held-out rows to evaluate on (default: the task's own). */
  evaluationRows?: readonly Row[];
  /** What the KL penalty holds the policy to; asked for where `kl` is above 0. */
  reference?: ReferencePolicy;
  /** The run's folder: metrics.jsonl, completions/, checkpoints/ and, in the end, model/. */
  out: string;
  /** Goes on with the run in `out` from its newest checkpoint. */
  resume?: boolean;
  onEvent?: (event: TrainingEvent) => void;
  /** Kept in run.json, for those who start the run again. */
  launch?: Record<string, unknown>;
}

/** One row of metrics.jsonl. Times are in seconds; entropy and KL in nats a token. */
export interface GrpoMetrics {
  step: number;
  motivation: string;
  reward: number;
  rewardStd: number;
  /** Mean score of each component, and the share of completions in each of its cases. */
  parts: Record<string, number>;
  cases: Record<string, Record<string, number>>;
  /** Share of episodes that reach the highest total. */
  correct: number;
  /** Share of groups whose completions all have the same reward, which teach nothing. */
  uniformGroups: number;
  /** Mean tokens that the model drew in an episode, and the share of episodes that ran out of them. */
  length: number;
  truncated: number;
  /** Mean turns of the model in an episode, and the share in which the environment failed, where there is one. */
  turns?: number;
  failures?: number;
  entropy: number;
  loss: number | null;
  /** Mean k3 estimate against the reference; null without one. */
  kl: number | null;
  clipFraction: number | null;
  ratio: { mean: number; min: number; max: number } | null;
  gradientNorm: number | null;
  learningRate: number;
  /** Optimizer updates applied and skipped, the latter for a loss or gradient that was not finite. */
  updates: number;
  skippedUpdates: number;
  rolloutTokensPerSecond: number;
  trainingTokensPerSecond: number;
  /** How often work of this step waited for the GPU's memory pool (see `Policy.memory`); on a GPU only. */
  memoryRetries?: number;
  seconds: number;
  /** Of the engine and, where they took longer, of environments. */
  rolloutSeconds: number;
  /** What verifiers took beyond the rollout, which they run beside. */
  judgingSeconds: number;
  trainingSeconds: number;
  /** By view of the motivation, where the step was followed by an evaluation. */
  evaluation?: Record<string, Evaluation>;
}

const stepsBeforeAdvice = 3;

/**
 * Group relative policy optimization (GRPO, Shao et al. 2024) with the reward specification in the prompt.
 *
 *     const trainer = new Trainer({ policy, task, out: 'runs/first', steps: 50, learningRate: 1e-5 });
 *     await trainer.run();
 */
export class Trainer<Row = unknown> {
  readonly settings: GrpoSettings;
  readonly #options: TrainerOptions<Row>;
  readonly #motivation: Motivation;
  readonly #completions: CompletionLog;
  #loop: TrainingLoop | undefined;
  #stopping = false;
  #stepsWithoutSignal = 0;

  /** @throws MerfError INVALID_CONFIG naming the setting, INVALID_ARGUMENT for a view that the task does not have */
  constructor(options: TrainerOptions<Row>) {
    const { policy, task, rows, evaluationRows, reference, out, resume, onEvent, launch, ...settings } =
      options;
    const parsed = parseSettings(grpoSchema, settings);
    if (parsed.schedule !== 'constant') parsed.decaySteps ??= parsed.steps;
    parsed.scaleAdvantages ??= parsed.loss !== 'dr_grpo';
    if (parsed.promptsPerStep % parsed.miniBatches !== 0) {
      throw new MerfError(
        'INVALID_CONFIG',
        `Expected miniBatches to divide promptsPerStep = ${parsed.promptsPerStep} but it was ${parsed.miniBatches}`,
      );
    }
    if (parsed.kl > 0 && reference === undefined) {
      throw new MerfError('INVALID_CONFIG', `Expected a reference policy where kl = ${parsed.kl} is above 0`);
    }
    this.settings = parsed;
    this.#options = options;
    this.#motivation = parseMotivation(parsed.motivation);
    this.#completions = new CompletionLog(join(out, 'completions'));
    checkViews(task, [parsed.motivation, ...parsed.evaluateMotivations]);
  }

  /**
   * Trains until `steps` are done or stop() is called. `signal` gives up at once: what the step in progress did is
   * lost, the last checkpoint stays.
   * @throws MerfError ABORTED, RESUME_MISMATCH, VERIFIER_FAILED, VERIFIER_TIMEOUT, NON_FINITE, DEVICE_LOST naming the
   *   checkpoint to go on from, and what the policy throws
   */
  async run(options: { signal?: AbortSignal } = {}): Promise<RunResult> {
    const { policy, task, out, resume, onEvent, launch } = this.#options;
    const settings = this.settings;
    const given = this.#options.rows;
    const rows = given
      ? shuffledRows(given, settings.seed)
      : await task.rows({ split: 'train', seed: settings.seed });
    const evaluationRows =
      this.#options.evaluationRows?.slice(0, settings.evaluatePrompts) ??
      (settings.evaluateEvery > 0 ? await heldOutRows(task, settings.evaluatePrompts) : []);
    this.#loop = new TrainingLoop({
      kind: 'grpo',
      policy,
      out,
      resume: resume ?? false,
      settings,
      matters: keysThatMatter(grpoSchema),
      identity: {
        ...modelIdentity(policy),
        task: task.name,
        rules: contentHash([task.spec.describe('full'), task.messages(rows.at(0), 'full')]),
        ...(task.environment && { environment: contentHash([environmentOf(task)]) }),
        data: rows.fingerprint.slice(0, 16),
        ...(settings.motivation.includes('template:') && { template: contentHash([this.#motivation]) }),
      },
      ...(launch && { launch }),
      ...(onEvent && { onEvent }),
      discardAfter: (step) => this.#completions.discardAfter(step),
      evaluate: (step, signal) =>
        evaluateDuringTraining({ policy, task, rows: evaluationRows, settings, step, onEvent, signal }),
      step: (step, position, signal) => this.#step(rows, step, position, signal),
    });
    if (this.#stopping) this.#loop.stop();
    return this.#loop.run(options.signal);
  }

  /** Ends the run after the step in progress, which is then saved. */
  stop(): void {
    this.#stopping = true;
    this.#loop?.stop();
  }

  async #step(source: RowSource<Row>, step: number, position: number, signal?: AbortSignal) {
    let updated = false;
    try {
      const clock = new Stopwatch();
      const view = motivationAt(this.#motivation, step - 1);
      const rows = Array.from({ length: this.settings.promptsPerStep }, (_, i) => source.at(position + i));
      const times = { rollout: 0, judging: 0 };
      const groups = await this.#collect(rows, view, step, signal, times);
      clock.lap();

      const { advantage: kind, scaleAdvantages: scale = true } = this.settings;
      const rewards = groups.map(({ episodes }) => episodes.map(({ reward }) => reward.total));
      const advantages = await groupAdvantages(rewards, { kind, scale });
      const updates = await this.#update(groups, advantages, step, signal, () => {
        updated = true;
      });
      const trainingSeconds = clock.lap();

      this.#completions.write(step, recordsOf(groups, advantages, step));
      const metrics: Omit<GrpoMetrics, 'step'> = {
        motivation: formatMotivation(view),
        ...this.#rewardMetrics(groups, rewards),
        ...updates.summary(),
        ...(this.settings.kl === 0 && { kl: null }),
        rolloutTokensPerSecond: countDrawn(groups) / times.rollout,
        trainingTokensPerSecond: updates.tokens / trainingSeconds,
        seconds: clock.total(),
        rolloutSeconds: times.rollout,
        judgingSeconds: times.judging,
        trainingSeconds,
      };
      return { metrics: { ...metrics }, position: position + rows.length };
    } catch (error) {
      throw new StepFailed(error, updated);
    }
  }

  #collect(
    rows: readonly Row[],
    motivation: MotivationView,
    step: number,
    signal: AbortSignal | undefined,
    times: { rollout: number; judging: number },
  ): Promise<EpisodeGroup<Row>[]> {
    this.#emit({ type: 'phase', phase: 'rollout', step });
    const { policy, task } = this.#options;
    const { groupSize, temperature, topK, topP, minP, keepActivations, seed } = this.settings;
    return collect(policy, task, rows, {
      ...limitsOf(this.settings),
      temperature,
      topK,
      topP,
      minP,
      n: groupSize,
      motivation,
      seed: (BigInt(seed) << 32n) | BigInt(step),
      keepActivations: Math.floor(keepActivations * 2 ** 30),
      signal,
      onTimes: (taken) => Object.assign(times, taken),
    });
  }

  async #update(
    groups: readonly EpisodeGroup<Row>[],
    advantages: readonly number[][],
    step: number,
    signal: AbortSignal | undefined,
    beforeUpdate: () => void,
  ): Promise<UpdateTally> {
    this.#emit({ type: 'phase', phase: 'training', step });
    const { policy, reference } = this.#options;
    const { settings } = this;
    const { promptsPerStep, miniBatches, updatesPerRollout, maskTruncated } = settings;
    const referenceLogprobs =
      reference && settings.kl > 0
        ? (await reference.score(forestOf(branchesOf(groups)), { ...(signal && { signal }) })).logprobs
        : undefined;
    const branches = branchesOf(groups, ({ group, episode, turn, tokens }) => {
      const masked = maskTruncated && groups[group]?.episodes[episode]?.end === 'length';
      return {
        advantage: advantages[group]?.[episode],
        referenceLogprobs: referenceLogprobs?.[turn],
        ...(masked && { mask: new Uint8Array(tokens) }),
      };
    });
    const tally = new UpdateTally();
    const promptsPerUpdate = promptsPerStep / miniBatches;
    for (let pass = 0; pass < updatesPerRollout; pass++) {
      for (let from = 0; from < promptsPerStep; from += promptsPerUpdate) {
        const forest = forestOf(branches.slice(from, from + promptsPerUpdate));
        const result = await update(policy, forest, this.#loss(), settings, { step, signal, beforeUpdate });
        if (result.skipped) this.#emit({ type: 'notice', message: skippedNotice(step, result.skipped) });
        tally.add(countTokens(forest), result);
      }
    }
    return tally;
  }

  #rewardMetrics(groups: readonly EpisodeGroup<Row>[], rewards: readonly number[][]) {
    const { task } = this.#options;
    const tally = new EpisodeTally();
    for (const group of groups) tally.add(group);
    const uniform = rewards.filter((group) => group.every((reward) => reward === group[0])).length;
    this.#stepsWithoutSignal = uniform === rewards.length ? this.#stepsWithoutSignal + 1 : 0;
    if (this.#stepsWithoutSignal === stepsBeforeAdvice) {
      const advice = task.demonstrate ? 'warm the model up first with merf sft, or try' : 'try';
      const message =
        `For ${stepsBeforeAdvice} steps all completions of a prompt have had the same reward, so every advantage was ` +
        `0: ${advice} other prompts, more completions of each or a higher temperature`;
      this.#emit({ type: 'notice', message });
    }
    const all = groups.flatMap(({ episodes }) => episodes);
    return {
      ...tally.summary({ environment: task.environment !== undefined }),
      rewardStd: standardDeviation(rewards.flat()),
      correct: all.filter(({ reward }) => task.spec.isHighest(reward)).length / all.length,
      uniformGroups: uniform / rewards.length,
    };
  }

  #loss(): Loss {
    const { loss: type, clipLow, clipHigh, kl, entropy, maxTokens } = this.settings;
    return { type, clipLow, clipHigh, kl, entropy, ...(type === 'dr_grpo' && { maxTokens }) };
  }

  #emit(event: TrainingEvent): void {
    this.#options.onEvent?.(event);
  }
}

/** Fails before any work where a view names what the task's specification does not have. */
export function checkViews(task: Pick<Task<never>, 'spec'>, motivations: readonly string[]): void {
  for (const text of motivations) {
    const motivation = parseMotivation(text);
    const views = Array.isArray(motivation)
      ? motivation.map((stage) => stage.view)
      : [motivationAt(motivation, 0)];
    for (const view of views) task.spec.describe(view);
  }
}

export function modelIdentity(policy: { readonly path?: string }): Record<string, string> {
  return policy.path !== undefined && existsSync(policy.path) ? { model: fingerprint(policy.path) } : {};
}

/** What of an environment a resumed run may not differ in: its limits and words, and the options of its task. */
function environmentOf<Row>({ environment, options }: Task<Row>) {
  const { data: _, testData: __, ...rest } = options;
  return { options: rest, stop: environment?.stop, maxTurns: environment?.maxTurns };
}

/** The statistics of a step's updates: means over tokens, extremes over all. */
class UpdateTally {
  /** Tokens computed, each distinct one of a forest once. */
  tokens = 0;
  #applied = 0;
  #skipped = 0;
  #weight = 0;
  #loss = 0;
  #kl = 0;
  #clipFraction = 0;
  #ratio = { mean: 0, min: Number.POSITIVE_INFINITY, max: Number.NEGATIVE_INFINITY };
  #gradientNorm = 0;
  #learningRate = 0;

  add(tokens: number, { stats, gradientNorm, learningRate, skipped }: UpdateResult): void {
    this.tokens += tokens;
    this.#learningRate = learningRate;
    if (stats === undefined || skipped) {
      this.#skipped += 1;
      return;
    }
    this.#applied += 1;
    this.#gradientNorm += gradientNorm;
    this.#weight += stats.tokens;
    this.#loss += stats.loss;
    this.#kl += stats.kl * stats.tokens;
    this.#clipFraction += stats.clipFraction * stats.tokens;
    this.#ratio.mean += stats.ratio.mean * stats.tokens;
    this.#ratio.min = Math.min(this.#ratio.min, stats.ratio.min);
    this.#ratio.max = Math.max(this.#ratio.max, stats.ratio.max);
  }

  summary() {
    const learningRate = this.#learningRate;
    const counts = { learningRate, updates: this.#applied, skippedUpdates: this.#skipped };
    if (this.#applied === 0) {
      return { loss: null, kl: null, clipFraction: null, ratio: null, gradientNorm: null, ...counts };
    }
    const weight = Math.max(1, this.#weight);
    return {
      loss: this.#loss / this.#applied,
      kl: this.#kl / weight,
      clipFraction: this.#clipFraction / weight,
      ratio: { ...this.#ratio, mean: this.#ratio.mean / weight },
      gradientNorm: this.#gradientNorm / this.#applied,
      ...counts,
    };
  }
}

/** The sample standard deviation (n - 1); 0 of fewer than two values. */
function standardDeviation(values: readonly number[]): number {
  if (values.length < 2) return 0;
  const mean = values.reduce((sum, value) => sum + value, 0) / values.length;
  return Math.sqrt(values.reduce((sum, value) => sum + (value - mean) ** 2, 0) / (values.length - 1));
}

class Stopwatch {
  readonly #start = performance.now();
  #last = this.#start;

  /** Seconds since the last lap. */
  lap(): number {
    const now = performance.now();
    const seconds = (now - this.#last) / 1000;
    this.#last = now;
    return seconds;
  }

  total(): number {
    return (performance.now() - this.#start) / 1000;
  }
}
