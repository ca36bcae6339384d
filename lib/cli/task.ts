import { extname, isAbsolute, resolve } from 'node:path';
import type { z } from 'zod';
import { MerfError } from '../errors.js';
import { unknownKey } from '../settings.js';
import { getTaskFactory, type Task, type TaskFactory } from '../tasks/index.js';

/** A task as settings give it: its name or path, or in a module also the task before or after it was opened. */
export type NamedTask = string | TaskFactory | Task;

/** A task with its options beside it, as they stand among the settings. */
export interface TaskChoice {
  readonly task?: NamedTask | undefined;
  readonly [option: string]: unknown;
}

export function isNamedTask(value: unknown): value is NamedTask {
  return typeof value === 'string' || isFactory(value) || isOpened(value);
}

export function isFactory(value: unknown): value is TaskFactory {
  return typeof (value as TaskFactory | null)?.open === 'function';
}

export function isOpened(value: unknown): value is Task {
  return typeof (value as Task | null)?.messages === 'function';
}

/** A task's name, or the path of its module seen from `folder`. */
export function taskPath(task: string, folder: string): string {
  return extname(task) === '' || isAbsolute(task) ? task : resolve(folder, task);
}

/**
 * The task that the settings name, made with those of its options that are given.
 * @throws MerfError INVALID_CONFIG where there is none, and what `getTaskFactory` and opening throw
 */
export async function openTask(settings: TaskChoice): Promise<Task> {
  const task = taskOf(settings);
  if (isOpened(task)) {
    if (settings.data === undefined && settings.testData === undefined) return task;
    throw new MerfError(
      'INVALID_CONFIG',
      `Expected no data beside the task ${task.name}, which the config file has opened already`,
    );
  }
  return openFactory(await factoryOf(task), settings);
}

/**
 * The task that the settings name with some options changed, whose values are given as on the command line.
 * @throws MerfError INVALID_CONFIG where the task has no such option, and as `openTask` does
 */
export async function openTaskWith(
  settings: TaskChoice,
  changed: Readonly<Record<string, string>>,
): Promise<Task> {
  const task = taskOf(settings);
  if (isOpened(task)) {
    throw new MerfError(
      'INVALID_CONFIG',
      `Expected a task that is not open yet where its options change, but the config file has opened ${task.name}`,
    );
  }
  const factory = await factoryOf(task);
  const shape = factory.options.shape as Record<string, z.ZodType>;
  const values = Object.entries(changed).map(([key, text]) => {
    const schema = shape[key];
    if (schema === undefined) {
      throw new MerfError(
        'INVALID_CONFIG',
        `The task ${factory.name}: ${unknownKey(key, Object.keys(shape))}`,
      );
    }
    return [key, schema.safeParse(text).success ? text : literalOf(text)];
  });
  return openFactory(factory, { ...settings, ...Object.fromEntries(values) });
}

function taskOf({ task }: TaskChoice): NamedTask {
  if (task === undefined) throw new MerfError('INVALID_CONFIG', 'Expected a task: name one with --task');
  return task;
}

async function factoryOf(task: string | TaskFactory): Promise<TaskFactory> {
  return isFactory(task) ? task : getTaskFactory(task);
}

function openFactory(factory: TaskFactory, settings: TaskChoice): Promise<Task> {
  const keys = Object.keys(factory.options.shape);
  return factory.open(Object.fromEntries(keys.map((key) => [key, settings[key]])));
}

/** A number or a truth value where the text reads as one. */
function literalOf(text: string): unknown {
  if (text === 'true' || text === 'false') return text === 'true';
  return text.trim() === '' || Number.isNaN(Number(text)) ? text : Number(text);
}
