import { existsSync } from 'node:fs';
import { join } from 'node:path';
import { MerfError } from '../errors.js';
import type { Evaluation } from '../evaluate/index.js';
import { countTokens, type Loss, type Policy } from '../policy/index.js';
import {
  formatMotivation,
  type LearnView,
  type Motivation,
  type MotivationMix,
  type MotivationView,
  parseLearnUnder,
  parseMotivation,
  parseMotivationView,
  type Schedule,
  stageAt,
} from '../prompt/motivation.js';
import {
  checkPrompts,
  countDrawn,
  type Episode,
  type EpisodeGroup,
  EpisodeTally,
  type RolloutPolicy,
} from '../rollout/index.js';
import { defaultsOf, keysThatMatter, parseSettings } from '../settings.js';
import { shuffledRows, type Task } from '../tasks/index.js';
import { defaultKeepActivations } from './activation-memory.js';
import { AdaptiveMotivation, adaptiveWord } from './adaptive.js';
import { isWithoutSignal } from './advantages.js';
import { CompletionLog, recordsOf } from './completions.js';
import { Course, type CourseStage, type StepLesson } from './course.js';
import { type CurriculumPlan, checkCurriculum, type OpenTask } from './curriculum.js';
import { evaluateDuringTraining, fittingRows, heldOutRows } from './evaluation.js';
import { IterableTrainer } from './events.js';
import { hintMetrics, withFailed } from './hints.js';
import { contentHash, fingerprint } from './identity.js';
import { keptTogether } from './kept.js';
import { formatLearnUnder, Lessons, type PromptGap } from './lessons.js';
import { type RunResult, readSavedRun, type StepProgress, type TrainingEvent, TrainingLoop } from './loop.js';
import { MetricsLog } from './metrics.js';
import { checkOverlong, overlongPunishment } from './overlong.js';
import { type GrpoOptions, type GrpoSettings, grpoSchema } from './settings.js';
import { smallnessNotice, type UpdateResult, update, updateNotice } from './update.js';

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
  Partial<Pick<Policy, 'memory' | 'spareMemory' | 'files'>>;

export type ReferencePolicy = Pick<Policy, 'score'>;

export interface TrainerOptions<Row> extends GrpoOptions {
  policy: TrainablePolicy;
  task: Task<Row>;
  /** Rows to train on (default: the task's own). */
  rows?: readonly Row[];
  /** Held-out rows to evaluate on (default: the task's own). */
  evaluationRows?: readonly Row[];
  /** The task with an option changed, for a `curriculum`; evaluations stay on `task`. */
  openTask?: OpenTask<Row>;
  /** What the KL penalty holds the policy to; asked for where `kl` is above 0. */
  reference?: ReferencePolicy;
  /**
   * The run's folder: metrics.jsonl, completions/, checkpoints/ and, in the end, model/; with an adaptive motivation
   * motivation.jsonl, a line a step (`AdaptiveRecord`).
   */
  out: string;
  /** Goes on with the run in `out` from its newest checkpoint. */
  resume?: boolean;
  /** With `resume`: the step whose checkpoint it goes on from instead of the newest; later ones are removed. */
  checkpoint?: number;
  onEvent?: (event: TrainingEvent) => void;
  /** Kept in run.json, for those who start the run again. */
  launch?: Record<string, unknown>;
}

