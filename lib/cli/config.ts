import { existsSync, readFileSync } from 'node:fs';
import { dirname, extname, relative, resolve } from 'node:path';
import { parse as parseYaml } from 'yaml';
import { z } from 'zod';
import { MerfError } from '../errors.js';
import { within } from '../policy/text-limits.js';
import { replaceTemplatePaths } from '../prompt/motivation.js';
import { metaOf, parseSettings, setting, toCamelCase } from '../settings.js';
import { dataShape, importModule, type TaskFactory, type TaskOptions } from '../tasks/index.js';
import { mapCurriculum } from '../train/curriculum.js';
import { grpoSchema, sftSchema } from '../train/settings.js';
import { printError } from './output.js';
import { isNamedTask, type NamedTask, type TaskChoice, taskPath } from './task.js';

/** How a model's prompts are written. */
export const tokenizerShape = {
  splitSpecialTokens: setting(z.boolean().default(true), {
    group: 'Model',
    description:
      'names of special tokens in messages and rows stay text, so that no row can end its own turn',
  }),
  systemMessages: setting(z.enum(['move', 'refuse']).default('move'), {
    group: 'Model',
    description: "a system message that the chat template has no place for joins the user's, or is refused",
  }),
};

/** What every command that runs a model needs. */
export const modelShape = {
  model: setting(z.string().optional(), {
    group: 'Model',
    description:
      'a Hugging Face folder, a .gguf file or the folder of a run (default: the model that ships with merf)',
    path: true,
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
  ...tokenizerShape,
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

/** Which task; its options are flags and keys beside it. */
const taskShape = {
  task: setting(z.custom<NamedTask>(isNamedTask, 'expected the name of a task or a task').optional(), {
    group: 'Task',
    description: 'its name (see merf tasks), or the path of a .ts or .js module that exports `task`',
  }),
};

const out = setting(z.string().optional(), {
  group: 'Run',
  description: "the run's folder (default: runs/TASK-TIME)",
  path: true,
});

/** The keys of a command that works on a task: those of `shape`, and the task's own options. */
export function withTask<Shape extends z.ZodRawShape>(
  shape: Shape,
  factory: TaskFactory | undefined,
): Record<string, z.ZodType> & Shape {
  const options = factory?.options.shape ?? dataShape;
  const twice = Object.keys(options).find((key) => key in shape || key in taskShape);
  if (twice !== undefined) {
    throw new MerfError(
      'INVALID_ARGUMENT',
      `Expected another name for the option ${twice} of the task ${factory?.name}: the command has one of that name`,
    );
  }
  const grouped = Object.entries(options as Record<string, z.ZodType>).map(([key, schema]) => [
    key,
    metaOf(schema).group ? schema : schema.meta({ ...schema.meta(), group: 'Task' }),
  ]);
  return { ...taskShape, ...Object.fromEntries(grouped), ...shape };
}

const trainShape = { ...modelShape, ...trainedShape, out, ...grpoSchema.shape };
const sftShape = { ...modelShape, ...trainedShape, out, ...sftSchema.shape };

/** The settings of `merf train` and of its config files, for a task. */
export function trainSchema(factory: TaskFactory | undefined) {
  return z.strictObject(withTask(trainShape, factory));
}

/** The settings of `merf sft` and of its config files, for a task. */
export function sftFileSchema(factory: TaskFactory | undefined) {
  return z.strictObject(withTask(sftShape, factory));
}

export type TrainSettings = z.output<z.ZodObject<typeof trainShape>> & TaskChoice;
export type SftFileSettings = z.output<z.ZodObject<typeof sftShape>> & TaskChoice;

type WithTask<Shape extends z.ZodRawShape> = z.input<z.ZodObject<Shape>> &
  TaskOptions & { task?: NamedTask | Promise<NamedTask> | undefined };
export type TrainConfig = WithTask<typeof trainShape>;
export type SftConfig = WithTask<typeof sftShape>;

/** For config files in TypeScript: `export const config = defineConfig({ task: 'knights-and-knaves', steps: 50 })`. */
export function defineConfig<C extends TrainConfig | SftConfig>(config: C): C {
  return config;
}

/** What reading a config file may take; the parser's time grows with the square of the errors that it finds. */
const mostMilliseconds = 5000;

/** The keys and values of a config file, as they stand there but for promises, which are awaited. */
export async function readConfigContent(path: string): Promise<Record<string, unknown>> {
  if (!existsSync(path)) throw new MerfError('FILE_NOT_FOUND', `No config file at ${path}`);
  let content: unknown;
  const extension = extname(path).toLowerCase();
  if (['.yaml', '.yml', '.json'].includes(extension)) {
    try {
      const text = readFileSync(path, 'utf8');
      content = within(mostMilliseconds, () => parseYaml(text));
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
  const awaited: Record<string, unknown> = {};
  for (const [key, value] of Object.entries(content)) awaited[key] = await value;
  const { task } = awaited;
  if (typeof task === 'string') awaited.task = taskPath(task, dirname(path));
  return awaited;
}

/**
 * Reads a config file, .yaml, .yml, .json or a module that exports `config` (or a default). Keys may be written in
 * snake_case or camelCase; paths in it are relative to it.
 * @throws MerfError FILE_NOT_FOUND, MALFORMED_FILE, INVALID_CONFIG
 */
export async function readConfigFile(path: string, schema: z.ZodObject): Promise<Record<string, unknown>> {
  // Checked once with the keys as they stand in the file, so that an error names what was written there.
  const config: Record<string, unknown> = {};
  const unknown: Record<string, unknown> = {};
  for (const [key, value] of Object.entries(await readConfigContent(path))) {
    const name = toCamelCase(key);
    if (!(name in schema.shape)) unknown[key] = value;
    else if (name in config) throw new MerfError('INVALID_CONFIG', `In ${path}: ${key} stands there twice`);
    else config[name] = value;
  }
  parseSettings(schema.partial(), { ...config, ...unknown }, path);
  return withPathsOf(path, schema, config);
}

// Settings whose words may name files, as in template:FILE.
const motivationKeys = [
  'motivation',
  'learnUnder',
  'anchorUnder',
  'anchorTo',
  'hintFailed',
  'evaluateMotivations',
];

/** The settings of the config file `path`, whose own paths are relative to it. */
function withPathsOf(
  path: string,
  schema: z.ZodObject,
  config: Readonly<Record<string, unknown>>,
): Record<string, unknown> {
  const isPath = (key: string) => key in schema.shape && metaOf(schema.shape[key] as z.ZodType).path === true;
  const here = (named: string) => resolve(dirname(path), named);
  // These two were relative to the folder that the command is run in, which some config files count on.
  const hereOrThere = (named: string) => {
    const file = here(named);
    if (existsSync(file) || !existsSync(named)) return file;
    printError(
      `merf: ${named} in ${path} is not beside that file, so it is taken from the current folder: write ` +
        `${relative(dirname(path), named)}, as paths in a config file are relative to it\n`,
    );
    return resolve(named);
  };
  return Object.fromEntries(
    Object.entries(config).map(([key, value]) => {
      if (isPath(key)) return [key, mapTexts(value, here)];
      if (motivationKeys.includes(key)) {
        return [key, mapTexts(value, (text) => replaceTemplatePaths(text, hereOrThere))];
      }
      if (key === 'curriculum' && typeof value === 'string' && isPath(value.split('=', 1)[0] as string)) {
        return [key, mapCurriculum(value, hereOrThere)];
      }
      return [key, value];
    }),
  );
}

/** A text, or each text of a list, as `change` makes it; anything else as it is. */
function mapTexts(value: unknown, change: (text: string) => string): unknown {
  if (typeof value === 'string') return change(value);
  return Array.isArray(value) ? value.map((item: unknown) => mapTexts(item, change)) : value;
}
