import { existsSync, readFileSync } from 'node:fs';
import { extname, join, resolve } from 'node:path';
import type { Command } from 'commander';
import type { z } from 'zod';
import { MerfError } from '../../errors.js';
import { Policy } from '../../policy/index.js';
import { getTask, type Task } from '../../tasks/index.js';
import { type RunResult, readSavedRun, type SavedRun } from '../../train/loop.js';
import { grpoSchema, parseSettings, sftSchema } from '../../train/settings.js';
import { readExamples, SupervisedTrainer } from '../../train/sft.js';
import { Trainer } from '../../train/trainer.js';
import {
  modelShape,
  readConfigFile,
  type SftConfig,
  sftFileSchema,
  type TrainConfig,
  taskShape,
  trainedShape,
  trainFileSchema,
} from '../config.js';
import { addFlags } from '../flags.js';
import { resolveModel, shortPath } from '../models.js';
import { trainingView, type View } from '../terminal.js';

interface Shared {
  config?: string;
  resume?: string;
}

export function addTrain(program: Command): void {
  const command = program
    .command('train')
    .summary('train a model by reinforcement learning (GRPO), with its reward rules in the prompt')
    .description(
      'Trains a model by GRPO on a task. By default the prompt states the reward rules in full, which is MeRF; ' +
        '--motivation none is the plain RLVR baseline.\n\n' +
        'The folder of the run holds metrics.jsonl (a line a step), completions/ (every completion with its score, ' +
        'as JSONL and as a transcript), checkpoints/ and, in the end, model/ in Hugging Face layout. Ctrl-C ends the ' +
        'step, saves and leaves; a second Ctrl-C gives up at once.',
    );
  addRunFlags(command, trainFileSchema);
  command
    .addHelpText(
      'after',
      '\nExamples:\n' +
        '  merf train --task knights-and-knaves --people 2 --steps 20 --out runs/first\n' +
        '  merf train --resume runs/first --steps 40\n' +
        '  merf train --config grpo.yaml --motivation none --out runs/rlvr\n' +
        '  merf train --task ./my-task.ts --model ./SmolLM2-135M-Instruct.Q4_1.gguf --motivation full@0,none@100\n\n' +
        'A config file holds the same keys as the flags, in snake_case or camelCase:\n' +
        '  task: knights-and-knaves\n  people: 2-3\n  learning_rate: 2e-5\n',
    )
    .action((flags: Shared & Partial<TrainConfig>) => train(flags));
}

export function addSft(program: Command): void {
  const command = program
    .command('sft')
    .summary('warm a model up on prompts and completions, so that it writes the demanded format')
    .description(
      'Supervised finetuning, the loss on completions alone. Learns from --data, a .jsonl file whose lines have a ' +
        '"completion" and either "messages" or a "prompt"; without it, from the demonstrations that --task writes.\n\n' +
        'The folder of the run is that of merf train, without completions.',
    );
  addRunFlags(command, sftFileSchema);
  command
    .addHelpText(
      'after',
      '\nExamples:\n' +
        '  merf sft --task knights-and-knaves --people 2 --steps 80 --learning-rate 3e-4 --out runs/warm\n' +
        '  merf sft --data examples.jsonl --model ./model --steps 200 --out runs/sft\n' +
        '  merf train --model runs/warm --task knights-and-knaves\n',
    )
    .action((flags: Shared & Partial<SftConfig>) => sft(flags));
}

function addRunFlags(command: Command, schema: z.ZodObject): void {
  command
    .option('--config <file>', 'a .yaml, .json, .ts or .js file of settings; flags go over it')
    .option(
      '--resume <folder>',
      'go on with the run in this folder, from its newest checkpoint, with its settings',
    );
  addFlags(command, schema.shape as Record<string, z.ZodType>);
}