/** One row of metrics.jsonl. Times are in seconds; entropy and KL in nats a token. */
export interface GrpoMetrics {
  step: number;
  /** The stage of the curriculum, where there is one, as in `people=3`. */
  curriculum?: string;
  /** The view or mix of views that the step's completions were drawn under. */
  motivation: string;
  /** What they were learned under, where that is not `same`, and how far those prompts are from the ones that drew them. */
  learnUnder?: string;
  promptGap?: PromptGap;
  /**
   * With `hintFailed`: the groups that were drawn again under it, and how many of them then had a signal. Reward, correct
   * and the other figures are those of the hinted completions, which took the place of the failed ones.
   */
  hinted?: { groups: number; withSignal: number };
  /** Mean reward and share of highest totals by view, where several were drawn under. */
  byView?: Record<string, { completions: number; reward: number; correct: number }>;
  reward: number;
  rewardStd: number;
  /** Mean score of each component, and the share of completions in each of its cases. */
  parts: Record<string, number>;
  cases: Record<string, Record<string, number>>;
  /** Share of episodes that reach the highest total. */
  correct: number;
  /** Share of groups whose advantages are all 0, mostly for equal rewards, which teach nothing. */
  uniformGroups: number;
  /** With dynamic sampling: rollouts and prompts drawn, and groups without signal among those that were learned. */
  rollouts?: number;
  rowsDrawn?: number;
  filledGroups?: number;
  /** With `difficulty`: rows that were passed over. */
  rowsSkipped?: number;
  /** With `replay`: groups of earlier steps that were learned again. */
  replayedGroups?: number;
  /** Mean punishment of overlong completions, where there is one; `reward` is without it. */
  overlong?: number;
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
export class Trainer<Row = unknown> extends IterableTrainer {
  readonly settings: GrpoSettings;
  readonly #options: TrainerOptions<Row>;
  readonly #motivation: Motivation | undefined;
  /** In place of a schedule; each run begins with one that has learned nothing yet. */
  #adaptive: AdaptiveMotivation | undefined;
  readonly #hint: MotivationView | undefined;
  readonly #learnUnder: Schedule<readonly LearnView[]>;
  readonly #anchor: { under: MotivationView; to: MotivationView };
  readonly #views: readonly MotivationView[];
  readonly #curriculum: CurriculumPlan | undefined;
  readonly #completions: CompletionLog;
  readonly #motivationLog: MetricsLog;
  #stepsWithoutSignal = 0;

