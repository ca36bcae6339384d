import { join, resolve } from 'node:path';
import type { Command } from 'commander';
import type { z } from 'zod';
import { MerfError } from '../errors.js';
import type { Policy } from '../policy/index.js';
import { metaOf, parseSettings } from '../settings.js';
import { type RunResult, readSavedRun, type SavedRun } from '../train/loop.js';
import { readConfigFile } from './config.js';
import { addFlags } from './flags.js';
import { resolveModel, shortPath } from './paths.js';
import { loadOptions, type ModelFlags } from './policies.js';
import { type TaskChoice, taskPath } from './task.js';
import { trainingView, type View } from './terminal.js';

/** The flags of a command that trains which are no settings. */
export interface RunFlags {
  config?: string;
  resume?: string;
}

/** The flags of a command that trains: where its settings are, and each of them. */
export function addRunFlags(command: Command, schema: z.ZodObject): void {
  command
    .option(
      '--config <file>',
      'a .yaml, .json, .ts or .js file of settings, whose paths are relative to it; flags go over it',
    )
    .option(
      '--resume <folder>',
      'go on with the run in this folder, from its newest checkpoint, with its settings',
    );
  addFlags(command, schema.shape as Record<string, z.ZodType>);
}

/** The settings of a run: those of the run resumed, then the config file's, then the flags'. */
export async function gather(flags: RunFlags, schema: z.ZodObject, kind: SavedRun['kind'], name: string) {
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

/** The options of `Policy.load` for the policy that is trained. */
export function trainedOptions(settings: ModelFlags & { loraRank: number; seed: number; exact: boolean }) {
  const { loraRank: rank, seed, exact } = settings;
  return { ...loadOptions(settings, true), exact, ...(rank > 0 && { lora: { rank, seed } }) };
}

export interface OpenedRun {
  trainer: { run(options: { signal: AbortSignal }): Promise<RunResult>; stop(): void };
  policies: readonly Policy[];
}

/** Runs a trainer under a live view, with Ctrl-C wired to end the step, and says where the results are. */
export async function runTraining(
  out: string,
  open: (view: View, signal: AbortSignal) => Promise<OpenedRun>,
): Promise<void> {
  const view = trainingView();
  const abort = new AbortController();
  let opened: OpenedRun | undefined;
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

/** What run.json keeps so that --resume alone starts the run again, from any folder. */
export function launchOf(
  settings: TaskChoice,
  schema: z.ZodObject,
  trainer: z.ZodObject,
  configPath: string | undefined,
): Record<string, unknown> {
  const launch: Record<string, unknown> = {};
  for (const [key, field] of Object.entries(schema.shape)) {
    const value = settings[key];
    // What the trainer is told stands among its own settings.
    if (value === undefined || key in trainer.shape || key === 'out') continue;
    if (key === 'task' && typeof value === 'string') launch.task = taskPath(value, process.cwd());
    // A task that a config file made is made again from that file.
    else if (key === 'task') launch.config = resolve(configPath as string);
    else if (metaOf(field as z.ZodType).path && typeof value === 'string') launch[key] = resolve(value);
    else launch[key] = value;
  }
  launch.model = resolveModel(settings.model as string | undefined);
  return launch;
}

/** The keys of `schema` alone. */
export function pick<S extends z.ZodObject>(config: Record<string, unknown>, schema: S): z.output<S> {
  return Object.fromEntries(Object.entries(config).filter(([key]) => key in schema.shape)) as z.output<S>;
}
