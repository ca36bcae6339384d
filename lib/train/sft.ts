import { invalidArgument, MerfError } from '../errors.js';
import type { Evaluation } from '../evaluate/index.js';
import { type Branch, countTokens, forestOf } from '../policy/index.js';
import { type MotivationView, parseMotivationView } from '../prompt/motivation.js';
import {
  checkPrompts,
  movedNotice,
  PromptBounds,
  type RolloutTokenizer,
  renderCompletion,
  renderPrompt,
} from '../rollout/index.js';
import { defaultsOf, keysThatMatter, parseSettings } from '../settings.js';
import { notePlace, placeOf } from '../tasks/dataset.js';
import { Random, type RowSource, shuffledRows, type Task } from '../tasks/index.js';
import { evaluateDuringTraining, fittingRows, heldOutRows } from './evaluation.js';
import { IterableTrainer } from './events.js';
import type { Example } from './examples.js';
import { contentHash } from './identity.js';
import { type RunResult, type StepProgress, type TrainingEvent, TrainingLoop } from './loop.js';
import { findOverlong } from './overlong-rows.js';
import { type SftOptions, type SftSettings, sftSchema } from './settings.js';
import { checkViews, modelIdentity, type TrainablePolicy } from './trainer.js';
import { smallnessNotice, update, updateNotice } from './update.js';

export interface SupervisedTrainerOptions<Row> extends SftOptions {
  policy: TrainablePolicy;
  /** What to learn; without it, the task's own demonstrations. */
  examples?: readonly Example[];
  task?: Task<Row>;
  /** Rows to demonstrate (default: the task's own). */
  rows?: readonly Row[];
  /** Held-out rows to evaluate the task on (default: the task's own). */
  evaluationRows?: readonly Row[];
  out: string;
  resume?: boolean;
  /**
   * With `resume`: the step whose checkpoint it goes on from instead of the newest; later ones are removed.
   */
  checkpoint?: number;
  onEvent?: (event: TrainingEvent) => void;
  launch?: Record<string, unknown>;
}

/** One row of a supervised run's metrics.jsonl. */
export interface SftMetrics {
  step: number;
  /** Mean over the completions' tokens, in nats. */
  loss: number | null;
  gradientNorm: number | null;
  learningRate: number;
  updates: number;
  skippedUpdates: number;
  /** Completion tokens that the loss was taken over. */
  tokens: number;
  trainingTokensPerSecond: number;
  /** How often work of this step waited for the GPU's memory pool; on a GPU only. */
  memoryRetries?: number;
  seconds: number;
  evaluation?: Record<string, Evaluation>;
}

/** Supervised finetuning on completions alone: the warm start of models that never write the demanded format. */
export class SupervisedTrainer<Row = unknown> extends IterableTrainer {
  readonly settings: SftSettings;
  readonly #options: SupervisedTrainerOptions<Row>;
  /** The token that a completion ends with. */
  #end: number | undefined;
  readonly #bounds: PromptBounds;

  /** @throws MerfError INVALID_CONFIG, INVALID_ARGUMENT, UNSUPPORTED for a task that cannot demonstrate */
  constructor(options: SupervisedTrainerOptions<Row>) {
    const {
      policy,
      examples,
      task,
      rows,
      evaluationRows,
      out,
      resume,
      checkpoint,
      onEvent,
      launch,
      ...settings
    } = options;
    super(onEvent);
    const parsed = parseSettings(sftSchema, settings);
    if (parsed.schedule !== 'constant') parsed.decaySteps ??= parsed.steps;
    if (parsed.evaluateEvery > 0 && task === undefined) {
      throw new MerfError('INVALID_CONFIG', 'Expected a task to evaluate on where evaluateEvery is above 0');
    }
    if (!examples && !task) {
      throw new MerfError(
        'INVALID_ARGUMENT',
        'Expected examples or a task to learn from but received neither',
      );
    }
    if (!examples && task && !task.demonstrate) {
      throw new MerfError(
        'UNSUPPORTED',
        `The task ${task.name} cannot write demonstrations: give it examples`,
      );
    }
    if (task)
      checkViews(task, [...parsed.motivation, ...parsed.evaluateMotivations].map(parseMotivationView));
    this.settings = parsed;
    this.#options = options;
    this.#bounds = new PromptBounds(policy.tokenizer);
  }

