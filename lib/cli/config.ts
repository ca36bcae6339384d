import { existsSync, readFileSync } from 'node:fs';
import { dirname, extname, isAbsolute, resolve } from 'node:path';
import { parse as parseYaml } from 'yaml';
import { z } from 'zod';
import { MerfError } from '../errors.js';
import { importModule, type Task } from '../tasks/index.js';
import { grpoSchema, parseSettings, setting, sftSchema } from '../train/settings.js';

const isTask = (value: unknown) => typeof (value as Task | null)?.messages === 'function';

/** What every command that runs a model needs. */
export const modelShape = {
  model: setting(z.string().optional(), {
    group: 'Model',
    description:
      'a Hugging Face folder, a .gguf file or the folder of a run (default: the model that ships with merf)',
  }),
  device: setting(z.string().default('auto'), {
    group: 'Model',
    description: 'auto, cpu, cuda, or for tests cuda-emulated: see merf doctor',
  }),
  dtype: setting(z.enum(['auto', 'f32', 'bf16']).default('auto'), {
    group: 'Model',
    description: 'numbers of weights and activations',
  }),
  threads: setting(z.int().min(1).optional(), {
    group: 'Model',
    description: 'threads to compute with (default: all)',
  }),
};

/** What of the model a run trains. */
export const trainedShape = {
  loraRank: setting(z.int().min(0).default(0), {
    group: 'Model',
    description: 'train low-rank adapters of this rank instead of all weights; 0: all weights',
  }),
  exact: setting(z.boolean().default(false), {
    group: 'Model',
    description: 'insist that tokens have the same log-probability drawn and trained on, to the last bit',
  }),
};

/** Which task, and what there is to choose about it. */
export const taskShape = {
  task: setting(z.union([z.string(), z.custom<Task>(isTask)], 'expected the name of a task or a task'), {
    group: 'Task',
    description: 'its name, or the path of a .ts or .js module that exports `task`',
  }),
  people: setting(z.union([z.int(), z.string(), z.array(z.int())]).optional(), {
    group: 'Task',
    description: 'knights-and-knaves: how many people, such as 3, 3-7 or 2,4 (default: 2)',
  }),
  depth: setting(z.int().optional(), {
    group: 'Task',
    description: 'knights-and-knaves: how deep the claims nest, 1 to 4 (default: 1)',
  }),
  data: setting(z.string().optional(), { group: 'Task', description: 'a .jsonl or .parquet file of rows' }),
  testData: setting(z.string().optional(), {
    group: 'Task',
    description: 'rows to evaluate on (default: one in eight of the data, which training leaves out)',
  }),
};

const out = setting(z.string().optional(), {
  group: 'Run',
  description: "the run's folder (default: runs/TASK-TIME)",
});

export const trainFileSchema = z.strictObject({
  ...taskShape,
  ...modelShape,
  ...trainedShape,
  out,
  ...grpoSchema.shape,
});
export const sftFileSchema = z.strictObject({
  ...taskShape,
  task: setting(taskShape.task.optional(), {
    group: 'Task',
    description: 'a task that can demonstrate, or to evaluate on',
  }),
  ...modelShape,
  ...trainedShape,
  out,
  ...sftSchema.shape,
});

type WithTask<C> = Omit<C, 'task'> & { task?: string | Task | Promise<Task> | undefined };
export type TrainConfig = WithTask<z.input<typeof trainFileSchema>>;
export type SftConfig = WithTask<z.input<typeof sftFileSchema>>;

/** For config files in TypeScript: `export const config = defineConfig({ task: 'knights-and-knaves', steps: 50 })`. */
export function defineConfig<C extends TrainConfig | SftConfig>(config: C): C {
  return config;
}

/**
 * Reads a config file, .yaml, .yml, .json or a module that exports `config` (or a default). Keys may be written in
 * snake_case or camelCase; paths in it are relative to it.
 * @throws MerfError FILE_NOT_FOUND, MALFORMED_FILE, INVALID_CONFIG
 */
export async function readConfigFile(path: string, schema: z.ZodObject): Promise<Record<string, unknown>> {
  if (!existsSync(path)) throw new MerfError('FILE_NOT_FOUND', `No config file at ${path}`);
  let content: unknown;
  const extension = extname(path);
  if (['.yaml', '.yml', '.json'].includes(extension)) {
    try {
      content = parseYaml(readFileSync(path, 'utf8'));
    } catch (cause) {
      throw new MerfError('MALFORMED_FILE', `${path}: ${(cause as Error).message.trim()}`, { cause });
    }
  } else if (['.ts', '.mts', '.js', '.mjs'].includes(extension)) {
    const module = await importModule(path);
    content = module.config ?? module.default;
  } else {
    throw new MerfError(
      'UNSUPPORTED',
      `Expected a .yaml, .json, .ts or .js file for --config but received ${path}`,
    );
  }
  if (typeof content !== 'object' || content === null || Array.isArray(content)) {
    throw new MerfError('INVALID_CONFIG', `Expected keys and values in ${path}`);
  }
  // Checked once with the keys as they stand in the file, so that an error names what was written there.
  const written = content as Record<string, unknown>;
  const config: Record<string, unknown> = {};
  const unknown: Record<string, unknown> = {};
  for (const [key, value] of Object.entries(written)) {
    const name = toCamelCase(key);
    if (!(name in schema.shape)) unknown[key] = value;
    else if (name in config) throw new MerfError('INVALID_CONFIG', `In ${path}: ${key} stands there twice`);
    else config[name] = await value;
  }
  parseSettings(schema.partial(), { ...config, ...unknown }, path);
  for (const key of ['model', 'data', 'testData', 'out', 'task'] as const) {
    const value = config[key];
    if (typeof value !== 'string' || isAbsolute(value)) continue;
    if (key !== 'task' || extname(value) !== '') config[key] = resolve(dirname(path), value);
  }
  return config;
}

export function toCamelCase(key: string): string {
  return key.replace(/[_-]([a-z0-9])/g, (_, letter: string) => letter.toUpperCase());
}