  /** @throws MerfError INVALID_CONFIG naming the setting, INVALID_ARGUMENT for a view that the task does not have */
  constructor(options: TrainerOptions<Row>) {
    const {
      policy,
      task,
      rows,
      evaluationRows,
      openTask,
      reference,
      out,
      resume,
      checkpoint,
      onEvent,
      launch,
      ...settings
    } = options;
    super(onEvent);
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
    checkOverlong(parsed);
    this.#curriculum = checkCurriculum(parsed.curriculum, options);
    this.settings = parsed;
    this.#options = options;
    this.#adaptive = this.#newAdaptive();
    this.#motivation = this.#adaptive ? undefined : parseMotivation(parsed.motivation);
    this.#hint = parsed.hintFailed === undefined ? undefined : parseMotivationView(parsed.hintFailed);
    this.#learnUnder = parseLearnUnder(parsed.learnUnder);
    this.#anchor = {
      under: parseMotivationView(parsed.anchorUnder),
      to: parseMotivationView(parsed.anchorTo),
    };
    this.#completions = new CompletionLog(join(out, 'completions'));
    this.#motivationLog = new MetricsLog(join(out, 'motivation.jsonl'));
    const sampled = [
      ...(this.#motivation ?? []).flatMap(({ value }) => value),
      ...(this.#hint === undefined ? [] : [this.#hint]),
    ];
    const learned = this.#learnUnder.flatMap(({ value }) => value).filter((view) => view !== 'same');
    this.#views = [...sampled, ...learned, ...(parsed.anchor > 0 ? Object.values(this.#anchor) : [])];
    checkViews(task, [...this.#views, ...parsed.evaluateMotivations.map(parseMotivationView)]);
    for (const { value: mix } of this.#motivation ?? []) {
      if (mix.length > parsed.groupSize) {
        throw new MerfError(
          'INVALID_CONFIG',
          `Expected a mix of at most groupSize = ${parsed.groupSize} views but ${formatMotivation(mix)} has ${mix.length}`,
        );
      }
    }
  }

  protected override async train(options: { signal?: AbortSignal }): Promise<RunResult> {
    const { policy, task, out, resume, checkpoint, launch } = this.#options;
    const onEvent = this.tell;
    const settings = this.settings;
    // A resumed run keeps what it kept before, however much memory is free by now.
    settings.keepActivations ??= resume
      ? ((readSavedRun(out).settings.keepActivations as number | undefined) ?? 0)
      : defaultKeepActivations(policy);
    const given = this.#options.rows;
    const rows = given
      ? shuffledRows(given, settings.seed)
      : await task.rows({ split: 'train', seed: settings.seed });
    const told = { onEvent, signal: options.signal };
    const evaluationRows = await fittingRows(
      this.#options.evaluationRows?.slice(0, settings.evaluatePrompts) ??
        (settings.evaluateEvery > 0 ? await heldOutRows(task, settings.evaluatePrompts) : []),
      {
        policy,
        task,
        views: settings.evaluateMotivations.map(parseMotivationView),
        filter: settings.filterOverlongPrompts,
        setting: 'filterOverlongPrompts',
        ...told,
      },
    );
    const { openTask } = this.#options;
    const curriculum = this.#curriculum && openTask && { plan: this.#curriculum, openTask };
    // The words of an adaptive motivation are part of the full ones.
    const views: MotivationView[] = this.#adaptive ? ['full', ...this.#views] : [...this.#views];
    const hint = this.#hint;
    const course = await Course.open({ policy, task, rows, settings, curriculum, hint, views, ...told });
    for (const stage of course.stages) checkViews(stage.task, this.#views);
    for (const message of checkPrompts(policy.tokenizer, task, rows.at(0), views)) {
      this.tell({ type: 'notice', message });
    }
    this.#adaptive = this.#newAdaptive();
    const state = keptTogether({ ...course.kept, adaptive: this.#adaptive });
    const loop = new TrainingLoop({
      kind: 'grpo',
      policy,
      out,
      resume: resume ?? false,
      ...(checkpoint !== undefined && { checkpoint }),
      settings,
      matters: keysThatMatter(grpoSchema),
      defaults: defaultsOf(grpoSchema),
      identity: {
        ...modelIdentity(policy),
        task: task.name,
        rules: contentHash([task.spec.describe('full'), task.messages(rows.at(0), 'full')]),
        ...(task.environment && { environment: contentHash([environmentOf(task)]) }),
        data: course.fingerprint,
        ...(this.#readsTemplates() && {
          template: contentHash([
            this.#motivation,
            this.#learnUnder,
            this.#anchor,
            ...(this.#hint === undefined ? [] : [this.#hint]),
          ]),
        }),
      },
      ...(launch && { launch }),
      onEvent,
      ready: this.taken,
      discardAfter: (step) => {
        this.#completions.discardAfter(step);
        this.#motivationLog.truncate(step);
      },
      ...(state && { state }),
      evaluate: (step, signal) =>
        evaluateDuringTraining({ policy, task, rows: evaluationRows, settings, step, onEvent, signal }),
      step: (...of) => this.#step(course, ...of),
    });
    const message = smallnessNotice(settings);
    if (message !== undefined) this.tell({ type: 'notice', message });
    return this.runLoop(loop, options.signal);
  }

  #newAdaptive(): AdaptiveMotivation | undefined {
    if (this.settings.motivation !== adaptiveWord) return undefined;
    return new AdaptiveMotivation(this.#options.task.spec, this.settings);
  }

  #readsTemplates(): boolean {
    const { motivation, learnUnder, anchorUnder, anchorTo, hintFailed = '' } = this.settings;
    return [motivation, learnUnder, anchorUnder, anchorTo, hintFailed].some((text) =>
      text.includes('template:'),
    );
  }

  async #step(
    course: Course<Row>,
    step: number,
    position: number,
    signal: AbortSignal,
    progress: StepProgress,
  ) {
    const clock = new Stopwatch();
    const mix = this.#mixAt(step);
    this.tell({ type: 'phase', phase: 'rollout', step });
    const { stage, position: first } = course.at(step, position);
    const drawn = await stage.source.draw(step, first, mix, signal);
    const { groups, times } = drawn;
    clock.lap();

    const lesson = await course.lesson(step, stage, drawn);
    const { advantages, replayed } = lesson;
    const learnUnder = stageAt(this.#learnUnder, step - 1);
    const { tally, gap } = await this.#update(stage, lesson, learnUnder, step, signal, () => {
      progress.updated = true;
    });
    const trainingSeconds = clock.lap();

    this.#completions.write(step, recordsOf([...groups, ...replayed], lesson.groups, advantages, step));
    const under = formatLearnUnder(learnUnder);
    const metrics: Omit<GrpoMetrics, 'step'> = {
      ...(stage.name !== '' && { curriculum: stage.name }),
      motivation: formatMotivation(mix),
      ...(under !== 'same' && { learnUnder: under }),
      ...(gap && { promptGap: gap }),
      ...(this.#hint !== undefined && { hinted: hintMetrics(groups, lesson.compared) }),
      ...this.#rewardMetrics(stage, groups, lesson.compared),
      ...(this.settings.dynamicSampling > 1 && {
        rollouts: drawn.rollouts,
        rowsDrawn: groups.length,
        filledGroups: advantages.filter(isWithoutSignal).length,
      }),
      ...(stage.difficulty && { rowsSkipped: drawn.skipped }),
      ...(this.settings.replay > 0 && { replayedGroups: replayed.length }),
      ...tally.summary(),
      ...(this.settings.kl === 0 && this.settings.anchor === 0 && { kl: null }),
      rolloutTokensPerSecond: countDrawn(withFailed(groups)) / times.rollout,
      trainingTokensPerSecond: tally.tokens / trainingSeconds,
      seconds: clock.total(),
      rolloutSeconds: times.rollout,
      judgingSeconds: times.judging,
      trainingSeconds,
    };
    course.note(step, stage, drawn, lesson);
    this.#learnMotivation(step, groups);
    return { metrics: { ...metrics }, position: position + drawn.position - first };
  }

  #mixAt(step: number): MotivationMix {
    return this.#adaptive?.mix(step) ?? stageAt(this.#motivation as Motivation, step - 1);
  }

  /** Lets an adaptive motivation decide on the next steps, and says what it decided. */
  #learnMotivation(step: number, groups: readonly EpisodeGroup<Row>[]): void {
    if (this.#adaptive === undefined) return;
    const record = this.#adaptive.learn(step, groups);
    this.#motivationLog.append({ ...record });
    for (const [name, { decision, why }] of Object.entries(record.components)) {
      if (decision === 'stays') continue;
      this.tell({ type: 'notice', message: `Step ${step}: the words of ${name} are ${decision}: ${why}` });
    }
  }

  async #update(
    { task }: CourseStage<Row>,
    { groups, advantages, replayed }: StepLesson<Row>,
    learnUnder: readonly LearnView[],
    step: number,
    signal: AbortSignal | undefined,
    beforeUpdate: () => void,
  ): Promise<{ tally: UpdateTally; gap: PromptGap | undefined }> {
    this.tell({ type: 'phase', phase: 'training', step });
    const { policy, reference } = this.#options;
    const { settings } = this;
    const lessons = await Lessons.prepare(groups, advantages, {
      policy,
      reference,
      task,
      settings,
      learnUnder,
      anchorUnder: this.#anchor.under,
      anchorTo: this.#anchor.to,
      earlier: new Set<EpisodeGroup<Row>>(replayed),
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
        const message = updateNotice(step, result);
        if (message !== undefined) this.tell({ type: 'notice', message });
        if (!result.skipped && pass === 0 && result.stats) lessons.note(lesson, result.stats.logprobs);
        tally.add(countTokens(lesson.forest), result);
      }
    }
    return { tally, gap: lessons.gap() };
  }

  /** What all that was drawn came to, so that choosing among it does not bend the curve. */
  #rewardMetrics(
    { task }: CourseStage<Row>,
    groups: readonly EpisodeGroup<Row>[],
    advantages: readonly number[][],
  ) {
    const tally = new EpisodeTally();
    for (const group of groups) tally.add(group);
    const uniform = advantages.filter(isWithoutSignal).length;
    this.#stepsWithoutSignal = uniform === groups.length ? this.#stepsWithoutSignal + 1 : 0;
    if (this.#stepsWithoutSignal === stepsBeforeAdvice) {
      const advice = task.demonstrate ? 'warm the model up first with merf sft, or try' : 'try';
      const message =
        `For ${stepsBeforeAdvice} steps all completions of a prompt have had the same reward, so every advantage was ` +
        `0: ${advice} other prompts, more completions of each or a higher temperature`;
      this.tell({ type: 'notice', message });
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
      rewardStd: standardDeviation(all.map(({ reward }) => reward.total)),
      correct: all.filter(({ reward }) => task.spec.isHighest(reward)).length / all.length,
      uniformGroups: uniform / groups.length,
      ...(this.settings.overlongBuffer > 0 && {
        overlong:
          all.reduce((sum, episode) => sum + overlongPunishment(episode, this.settings), 0) / all.length,
      }),
    };
  }

  #loss(): Loss {
    const { loss: type, clipLow, clipHigh, kl, klRatio, entropy, temperature, maxTokens } = this.settings;
    // The penalty of an anchor alone compares prompts, and its old log-probabilities are the policy's own.
    const common = { type, clipLow, clipHigh, kl, klRatio: klRatio && kl > 0, entropy, temperature };
    return { ...common, ...(type === 'dr_grpo' && { maxTokens }) };
  }
}

/** Fails before any work where a view names what the task's specification does not have. */
export function checkViews(task: Pick<Task<never>, 'spec'>, views: readonly MotivationView[]): void {
  for (const view of views) task.spec.describe(view);
}

/** The model that a policy was loaded from, by what was read of it; nothing where that is there no more. */
export function modelIdentity({
  files = [],
}: {
  readonly files?: readonly string[];
}): Record<string, string> {
  return files.length > 0 && files.every((path) => existsSync(path)) ? { model: fingerprint(files) } : {};
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