/** The settings of a run: those of the run resumed, then the config file's, then the flags'. */
async function gather(flags: Shared, schema: z.ZodObject, kind: SavedRun['kind'], name: string) {
  const { config: configFile, resume, ...given } = flags;
  const before = resume === undefined ? undefined : readSavedRun(resume);
  if (before && before.kind !== kind) {
    throw new MerfError('RESUME_MISMATCH', `Cannot resume ${resume}: kind was ${before.kind} and is ${kind}`);
  }
  const configPath = configFile ?? (before?.launch?.config as string | undefined);
  const fromFile = configPath === undefined ? {} : await readConfigFile(configPath, schema);
  const stored = before
    ? { ...fromFile, ...before.launch, ...before.settings, ...(configFile && fromFile) }
    : fromFile;
  const { config: _, ...known } = stored as Record<string, unknown>;
  // A later end of the run does not move the end of a schedule, and one that the run had stays.
  const merged = { ...known, ...given, ...(resume !== undefined && { out: resume }) };
  const settings = parseSettings(schema, merged, configPath ? `${configPath} and the flags` : 'the flags');
  const out = (settings.out as string | undefined) ?? defaultOut(name);
  return { settings, out: resolve(out), resume: resume !== undefined, configPath };
}

function defaultOut(name: string): string {
  const stamp = new Date().toISOString().slice(0, 19).replace('T', '-').replaceAll(':', '');
  return join('runs', `${name}-${stamp}`);
}

async function train(flags: Shared & Partial<TrainConfig>): Promise<void> {
  const name = typeof flags.task === 'string' && extname(flags.task) === '' ? flags.task : 'train';
  const { settings, out, resume, configPath } = await gather(flags, trainFileSchema, 'grpo', name);
  const config = settings as z.output<typeof trainFileSchema>;
  const task = await openTask(config);
  const launch = launchOf(config, configPath);
  const model = launch.model as string;
  await runTraining(out, async (view, signal) => {
    const policy = await Policy.load(model, { ...trainedOptions(config), signal });
    const reference =
      config.kl > 0 ? await Policy.load(model, { ...loadOptions(config, false), signal }) : undefined;
    view.event({
      type: 'notice',
      message: `Training ${shortPath(model)} on ${task.name} into ${shortPath(out)}, on ${deviceText(policy)}`,
    });
    const trainer = new Trainer({
      ...pick(config, grpoSchema),
      policy,
      task,
      ...(reference && { reference }),
      out,
      resume,
      launch,
      onEvent: view.event,
    });
    return { trainer, policies: reference ? [policy, reference] : [policy] };
  });
}

async function sft(flags: Shared & Partial<SftConfig>): Promise<void> {
  const { settings, out, resume, configPath } = await gather(flags, sftFileSchema, 'sft', 'sft');
  const config = settings as z.output<typeof sftFileSchema>;
  const isExamples =
    config.data !== undefined && extname(config.data) === '.jsonl' && holdsExamples(config.data);
  if (!isExamples && config.task === undefined) {
    throw new MerfError(
      'INVALID_CONFIG',
      'Expected --data with prompts and completions, or a --task that demonstrates',
    );
  }
  const examples = isExamples ? await readExamples(config.data as string) : undefined;
  const { data: _, ...withoutData } = config;
  const task = config.task === undefined ? undefined : await openTask(isExamples ? withoutData : config);
  const launch = launchOf(config, configPath);
  const model = launch.model as string;
  await runTraining(out, async (view, signal) => {
    const policy = await Policy.load(model, { ...trainedOptions(config), signal });
    view.event({
      type: 'notice',
      message: `Warming up ${shortPath(model)} into ${shortPath(out)}, on ${deviceText(policy)}`,
    });
    const trainer = new SupervisedTrainer({
      ...pick(config, sftSchema),
      policy,
      ...(examples && { examples }),
      ...(task && { task }),
      out,
      resume,
      launch,
      onEvent: view.event,
    });
    return { trainer, policies: [policy] };
  });
}

interface Opened {
  trainer: { run(options: { signal: AbortSignal }): Promise<RunResult>; stop(): void };
  policies: readonly Policy[];
}

