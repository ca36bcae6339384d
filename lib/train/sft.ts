import { z } from 'zod';
import { invalidArgument, MerfError } from '../errors.js';
import type { Evaluation } from '../evaluate/index.js';
import { type Branch, countTokens, forestOf } from '../policy/index.js';
import type { ChatMessage } from '../prompt/chat-template.js';
import { type MotivationView, parseMotivationView } from '../prompt/motivation.js';
import { renderPrompt } from '../rollout/index.js';
import { defaultsOf, keysThatMatter, parseSettings } from '../settings.js';
import { Random, type RowSource, readRows, requireRows, shuffledRows, type Task } from '../tasks/index.js';
import { evaluateDuringTraining, heldOutRows } from './evaluation.js';
import { contentHash } from './identity.js';
import { type RunResult, type StepProgress, type TrainingEvent, TrainingLoop } from './loop.js';
import { type SftOptions, type SftSettings, sftSchema } from './settings.js';
import { checkViews, modelIdentity, type TrainablePolicy } from './trainer.js';
import { smallnessNotice, update, updateNotice } from './update.js';

/** A prompt, as messages or as text that is encoded as it stands, and what the model should write after it. */
export type Example =
  | { messages: readonly ChatMessage[]; completion: string }
  | { prompt: string; completion: string };

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
  /** With `resume`: the step whose checkpoint it goes on from instead of the newest; later ones are removed. */
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
export class SupervisedTrainer<Row = unknown> {
  readonly settings: SftSettings;
  readonly #options: SupervisedTrainerOptions<Row>;
  #loop: TrainingLoop | undefined;
  #stopping = false;

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
  }

  /** Trains until `steps` are done or stop() is called, as Trainer.run does. */
  async run(options: { signal?: AbortSignal } = {}): Promise<RunResult> {
    const { policy, task, out, resume, checkpoint, onEvent, launch } = this.#options;
    const settings = this.settings;
    const examples = await this.#examples();
    const evaluationRows =
      this.#options.evaluationRows?.slice(0, settings.evaluatePrompts) ??
      (task && settings.evaluateEvery > 0 ? await heldOutRows(task, settings.evaluatePrompts) : []);
    this.#loop = new TrainingLoop({
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
      ...(onEvent && { onEvent }),
      ...(task && {
        evaluate: (step, signal) =>
          evaluateDuringTraining({ policy, task, rows: evaluationRows, settings, step, onEvent, signal }),
      }),
      step: (...of) => this.#step(examples, ...of),
    });
    if (this.#stopping) this.#loop.stop();
    const message = smallnessNotice(settings);
    if (message !== undefined) onEvent?.({ type: 'notice', message });
    return this.#loop.run(options.signal);
  }

  /** Ends the run after the step in progress, which is then saved. */
  stop(): void {
    this.#stopping = true;
    this.#loop?.stop();
  }

  async #examples(): Promise<RowSource<Example>> {
    const { examples, task, rows: given } = this.#options;
    const { seed, motivation } = this.settings;
    if (examples) return shuffledRows(examples, seed);
    const demonstrated = task as Task<Row>;
    const rows = given ? shuffledRows(given, seed) : await demonstrated.rows({ split: 'train', seed });
    const views = motivation.map(parseMotivationView);
    const at = (position: number): Example => {
      const row = rows.at(position);
      const view = views[position % views.length] as MotivationView;
      return {
        messages: demonstrated.messages(row, view),
        completion: demonstrated.demonstrate?.(row, new Random(seed, position)) as string,
      };
    };
    return { at, fingerprint: contentHash([rows.fingerprint, views, at(0)]) };
  }

  async #step(
    examples: RowSource<Example>,
    step: number,
    position: number,
    signal: AbortSignal,
    progress: StepProgress,
  ) {
    const { policy, onEvent } = this.#options;
    const s = this.settings;
    const started = performance.now();
    onEvent?.({ type: 'phase', phase: 'training', step });
    const branches = Array.from({ length: s.examplesPerStep }, (_, i) =>
      this.#branch(examples.at(position + i)),
    );
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
    if (message !== undefined) onEvent?.({ type: 'notice', message });
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
    return { metrics: { ...metrics }, position: position + s.examplesPerStep };
  }

  #branch(example: Example): Branch {
    const { tokenizer, contextLength } = this.#options.policy;
    const prompt = renderPrompt(tokenizer, 'messages' in example ? example.messages : example.prompt);
    const promptTokens = prompt.tokens;
    const tokens = [...tokenizer.encode(example.completion), endOfTurn(tokenizer)];
    if (promptTokens.length === 0) throw invalidArgument('prompt', 'at least one token', prompt.text);
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

const messageSchema = z.looseObject({ role: z.string(), content: z.string().nullable() });
const exampleSchema = z.union([
  z.object({ messages: z.array(messageSchema).min(1), completion: z.string().min(1) }),
  z.object({ prompt: z.string().min(1), completion: z.string().min(1) }),
]);

/**
 * Examples from a .jsonl or .parquet file whose rows have a `completion` and either `messages` or a `prompt`.
 * @throws MerfError FILE_NOT_FOUND, UNSUPPORTED, EMPTY_DATASET, MALFORMED_FILE naming the line
 */
export async function readExamples(file: string): Promise<Example[]> {
  return requireRows(
    await readRows(file, (fields) => {
      const example = exampleSchema.safeParse(fields);
      if (example.success) return example.data;
      throw new Error(
        'Expected a "completion" of text and either "messages" of roles and contents or a "prompt" of text',
      );
    }),
  );
}