  protected override async train(options: { signal?: AbortSignal }): Promise<RunResult> {
    const { policy, task, out, resume, checkpoint, launch } = this.#options;
    const onEvent = this.tell;
    const settings = this.settings;
    const told = { onEvent, signal: options.signal };
    const filtering = { filter: settings.filterOverlongExamples, setting: 'filterOverlongExamples' };
    const { examples, all, row } = await this.#examples();
    for (const message of this.#promptNotices(row)) onEvent({ type: 'notice', message });
    if (all) {
      await findOverlong(all.examples, {
        what: 'examples',
        count: all.count,
        measure: (example) => this.#overlong(example),
        contextLength: policy.contextLength,
        ...filtering,
        ...told,
      });
    }
    const held =
      this.#options.evaluationRows?.slice(0, settings.evaluatePrompts) ??
      (task && settings.evaluateEvery > 0 ? await heldOutRows(task, settings.evaluatePrompts) : []);
    const views = settings.evaluateMotivations.map(parseMotivationView);
    const evaluationRows = task
      ? await fittingRows(held, { policy, task, views, ...filtering, ...told })
      : held;
    const loop = new TrainingLoop({
      kind: 'sft',
      policy,
      out,
      resume: resume ?? false,
      ...(checkpoint !== undefined && { checkpoint }),
      settings,
      matters: keysThatMatter(sftSchema),
      defaults: defaultsOf(sftSchema),
      identity: { ...modelIdentity(policy), data: examples.fingerprint },
      ...(launch && { launch }),
      onEvent,
      ready: this.taken,
      ...(task && {
        evaluate: (step, signal) =>
          evaluateDuringTraining({ policy, task, rows: evaluationRows, settings, step, onEvent, signal }),
      }),
      step: (...of) => this.#step(examples, ...of),
    });
    const message = smallnessNotice(settings);
    if (message !== undefined) onEvent({ type: 'notice', message });
    return this.runLoop(loop, options.signal);
  }

  /**
   * The examples by position, all that there may be where there is an end of them, and a row that is
   * demonstrated.
   */
  async #examples(): Promise<{
    examples: RowSource<Example>;
    all?: { count: number; examples: Iterable<Example> };
    row?: Row;
  }> {
    const { examples, task, rows: given } = this.#options;
    const { seed, motivation } = this.settings;
    if (examples) {
      const shuffled = shuffledRows(examples, seed);
      await shuffled.prepare?.();
      return { examples: shuffled, all: { count: examples.length, examples } };
    }
    const demonstrated = task as Task<Row>;
    const rows = given ? shuffledRows(given, seed) : await demonstrated.rows({ split: 'train', seed });
    await rows.prepare?.();
    const views = motivation.map(parseMotivationView);
    const exampleOf = (row: Row, view: MotivationView, random: Random): Example => {
      const example = {
        messages: demonstrated.messages(row, view),
        completion: demonstrated.demonstrate?.(row, random) as string,
      };
      notePlace(example, placeOf(row));
      return example;
    };
    const at = (position: number): Example => {
      const view = views[position % views.length] as MotivationView;
      return exampleOf(rows.at(position), view, new Random(seed, position));
    };
    const { size } = rows;
    function* ofEachRow(count: number) {
      for (let i = 0; i < count; i++) {
        for (const view of views) yield exampleOf(rows.at(i), view, new Random(seed, i));
      }
    }
    return {
      examples: { at, fingerprint: contentHash([rows.fingerprint, views, at(0)]) },
      row: rows.at(0),
      ...(size !== undefined && { all: { count: size * views.length, examples: ofEachRow(size) } }),
    };
  }

  /** The branches of the next examples from a position on, and the position behind them. */
  #branches(examples: RowSource<Example>, from: number): { branches: Branch[]; position: number } {
    const { examplesPerStep, filterOverlongExamples } = this.settings;
    const branches: Branch[] = [];
    let position = from;
    let refused = 0;
    while (branches.length < examplesPerStep) {
      const example = examples.at(position++);
      try {
        branches.push(this.#branch(example));
        refused = 0;
      } catch (error) {
        if (!isOverlong(error)) throw error;
        if (!filterOverlongExamples) throw atItsPlace(example, error);
        // A file has been measured before; what is generated may have no end of examples that do not fit.
        if (++refused === Math.max(mostRefused, examples.size ?? 0)) throw error;
      }
    }
    return { branches, position };
  }

