import { toCamelCase } from '../settings.js';
import { getTaskFactory, type TaskFactory } from '../tasks/index.js';
import { readSavedRun } from '../train/loop.js';
import { readConfigContent } from './config.js';
import { isFactory, isOpened } from './task.js';
import { allowModules } from './trust.js';

/**
 * The task whose options a command line may hold: the one it names, else the one of its config file or of the run that
 * it resumes. `factory` is undefined where there is none, and `error` says why where one cannot be read: the command
 * itself comes to that too, unless it fails at a flag that the task would have had.
 */
export async function taskOfArguments(
  args: readonly string[],
): Promise<{ factory: TaskFactory | undefined; error?: unknown }> {
  try {
    const task = argumentOf(args, 'task') ?? (await taskOfRun(args));
    if (task === undefined || isOpened(task)) return { factory: undefined };
    return { factory: isFactory(task) ? task : await getTaskFactory(task as string) };
  } catch (error) {
    return { factory: undefined, error };
  }
}

async function taskOfRun(args: readonly string[]): Promise<unknown> {
  const resumed = argumentOf(args, 'resume');
  if (resumed !== undefined) {
    const named = { task: false, config: argumentOf(args, 'config') !== undefined };
    await allowModules(resumed, { ...named, trust: args.includes('--trust-run') });
  }
  const launch = resumed === undefined ? undefined : readSavedRun(resumed).launch;
  const config = argumentOf(args, 'config') ?? (launch?.config as string | undefined);
  const content = config === undefined ? {} : await readConfigContent(config);
  return Object.entries(content).find(([key]) => toCamelCase(key) === 'task')?.[1] ?? launch?.task;
}

/** What follows the last `--flag` among the arguments. */
function argumentOf(args: readonly string[], flag: string): string | undefined {
  const name = `--${flag}`;
  const at = args.findLastIndex((arg) => arg === name || arg.startsWith(`${name}=`));
  if (at < 0) return undefined;
  return args[at] === name ? args[at + 1] : (args[at] as string).slice(name.length + 1);
}
