import { extname, isAbsolute, resolve } from 'node:path';
import { MerfError } from '../errors.js';
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
  const { task } = settings;
  if (task === undefined) throw new MerfError('INVALID_CONFIG', 'Expected a task: name one with --task');
  if (isOpened(task)) {
    if (settings.data === undefined && settings.testData === undefined) return task;
    throw new MerfError(
      'INVALID_CONFIG',
      `Expected no data beside the task ${task.name}, which the config file has opened already`,
    );
  }
  const factory = isFactory(task) ? task : await getTaskFactory(task as string);
  const keys = Object.keys(factory.options.shape);
  return factory.open(Object.fromEntries(keys.map((key) => [key, settings[key]])));
}