/** Runs a trainer under a live view, with Ctrl-C wired to end the step, and says where the results are. */
async function runTraining(
  out: string,
  open: (view: View, signal: AbortSignal) => Promise<Opened>,
): Promise<void> {
  const view = trainingView();
  const abort = new AbortController();
  let opened: Opened | undefined;
  let interrupts = 0;
  const onInterrupt = () => {
    interrupts += 1;
    if (!opened || interrupts > 1) return abort.abort();
    opened.trainer.stop();
    const message = 'Ending after this step, which is then saved. Ctrl-C again gives up at once.';
    view.event({ type: 'notice', message });
  };
  process.on('SIGINT', onInterrupt);
  try {
    opened = await open(view, abort.signal);
    const result = await opened.trainer.run({ signal: abort.signal });
    view.close();
    const done = result.stopped ? `Stopped after step ${result.step}` : `Done: ${result.step} steps`;
    process.stdout.write(
      `${done}. Model in ${shortPath(result.model)}, metrics in ${shortPath(join(out, 'metrics.jsonl'))}\n` +
        (result.stopped ? `Go on with --resume ${shortPath(out)}\n` : ''),
    );
  } finally {
    view.close();
    process.off('SIGINT', onInterrupt);
    for (const policy of opened?.policies ?? []) policy.dispose();
  }
}

export interface TaskChoice {
  task?: string | Task | undefined;
  people?: number | string | number[] | undefined;
  depth?: number | undefined;
  data?: string | undefined;
  testData?: string | undefined;
}

/** The task that the settings name, made with those of its options that are given. */
export async function openTask(choice: TaskChoice): Promise<Task> {
  const { task, people, depth, data, testData } = choice;
  if (task === undefined) throw new MerfError('INVALID_CONFIG', 'Expected a task: name one with --task');
  if (typeof task !== 'string') return task;
  const options = { people, depth, data, testData };
  return getTask(
    task,
    Object.fromEntries(Object.entries(options).filter(([, value]) => value !== undefined)),
  );
}

export function loadOptions(
  config: { device: string; dtype: 'auto' | 'f32' | 'bf16'; threads?: number | undefined },
  trainable: boolean,
) {
  const { device, dtype, threads } = config;
  return { device, dtype, trainable, ...(threads !== undefined && { threads }) };
}

/** As loadOptions, for the policy that is trained. */
function trainedOptions(
  config: Parameters<typeof loadOptions>[0] & { loraRank: number; seed: number; exact: boolean },
) {
  const { loraRank: rank, seed, exact } = config;
  return { ...loadOptions(config, true), exact, ...(rank > 0 && { lora: { rank, seed } }) };
}

/** The device in a heading, with why `auto` chose no GPU. */
export function deviceText({ device: { name, reason } }: Policy): string {
  return reason === undefined ? name : `${name} (${reason})`;
}

/** What run.json keeps so that --resume alone starts the run again, from any folder. */
function launchOf(
  config: TaskChoice & Record<string, unknown>,
  configPath: string | undefined,
): Record<string, unknown> {
  const launch: Record<string, unknown> = {};
  for (const key of [...Object.keys(taskShape), ...Object.keys(modelShape), ...Object.keys(trainedShape)]) {
    const value = config[key];
    if (value === undefined) continue;
    const isPath = ['data', 'testData'].includes(key) || (key === 'task' && extname(String(value)) !== '');
    if (typeof value === 'string' && isPath) launch[key] = resolve(value);
    // A task that a config file made is made again from that file.
    else if (key === 'task' && typeof value !== 'string') launch.config = resolve(configPath as string);
    else launch[key] = value;
  }
  launch.model = resolveModel(config.model as string | undefined);
  return launch;
}

function pick<S extends z.ZodObject>(config: Record<string, unknown>, schema: S): z.output<S> {
  return Object.fromEntries(Object.entries(config).filter(([key]) => key in schema.shape)) as z.output<S>;
}

function holdsExamples(file: string): boolean {
  if (!existsSync(file)) throw new MerfError('FILE_NOT_FOUND', `No data at ${file}`);
  const first = readFileSync(file, 'utf8').split('\n', 1)[0] ?? '';
  return /"completion"\s*:/.test(first);
}
