import { join, resolve } from 'node:path';
import type { Command } from 'commander';
import type { z } from 'zod';
import { MerfError } from '../errors.js';
import type { Policy } from '../policy/index.js';
import { metaOf, parseSettings } from '../settings.js';
import { type RunResult, readSavedRun, type SavedRun, whatIsLeft } from '../train/loop.js';
import { RunLock } from '../train/run-lock.js';
import { readConfigFile } from './config.js';
import { addFlags, whole } from './flags.js';
import { print, printError } from './output.js';
import { resolveModel, shortPath } from './paths.js';
import { loadOptions, type ModelFlags } from './policies.js';
import { type TaskChoice, taskPath } from './task.js';
import { trainingView, type View } from './terminal.js';
import { allowModules, signatureOf } from './trust.js';

/** The flags of a command that trains which are no settings. */
export interface RunFlags {
  config?: string;
  resume?: string;
  checkpoint?: number;
  trustRun?: boolean;
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
    )
    .option(
      '--checkpoint <step>',
      'with --resume: go on from the checkpoint after this step instead, and remove the later ones',
      whole(1),
    )
    .option(
      '--trust-run',
      'with --resume: run the modules that the run names though this account did not make it (default: it asks)',
    );
  addFlags(command, schema.shape as Record<string, z.ZodType>);
}

/** The settings of a run: those of the run resumed, then the config file's, then the flags'. */
export async function gather(flags: RunFlags, schema: z.ZodObject, kind: SavedRun['kind'], name: string) {
  const { config: configFile, resume, checkpoint, trustRun = false, ...given } = flags;
  if (resume === undefined && (checkpoint !== undefined || trustRun)) {
    const flag = checkpoint === undefined ? '--trust-run' : '--checkpoint';
    throw new MerfError('INVALID_ARGUMENT', `Expected --resume beside ${flag}`);
  }
  const before = resume === undefined ? undefined : readSavedRun(resume);
  if (resume !== undefined) {
    RunLock.checkFree(resume);
    const named = { task: 'task' in given, config: configFile !== undefined };
    await allowModules(resume, { ...named, trust: trustRun });
  }
  if (before && before.kind !== kind) {
    throw new MerfError('RESUME_MISMATCH', `Cannot resume ${resume}: kind was ${before.kind} and is ${kind}`);
  }
  const configPath = configFile ?? (before?.launch?.config as string | undefined);
  const fromFile = configPath === undefined ? {} : await readConfigFile(configPath, schema);
  const stored = before
    ? { ...fromFile, ...before.launch, ...before.settings, ...(configFile && fromFile) }
    : fromFile;
  const { config: _, signature: __, ...known } = stored as Record<string, unknown>;
  // A later end of the run does not move the end of a schedule, and one that the run had stays.
  const merged = { ...known, ...given, ...(resume !== undefined && { out: resume }) };
  const settings = parseSettings(schema, merged, configPath ? `${configPath} and the flags` : 'the flags');
  const out = (settings.out as string | undefined) ?? defaultOut(name);
  const resumed = { resume: resume !== undefined, ...(checkpoint !== undefined && { checkpoint }) };
  return { settings, out: resolve(out), resumed, configPath };
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

/** Runs a trainer under a live view, with Ctrl-C and SIGTERM wired to end the step, and says where the results are. */
export async function runTraining(
  out: string,
  open: (view: View, signal: AbortSignal) => Promise<OpenedRun>,
): Promise<void> {
  const view = trainingView();
  const abort = new AbortController();
  let opened: OpenedRun | undefined;
  let interrupts = 0;
  const onInterrupt = (signal: NodeJS.Signals) => {
    interrupts += 1;
    if (!opened || interrupts > 1) return abort.abort();
    opened.trainer.stop();
    const again = signal === 'SIGINT' ? 'Ctrl-C again' : 'Another signal';
    const message = `Ending after this step, which is then saved. ${again} gives up at once.`;
    view.event({ type: 'notice', message });
  };
  const onExit = (code: number) => {
    process.exitCode = code === 0 ? 1 : code;
    printError(
      `merf: the process was ended in the middle of the run, with exit code ${code}; ${whatIsLeft(out)}\n`,
    );
  };
  for (const signal of endingSignals) process.on(signal, onInterrupt);
  process.on('exit', onExit);
  try {
    opened = await open(view, abort.signal);
    const result = await opened.trainer.run({ signal: abort.signal });
    view.close();
    const done = result.stopped ? `Stopped after step ${result.step}` : `Done: ${result.step} steps`;
    print(
      `${done}. Model in ${shortPath(result.model)}, metrics in ${shortPath(join(out, 'metrics.jsonl'))}\n` +
        (result.stopped ? `Go on with --resume ${shortPath(out)}\n` : ''),
    );
  } finally {
    view.close();
    for (const signal of endingSignals) process.off(signal, onInterrupt);
    process.off('exit', onExit);
    for (const policy of opened?.policies ?? []) policy.dispose();
  }
}

const endingSignals = ['SIGINT', 'SIGTERM'] as const;

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
  const signature = signatureOf(launch);
  return { ...launch, ...(signature !== undefined && { signature }) };
}

/** The keys of `schema` alone. */
export function pick<S extends z.ZodObject>(config: Record<string, unknown>, schema: S): z.output<S> {
  return Object.fromEntries(Object.entries(config).filter(([key]) => key in schema.shape)) as z.output<S>;
}
