import { existsSync } from 'node:fs';
import { join } from 'node:path';
import { MerfError } from '../errors.js';
import type { Evaluation } from '../evaluate/index.js';
import { countTokens, type Loss, type Policy } from '../policy/index.js';
import {
  formatMotivation,
  type LearnView,
  type Motivation,
  type MotivationView,
  parseLearnUnder,
  parseMotivation,
  parseMotivationView,
  type Schedule,
  stageAt,
} from '../prompt/motivation.js';
import {
  countDrawn,
  type Episode,
  type EpisodeGroup,
  EpisodeTally,
  type RolloutPolicy,
} from '../rollout/index.js';
import { keysThatMatter, parseSettings } from '../settings.js';
import { shuffledRows, type Task } from '../tasks/index.js';
import { isUniform, judgementOf } from './advantages.js';
import { CompletionLog, recordsOf } from './completions.js';
import { EpisodeSource } from './draw.js';
import { evaluateDuringTraining, heldOutRows } from './evaluation.js';
import { contentHash, fingerprint } from './identity.js';
import { defaultKeepActivations } from './keep.js';
import { formatLearnUnder, Lessons, type PromptGap } from './lessons.js';
import { type RunResult, readSavedRun, StepFailed, type TrainingEvent, TrainingLoop } from './loop.js';
import { type GrpoOptions, type GrpoSettings, grpoSchema } from './settings.js';
import { skippedNotice, type UpdateResult, update } from './update.js';

