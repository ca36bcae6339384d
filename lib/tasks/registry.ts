import { existsSync } from 'node:fs';
import { extname, resolve } from 'node:path';
import { pathToFileURL } from 'node:url';
import { describeValue, MerfError } from '../errors.js';
import { countdown } from './countdown/index.js';
import { type DataOptions, type TaskFactory, whatIsNoTask } from './define.js';
import { knightsAndKnaves } from './knights-and-knaves/index.js';
import { math } from './math/index.js';
import { search } from './search/index.js';
import type { ReadOptions, Task } from './task.js';

const factories = {
  'knights-and-knaves': knightsAndKnaves,
  countdown,
  math,
  search,
} as const;

/** The tasks that ship with merf, by name. */
type Factories = typeof factories;
type OptionsOf<F> = F extends TaskFactory<infer _, infer Options> ? Options & DataOptions : never;
type RowOf<F> = F extends TaskFactory<infer Row, infer _> ? Row : never;

type AnyOptions = OptionsOf<Factories[keyof Factories]>;
type KeysOf<T> = T extends T ? keyof T : never;
type ValueOf<T, K> = T extends T ? (K extends keyof T ? T[K] : never) : never;

/** The options of all tasks that ship with merf together. */
export type TaskOptions = { [K in KeysOf<AnyOptions>]?: ValueOf<AnyOptions, K> };

/** The tasks that ship with merf, before their options are known. */
export function taskFactories(): readonly TaskFactory[] {
  // Rows and options are a task's own business: whoever opens it by name has them checked by it.
  return Object.values(factories) as unknown as readonly TaskFactory[];
}

/** The names that `getTask` knows. */
export function taskNames(): string[] {
  return Object.keys(factories);
}

/**
 * A task before its options are known, by its name or by the path of a module of the user's that exports a `task` made
 * by `defineTask`.
 *
 * @param name one of `taskNames()`, or a path that ends in .js, .mjs, .ts or .mts
 * @throws MerfError INVALID_ARGUMENT for an unknown name or a module without a task, FILE_NOT_FOUND, UNSUPPORTED
 */
export async function getTaskFactory(name: string): Promise<TaskFactory> {
  const factory = taskFactories().find((candidate) => candidate.name === name);
  if (factory) return factory;
  if (!['.js', '.mjs', '.ts', '.mts'].includes(extname(String(name)))) {
    throw new MerfError(
      'INVALID_ARGUMENT',
      `Expected one of ${taskNames().join(', ')}, or the path of a .ts or .js module, for task but received ` +
        describeValue(name),
    );
  }
  const { task } = await importModule(name);
  const wrong = whatIsNoTask(task);
  if (wrong === undefined) return task as TaskFactory;
  throw new MerfError(
    'INVALID_ARGUMENT',
    `Expected ${name} to export a "task" made by defineTask, but ${wrong}`,
  );
}

/**
 * The task `name`, as `getTaskFactory` finds it, with these options.
 *
 * @param options undefined values count as absent
 * @param reading a signal that ends the reading of the task's data early
 * @throws MerfError INVALID_ARGUMENT for an unknown name or option, FILE_NOT_FOUND, UNSUPPORTED, and what reading
 * the task's data throws
 */
export function getTask<Name extends keyof Factories>(
  name: Name,
  options?: OptionsOf<Factories[Name]>,
  reading?: ReadOptions,
): Promise<Task<RowOf<Factories[Name]>>>;
export function getTask(
  name: string,
  options?: Readonly<Record<string, unknown>>,
  reading?: ReadOptions,
): Promise<Task>;
export async function getTask(
  name: string,
  options: object = {},
  reading: ReadOptions = {},
): Promise<Task<never>> {
  return (await getTaskFactory(name)).open({ ...options }, reading) as Promise<Task<never>>;
}

/**
 * Imports a module by its path, TypeScript through tsx where Node itself does not read it.
 *
 * @throws MerfError FILE_NOT_FOUND, UNSUPPORTED where tsx is needed and not installed, INVALID_ARGUMENT where the
 * module fails as it runs
 */
export async function importModule(path: string): Promise<Record<string, unknown>> {
  const file = resolve(path);
  if (!existsSync(file)) {
    throw new MerfError('FILE_NOT_FOUND', `Cannot import ${path}: there is no such file`);
  }
  const url = pathToFileURL(file).href;
  try {
    if (!/\.m?ts$/.test(file)) return (await import(url)) as Record<string, unknown>;
    return await importTypeScript(url, path);
  } catch (cause) {
    if (cause instanceof MerfError) throw cause;
    throw new MerfError('INVALID_ARGUMENT', `Cannot import ${path}: ${(cause as Error)?.message ?? cause}`, {
      cause,
    });
  }
}

async function importTypeScript(url: string, path: string): Promise<Record<string, unknown>> {
  const { register, tsImport } = await importTsx(path);
  // A tsconfig's path aliases could lead the module to sources of this library instead of to the one that runs.
  const tsconfig = false;
  const unregister = register({ tsconfig });
  try {
    return (await import(url)) as Record<string, unknown>;
  } catch (error) {
    // In a package of type commonjs only tsImport can, at the price of a second copy of this library.
    if ((error as { code?: unknown }).code !== 'ERR_REQUIRE_CYCLE_MODULE') throw error;
    return (await tsImport(url, { parentURL: import.meta.url, tsconfig })) as Record<string, unknown>;
  } finally {
    await unregister();
  }
}

async function importTsx(path: string): Promise<typeof import('tsx/esm/api')> {
  try {
    return await import('tsx/esm/api');
  } catch (cause) {
    throw new MerfError(
      'UNSUPPORTED',
      `${path} is TypeScript, which needs the package tsx: npm install tsx`,
      { cause },
    );
  }
}
