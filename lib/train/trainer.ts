import { existsSync } from 'node:fs';
import { join } from 'node:path';
import { MerfError, throwIfAborted } from '../errors.js';
import { type Evaluation, isCorrect, ScoreTally, scoreGroups } from '../evaluate/index.js';
import type { CompletionGroup, Loss, LossStats, Policy } from '../policy/index.js';
import { formatMotivation, type Motivation, motivationAt, parseMotivation } from '../prompt/motivation.js';
import type { Score } from '../reward/index.js';
import { type RowSource, shuffledRows, type Task } from '../tasks/index.js';
import { groupAdvantages } from './advantages.js';
import { CompletionLog } from './completions.js';
import { evaluateDuringTraining, heldOutRows } from './evaluation.js';
import { contentHash, fingerprint } from './files.js';
import { countTokens, forestOf } from './forest.js';
import { type RunResult, StepFailed, type TrainingEvent, TrainingLoop } from './loop.js';
import { learningRateAt } from './schedule.js';
import {
  type GrpoOptions,
  type GrpoSettings,
  grpoSchema,
  keysThatMatter,
  parseSettings,
} from './settings.js';

/** What a trainer asks of a policy: the four primitives and the files. `Policy` has it all. */
export type TrainablePolicy = Pick<
  Policy,
  | 'sample'
  | 'forwardBackward'
  | 'optimStep'
  | 'zeroGradients'
  | 'tokenizer'
  | 'contextLength'
  | 'save'
  | 'saveState'
  | 'loadState'
> & { readonly path?: string };

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
  /** Share of completions that reach the highest total. */
  correct: number;
  /** Share of groups whose completions all have the same reward, which teach nothing. */
  uniformGroups: number;
  length: number;
  truncated: number;
  entropy: number;
  loss: number | null;
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
  seconds: number;
  rolloutSeconds: number;
  scoringSeconds: number;
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
   * @throws MerfError ABORTED, RESUME_MISMATCH, VERIFIER_FAILED, VERIFIER_TIMEOUT, NON_FINITE and what the policy throws
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
        task: contentHash([task.name, task.spec.describe('full'), task.messages(rows.at(0), 'full')]),
        data: rows.fingerprint,
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
      return await this.#rolloutAndUpdate(source, step, position, signal, () => {
        updated = true;
      });
    } catch (error) {
      throw new StepFailed(error, updated);
    }
  }

  async #rolloutAndUpdate(
    source: RowSource<Row>,
    step: number,
    position: number,
    signal: AbortSignal | undefined,
    onUpdate: () => void,
  ) {
    const { policy, task, reference } = this.#options;
    const s = this.settings;
    const clock = new Stopwatch();

    this.#emit({ type: 'phase', phase: 'rollout', step });
    const view = motivationAt(this.#motivation, step - 1);
    const rows = Array.from({ length: s.promptsPerStep }, (_, i) => source.at(position + i));
    const messages = rows.map((row) => task.messages(row, view));
    const prompts = messages.map((m) => policy.tokenizer.applyChatTemplate(m, { addGenerationPrompt: true }));
    const groups = await policy.sample(
      messages.map((m) => ({ messages: m })),
      {
        n: s.groupSize,
        maxTokens: s.maxTokens,
        temperature: s.temperature,
        topK: s.topK,
        topP: s.topP,
        minP: s.minP,
        ...(s.stop && { stop: s.stop }),
        seed: (BigInt(s.seed) << 32n) | BigInt(step),
        ...(signal && { signal }),
      },
    );
    throwIfAborted(signal, `step ${step}`);
    const rolloutSeconds = clock.lap();

    this.#emit({ type: 'phase', phase: 'scoring', step });
    const scores = await scoreGroups(task, rows, prompts, groups, { ...(signal && { signal }) });
    const rewards = scores.map((group) => group.map((score) => score.total));
    const advantages = groupAdvantages(rewards, { kind: s.advantage, scale: s.scaleAdvantages ?? true });
    const scoringSeconds = clock.lap();

    this.#emit({ type: 'phase', phase: 'training', step });
    const referenceLogprobs =
      reference && s.kl > 0 ? await scoreReference(reference, groups, signal) : undefined;
    const learningRate = learningRateAt(step, { kind: s.schedule, ...s });
    const updates = new UpdateTally();
    const promptsPerUpdate = s.promptsPerStep / s.miniBatches;
    for (let pass = 0; pass < s.updatesPerRollout; pass++) {
      for (let from = 0; from < s.promptsPerStep; from += promptsPerUpdate) {
        const forest = forestOf(
          groups.slice(from, from + promptsPerUpdate).map((group, i) => ({
            promptTokens: group.promptTokens,
            completions: group.completions.map((completion, j) => ({
              tokens: completion.tokens,
              train: {
                advantage: (advantages[from + i] as number[])[j] as number,
                logprobs: completion.logprobs,
                ...(referenceLogprobs && {
                  referenceLogprobs: referenceLogprobs[(from + i) * s.groupSize + j] as Float32Array,
                }),
                ...(s.maskTruncated &&
                  completion.finishReason === 'length' && { mask: new Uint8Array(completion.tokens.length) }),
              },
            })),
          })),
        );
        const stats = await finiteOrUndefined(() =>
          policy.forwardBackward(forest, this.#loss(), {
            ...(s.batchTokens !== undefined && { maxTokens: s.batchTokens }),
            ...(signal && { signal }),
          }),
        );
        throwIfAborted(signal, `step ${step}`);
        let gradientNorm: number | undefined;
        if (stats === undefined || !Number.isFinite(stats.loss)) await policy.zeroGradients();
        else {
          onUpdate();
          const result = await policy.optimStep({
            learningRate,
            beta1: s.beta1,
            beta2: s.beta2,
            epsilon: s.epsilon,
            weightDecay: s.weightDecay,
            maxGradNorm: s.maxGradNorm,
          });
          if (result.applied) gradientNorm = result.gradientNorm;
        }
        if (gradientNorm === undefined) {
          const what = stats === undefined || !Number.isFinite(stats.loss) ? 'loss' : 'gradient';
          this.#emit({
            type: 'notice',
            message: `Step ${step}: the ${what} was not finite, so an update was skipped`,
          });
        }
        updates.add(countTokens(forest), stats, gradientNorm);
      }
    }
    const trainingSeconds = clock.lap();

    this.#completions.write(
      step,
      groups.flatMap((group, i) =>
        group.completions.map((completion, j) => {
          const score = (scores[i] as Score[])[j] as Score;
          return {
            step,
            promptIndex: i,
            completionIndex: j,
            prompt: prompts[i] as string,
            text: completion.text,
            tokens: completion.tokens.length,
            finishReason: completion.finishReason,
            reward: score.total,
            parts: score.parts,
            advantage: (advantages[i] as number[])[j] as number,
          };
        }),
      ),
    );

    const tally = new ScoreTally();
    for (const [i, group] of groups.entries()) tally.add(group, scores[i] as Score[]);
    const sampled = groups.flatMap((group) => group.completions).reduce((sum, c) => sum + c.tokens.length, 0);
    const flat = scores.flat();
    const uniform = rewards.filter((group) => group.every((reward) => reward === group[0])).length;
    this.#stepsWithoutSignal = uniform === rewards.length ? this.#stepsWithoutSignal + 1 : 0;
    if (this.#stepsWithoutSignal === stepsBeforeAdvice) {
      const advice = task.demonstrate ? 'warm the model up first with merf sft, or try' : 'try';
      const message =
        `For ${stepsBeforeAdvice} steps all completions of a prompt have had the same reward, so every advantage was ` +
        `0: ${advice} other prompts, more completions of each or a higher temperature`;
      this.#emit({ type: 'notice', message });
    }
    const metrics: Omit<GrpoMetrics, 'step'> = {
      motivation: formatMotivation(view),
      ...tally.summary(),
      rewardStd: deviation(rewards.flat()),
      correct: flat.filter((score) => isCorrect(task, score)).length / flat.length,
      uniformGroups: uniform / rewards.length,
      ...updates.summary(),
      learningRate,
      rolloutTokensPerSecond: sampled / rolloutSeconds,
      trainingTokensPerSecond: updates.tokens / trainingSeconds,
      seconds: clock.total(),
      rolloutSeconds,
      scoringSeconds,
      trainingSeconds,
    };
    return { metrics: { ...metrics }, position: position + s.promptsPerStep };
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

