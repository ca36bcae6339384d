import { existsSync } from 'node:fs';
import { extname, resolve } from 'node:path';
import { pathToFileURL } from 'node:url';
import { describeValue, MerfError } from '../errors.js';
import { type KnightsAndKnavesOptions, knightsAndKnaves } from './knights-and-knaves/index.js';
import type { Task } from './task.js';

/** The options of every named task together; those that a task does not have are refused. */
export interface TaskOptions extends KnightsAndKnavesOptions {}

interface Entry {
  readonly options: readonly string[];
  readonly make: (options: TaskOptions) => Promise<Task>;
}

const entries: ReadonlyMap<string, Entry> = new Map<string, Entry>([
  ['knights-and-knaves', { options: ['people', 'depth', 'data', 'testData'], make: knightsAndKnaves }],
]);

/** The names that `getTask` knows. */
export function taskNames(): string[] {
  return [...entries.keys()];
}

/**
 * A task by its name, or by the path of a module of the user's that exports a `task` made by `defineTask`, or a
 * function `task` of the options that returns one.
 *
 * @param name one of `taskNames()`, or a path that ends in .js, .mjs, .ts or .mts
 * @param options undefined values count as absent; a module whose `task` is no function takes none
 * @throws MerfError INVALID_ARGUMENT for an unknown name or option, FILE_NOT_FOUND, UNSUPPORTED, and what reading
 * the task's data throws
 */
export async function getTask(name: string, options: TaskOptions = {}): Promise<Task> {
  const given = Object.entries(options).filter(([, value]) => value !== undefined);
  const isModule = ['.js', '.mjs', '.ts', '.mts'].includes(extname(name));
  const entry = entries.get(name);
  if (!entry && !isModule) {
    throw new MerfError(
      'INVALID_ARGUMENT',
      `Expected one of ${taskNames().join(', ')}, or the path of a .ts or .js module, for task but received ` +
        describeValue(name),
    );
  }
  const kept = Object.fromEntries(given);
  if (!entry) return importTask(name, kept);
  const unknown = given.find(([key]) => !entry.options.includes(key));
  if (unknown) {
    throw new MerfError(
      'INVALID_ARGUMENT',
      `Expected one of ${entry.options.join(', ')} for an option of the task ${name} but received ${unknown[0]}`,
    );
  }
  return entry.make(kept);
}

async function importTask(path: string, options: TaskOptions): Promise<Task> {
  const module = await importModule(path);
  const [given] = Object.keys(options);
  if (given !== undefined && typeof module.task !== 'function') {
    throw new MerfError(
      'INVALID_ARGUMENT',
      `Expected no options for the task ${path}, which exports no function of them, but received ${given}`,
    );
  }
  const task: unknown = await (typeof module.task === 'function' ? module.task(options) : module.task);
  const wrong = whatIsNoTask(task);
  if (wrong) {
    throw new MerfError(
      'INVALID_ARGUMENT',
      `Expected ${path} to export a task made by defineTask, but ${wrong}`,
    );
  }
  return task as Task;
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

function whatIsNoTask(task: unknown): string | undefined {
  if (typeof task !== 'object' || task === null) return `its export "task" is ${describeValue(task)}`;
  const { name, spec, messages, rows } = task as Partial<Task>;
  if (typeof name !== 'string') return `its task's name is ${describeValue(name)}`;
  if (typeof spec?.score !== 'function') return `its task's spec is ${describeValue(spec)}`;
  if (typeof messages !== 'function') return `its task's messages is ${describeValue(messages)}`;
  if (typeof rows !== 'function') return `its task's rows is ${describeValue(rows)}`;
  return undefined;
}