/** What a trainer asks of a policy: the four primitives and the files. `Policy` has it all. */
export type TrainablePolicy = Omit<RolloutPolicy, 'tokenizer'> &
  Pick<
    Policy,
    | 'score'
    | 'forwardBackward'
    | 'optimStep'
    | 'zeroGradients'
    | 'tokenizer'
    | 'save'
    | 'saveState'
    | 'loadState'
  > &
  Partial<Pick<Policy, 'memory' | 'spareMemory'>> & { readonly path?: string };

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
  /** The view or mix of views that the step's completions were drawn under. */
  motivation: string;
  /** What they were learned under, where that is not `same`, and how far those prompts are from the ones that drew them. */
  learnUnder?: string;
  promptGap?: PromptGap;
  /** Mean reward and share of highest totals by view, where several were drawn under. */
  byView?: Record<string, { completions: number; reward: number; correct: number }>;
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
  /** What the engine took and, where they took longer, environments. */
  rolloutSeconds: number;
  /** What verifiers took beyond the rollout, which they run beside. */
  judgingSeconds: number;
  trainingSeconds: number;
  /** Results by view of the motivation, where the step was followed by an evaluation. */
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
  readonly #learnUnder: Schedule<readonly LearnView[]>;
  readonly #anchor: { under: MotivationView; to: MotivationView };
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
    this.#learnUnder = parseLearnUnder(parsed.learnUnder);
    this.#anchor = {
      under: parseMotivationView(parsed.anchorUnder),
      to: parseMotivationView(parsed.anchorTo),
    };
    this.#completions = new CompletionLog(join(out, 'completions'));
    const sampled = this.#motivation.flatMap(({ value }) => value);
    const learned = this.#learnUnder.flatMap(({ value }) => value).filter((view) => view !== 'same');
    checkViews(task, [...sampled, ...learned, ...parsed.evaluateMotivations.map(parseMotivationView)]);
    if (parsed.anchor > 0) checkViews(task, Object.values(this.#anchor));
    for (const { value: mix } of this.#motivation) {
      if (mix.length > parsed.groupSize) {
        throw new MerfError(
          'INVALID_CONFIG',
          `Expected a mix of at most groupSize = ${parsed.groupSize} views but ${formatMotivation(mix)} has ${mix.length}`,
        );
      }
    }
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
    // A resumed run keeps what it kept before, however much memory is free by now.
    settings.keepActivations ??= resume
      ? ((readSavedRun(out).settings.keepActivations as number | undefined) ?? 0)
      : defaultKeepActivations(policy);
    const given = this.#options.rows;
    const rows = given
      ? shuffledRows(given, settings.seed)
      : await task.rows({ split: 'train', seed: settings.seed });
    const evaluationRows =
      this.#options.evaluationRows?.slice(0, settings.evaluatePrompts) ??
      (settings.evaluateEvery > 0 ? await heldOutRows(task, settings.evaluatePrompts) : []);
    const source = new EpisodeSource({ policy, task, rows, settings });
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
        ...([settings.motivation, settings.learnUnder, settings.anchorUnder, settings.anchorTo].some((text) =>
          text.includes('template:'),
        ) && { template: contentHash([this.#motivation, this.#learnUnder, this.#anchor]) }),
      },
      ...(launch && { launch }),
      ...(onEvent && { onEvent }),
      discardAfter: (step) => this.#completions.discardAfter(step),
      evaluate: (step, signal) =>
        evaluateDuringTraining({ policy, task, rows: evaluationRows, settings, step, onEvent, signal }),
      step: (step, position, signal) => this.#step(source, step, position, signal),
    });
    if (this.#stopping) this.#loop.stop();
    return this.#loop.run(options.signal);
  }

  /** Ends the run after the step in progress, which is then saved. */
  stop(): void {
    this.#stopping = true;
    this.#loop?.stop();
  }

  async #step(source: EpisodeSource<Row>, step: number, position: number, signal?: AbortSignal) {
    let updated = false;
    try {
      const clock = new Stopwatch();
      const mix = stageAt(this.#motivation, step - 1);
      this.#emit({ type: 'phase', phase: 'rollout', step });
      const { groups, position: next, times } = await source.draw(step, position, mix, signal);
      clock.lap();

      const { rewards, advantages } = await judgementOf(groups, this.settings);
      const learnUnder = stageAt(this.#learnUnder, step - 1);
      const { tally, gap } = await this.#update(groups, advantages, learnUnder, step, signal, () => {
        updated = true;
      });
      const trainingSeconds = clock.lap();

      this.#completions.write(step, recordsOf(groups, advantages, step));
      const learned = formatLearnUnder(learnUnder);
      const metrics: Omit<GrpoMetrics, 'step'> = {
        motivation: formatMotivation(mix),
        ...(learned !== 'same' && { learnUnder: learned }),
        ...(gap && { promptGap: gap }),
        ...this.#rewardMetrics(groups, rewards),
        ...tally.summary(),
        ...(this.settings.kl === 0 && this.settings.anchor === 0 && { kl: null }),
        rolloutTokensPerSecond: countDrawn(groups) / times.rollout,
        trainingTokensPerSecond: tally.tokens / trainingSeconds,
        seconds: clock.total(),
        rolloutSeconds: times.rollout,
        judgingSeconds: times.judging,
        trainingSeconds,
      };
      return { metrics: { ...metrics }, position: next };
    } catch (error) {
      throw new StepFailed(error, updated);
    }
  }

  async #update(
    groups: readonly EpisodeGroup<Row>[],
    advantages: readonly number[][],
    learnUnder: readonly LearnView[],
    step: number,
    signal: AbortSignal | undefined,
    beforeUpdate: () => void,
  ): Promise<{ tally: UpdateTally; gap: PromptGap | undefined }> {
    this.#emit({ type: 'phase', phase: 'training', step });
    const { policy, reference, task } = this.#options;
    const { settings } = this;
    const lessons = await Lessons.prepare(groups, advantages, {
      policy,
      reference,
      task,
      settings,
      learnUnder,
      anchorUnder: this.#anchor.under,
      anchorTo: this.#anchor.to,
      signal,
    });
    const tally = new UpdateTally();
    const { miniBatches, updatesPerRollout } = settings;
    for (let pass = 0; pass < updatesPerRollout; pass++) {
      for (let part = 0; part < miniBatches; part++) {
        const lesson = lessons.slice(
          Math.floor((part * groups.length) / miniBatches),
          Math.floor(((part + 1) * groups.length) / miniBatches),
        );
        const loss = { ...this.#loss(), normalizer: lesson.normalizer };
        const result = await update(policy, lesson.forest, loss, settings, { step, signal, beforeUpdate });
        if (result.skipped) this.#emit({ type: 'notice', message: skippedNotice(step, result.skipped) });
        else if (pass === 0 && result.stats) lessons.note(lesson, result.stats.logprobs);
        tally.add(countTokens(lesson.forest), result);
      }
    }
    return { tally, gap: lessons.gap() };
  }

  #rewardMetrics(groups: readonly EpisodeGroup<Row>[], rewards: readonly number[][]) {
    const { task } = this.#options;
    const tally = new EpisodeTally();
    for (const group of groups) tally.add(group);
    const uniform = rewards.filter(isUniform).length;
    this.#stepsWithoutSignal = uniform === rewards.length ? this.#stepsWithoutSignal + 1 : 0;
    if (this.#stepsWithoutSignal === stepsBeforeAdvice) {
      const advice = task.demonstrate ? 'warm the model up first with merf sft, or try' : 'try';
      const message =
        `For ${stepsBeforeAdvice} steps all completions of a prompt have had the same reward, so every advantage was ` +
        `0: ${advice} other prompts, more completions of each or a higher temperature`;
      this.#emit({ type: 'notice', message });
    }
    const all = groups.flatMap(({ episodes }) => episodes);
    const byView = new Map<string, Episode[]>();
    for (const episode of all) {
      const view = formatMotivation(episode.prompt.view);
      byView.set(view, [...(byView.get(view) ?? []), episode]);
    }
    const summaryOf = (episodes: readonly Episode[]) => ({
      completions: episodes.length,
      reward: episodes.reduce((sum, { reward }) => sum + reward.total, 0) / episodes.length,
      correct: episodes.filter(({ reward }) => task.spec.isHighest(reward)).length / episodes.length,
    });
    return {
      ...(byView.size > 1 && {
        byView: Object.fromEntries([...byView].map(([view, episodes]) => [view, summaryOf(episodes)])),
      }),
      ...tally.summary({ environment: task.environment !== undefined }),
      rewardStd: standardDeviation(rewards.flat()),
      correct: all.filter(({ reward }) => task.spec.isHighest(reward)).length / all.length,
      uniformGroups: uniform / rewards.length,
    };
  }

  #loss(): Loss {
    const { loss: type, clipLow, clipHigh, kl, klRatio, entropy, temperature, maxTokens } = this.settings;
    const common = { type, clipLow, clipHigh, kl, klRatio, entropy, temperature };
    return { ...common, ...(type === 'dr_grpo' && { maxTokens }) };
  }

  #emit(event: TrainingEvent): void {
    this.#options.onEvent?.(event);
  }
}

/** Fails before any work where a view names what the task's specification does not have. */
export function checkViews(task: Pick<Task<never>, 'spec'>, views: readonly MotivationView[]): void {
  for (const view of views) task.spec.describe(view);
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