async function scoreReference(
  reference: ReferencePolicy,
  groups: readonly CompletionGroup[],
  signal?: AbortSignal,
): Promise<Float32Array[]> {
  const forest = forestOf(
    groups.map(({ promptTokens, completions }) => ({
      promptTokens,
      completions: completions.map(({ tokens }) => ({ tokens, train: {} })),
    })),
  );
  const { logprobs } = await reference.score(forest, { ...(signal && { signal }) });
  return logprobs;
}

/** What `work` gives, or undefined where its loss was not finite. */
export async function finiteOrUndefined<T>(work: () => Promise<T>): Promise<T | undefined> {
  try {
    return await work();
  } catch (error) {
    if ((error as { code?: unknown }).code === 'NON_FINITE') return undefined;
    throw error;
  }
}

/** The statistics of a step's updates: means over tokens, extremes over all. */
class UpdateTally {
  tokens = 0;
  #applied = 0;
  #skipped = 0;
  #weight = 0;
  #loss = 0;
  #kl = 0;
  #clipFraction = 0;
  #ratio = { mean: 0, min: Number.POSITIVE_INFINITY, max: Number.NEGATIVE_INFINITY };
  #gradientNorm = 0;

  add(tokens: number, stats: LossStats | undefined, gradientNorm: number | undefined): void {
    this.tokens += tokens;
    if (stats === undefined || gradientNorm === undefined) {
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
    const counts = { updates: this.#applied, skippedUpdates: this.#skipped };
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

function deviation(values: readonly number[]): number {
  const mean = values.reduce((sum, value) => sum + value, 0) / values.length;
  return Math.sqrt(
    values.reduce((sum, value) => sum + (value - mean) ** 2, 0) / Math.max(1, values.length - 1),
  );
}