  /** Tokens of an example that is longer than the context, its end among them, otherwise undefined. */
  #overlong(example: Example): number | undefined {
    const { tokenizer, contextLength } = this.#options.policy;
    const prompt = 'messages' in example ? example.messages : example.prompt;
    const bound = this.#bounds.of(prompt);
    if (bound + Buffer.byteLength(example.completion) < contextLength) return undefined;
    if (bound === Number.POSITIVE_INFINITY) this.#bounds.note(prompt, renderPrompt(tokenizer, prompt).text);
    const { promptTokens, tokens } = this.#encoded(example);
    const length = promptTokens.length + tokens.length;
    return length > contextLength ? length : undefined;
  }

  /**
   * What the user should know of how the prompts are written.
   * @param row one that the task demonstrates, where there are no examples
   */
  #promptNotices(row: Row | undefined): string[] {
    const { policy, examples, task } = this.#options;
    if (examples) return exampleNotices(policy.tokenizer, examples);
    const views = this.settings.motivation.map(parseMotivationView);
    return checkPrompts(policy.tokenizer, task as Task<Row>, row as Row, views);
  }

  async #step(
    examples: RowSource<Example>,
    step: number,
    position: number,
    signal: AbortSignal,
    progress: StepProgress,
  ) {
    const { policy } = this.#options;
    const onEvent = this.tell;
    const s = this.settings;
    const started = performance.now();
    onEvent({ type: 'phase', phase: 'training', step });
    const { branches, position: next } = this.#branches(examples, position);
    const forest = forestOf(branches);
    const loss = { type: 'cross_entropy' as const };
    const result = await update(policy, forest, loss, s, {
      step,
      signal,
      beforeUpdate: () => {
        progress.updated = true;
      },
    });
    const { stats, gradientNorm, learningRate, skipped } = result;
    const message = updateNotice(step, result);
    if (message !== undefined) onEvent({ type: 'notice', message });
    const seconds = (performance.now() - started) / 1000;
    const metrics: Omit<SftMetrics, 'step'> = {
      loss: stats?.loss ?? null,
      gradientNorm: skipped ? null : gradientNorm,
      learningRate,
      updates: skipped ? 0 : 1,
      skippedUpdates: skipped ? 1 : 0,
      tokens: branches.reduce((sum, b) => sum + (b.completions[0]?.tokens.length ?? 0), 0),
      trainingTokensPerSecond: countTokens(forest) / seconds,
      seconds,
    };
    return { metrics: { ...metrics }, position: next };
  }

  #branch(example: Example): Branch {
    const { contextLength } = this.#options.policy;
    const { promptTokens, tokens } = this.#encoded(example);
    const length = promptTokens.length + tokens.length;
    if (length > contextLength) {
      throw new MerfError(
        'CONTEXT_EXCEEDED',
        `Expected at most ${contextLength} tokens for an example but received ${length}: ` +
          JSON.stringify(example.completion.slice(0, 80)),
      );
    }
    return { promptTokens, completions: [{ tokens, train: {} }] };
  }

  #encoded(example: Example): { promptTokens: readonly number[]; tokens: readonly number[] } {
    const { tokenizer } = this.#options.policy;
    const said = 'messages' in example ? example.messages : example.prompt;
    const prompt = renderPrompt(tokenizer, said, undefined, 'row');
    if (prompt.tokens.length === 0) throw invalidArgument('prompt', 'at least one token', prompt.text);
    this.#end ??= endOfTurn(tokenizer);
    const { tokens } = renderCompletion(tokenizer, prompt, example.completion, this.#end);
    return { promptTokens: prompt.tokens, tokens };
  }
}

function exampleNotices(tokenizer: RolloutTokenizer, examples: readonly Example[]): string[] {
  const notices = [...(tokenizer.notices ?? [])];
  const starts = examples.map((example) => ('messages' in example ? example.messages[0]?.role : undefined));
  if (tokenizer.keepsSystemMessages === false && starts.includes('system')) notices.push(movedNotice);
  const names = new Set<string>();
  const naming = examples.filter((example) => {
    const texts =
      'messages' in example ? example.messages.map(({ content }) => content ?? '') : [example.prompt];
    const found = texts.flatMap((text) =>
      (tokenizer.specialSpans?.(text) ?? []).map(([start, end]) => text.slice(start, end)),
    );
    for (const name of found) names.add(name);
    return found.length > 0;
  });
  if (naming.length > 0) {
    const fate =
      tokenizer.splitSpecialTokens === false
        ? 'which become tokens there'
        : 'which stay text (splitSpecialTokens: false makes them tokens)';
    notices.push(
      `The prompts of ${naming.length} of ${examples.length} examples name special tokens, ${fate}: ` +
        [...names].join(', '),
    );
  }
  return notices;
}

// So many generated examples in a row that do not fit are no accident.
const mostRefused = 1000;

function isOverlong(error: unknown): error is MerfError {
  return error instanceof MerfError && error.code === 'CONTEXT_EXCEEDED';
}

function atItsPlace(example: Example, error: MerfError): MerfError {
  const place = placeOf(example);
  return place === undefined
    ? error
    : new MerfError(error.code, `${place}: ${error.message}`, { cause: error });
}

/** The token that a completion ends with: the chat template's end of turn, or else the end of the sequence. */
function endOfTurn(tokenizer: TrainablePolicy['tokenizer']): number {
  const fallback = tokenizer.eosIds[0];
  if (fallback === undefined)
    throw new MerfError('UNSUPPORTED', 'The model has no token that ends a completion');
  if (!tokenizer.hasChatTemplate) return fallback;
  const reply = 'reply';
  const text = tokenizer.applyChatTemplate([
    { role: 'user', content: 'question' },
    { role: 'assistant', content: reply },
  ]);
  const after = text.slice(text.lastIndexOf(reply) + reply.length).trimStart();
  const first = after === '' ? undefined : tokenizer.encode(after)[0];
  return first !== undefined && tokenizer.eosIds.includes(first) ? first : fallback;
}
