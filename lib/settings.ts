import type { z } from 'zod';
import { MerfError, type MerfErrorCode } from './errors.js';

/** What every setting of a run and every option of a task carries beside its schema. */
export interface SettingMeta {
  /** What --help says about it. */
  description: string;
  /** The heading it stands under in --help. */
  group?: string;
  /** false: it leaves the weights that a run ends with unchanged, so that a resumed run may differ in it. */
  matters?: boolean;
  /** true: its text, or each of its texts, is the path of a file, which a config file gives relative to itself. */
  path?: boolean;
  /**
   * true: its texts may hold commas, so that its flag takes one text, as it stands or as JSON, and is given as often as
   * there are texts.
   */
  verbatim?: boolean;
}

/** A schema with what the command line needs to know about it. */
export function setting<T extends z.ZodType>(schema: T, meta: SettingMeta): T {
  return schema.meta({ ...meta }) as T;
}

/** What a schema carries, and where it is made of another one, such as an optional one, what that carries. */
export function metaOf(schema: z.ZodType): Partial<SettingMeta> {
  const { innerType } = schema.def as { innerType?: z.ZodType };
  return { ...(innerType && metaOf(innerType)), ...(schema.meta() as Partial<SettingMeta> | undefined) };
}

/**
 * `options` with the defaults filled in.
 * @param where how the message names the place that `options` come from
 * @throws MerfError with `code`, naming each key that is wrong and, for an unknown one, the nearest that exists
 */
export function parseSettings<S extends z.ZodObject>(
  schema: S,
  options: unknown,
  where = 'the settings',
  code: MerfErrorCode = 'INVALID_CONFIG',
): z.output<S> {
  const result = schema.safeParse(options);
  if (result.success) return result.data;
  const problems = result.error.issues.map((issue) => {
    if (issue.code === 'unrecognized_keys') {
      return issue.keys.map((key) => unknownKey(key, Object.keys(schema.shape))).join('; ');
    }
    const key = issue.path.join('.');
    const given = valueAt(options, issue.path);
    return `${key}: ${issue.message}${given === undefined ? '' : `, but it was ${JSON.stringify(given)}`}`;
  });
  throw new MerfError(code, `In ${where}: ${problems.join('; ')}`);
}

/** What each key of `schema` is where it is not given. */
export function defaultsOf(schema: z.ZodObject): Record<string, unknown> {
  const fields = Object.entries(schema.shape) as [string, z.ZodType][];
  return Object.fromEntries(fields.map(([key, field]) => [key, field.safeParse(undefined).data]));
}

/** The keys of `schema` in which a resumed run may not differ from the run it goes on with. */
export function keysThatMatter(schema: z.ZodObject): string[] {
  return Object.entries(schema.shape)
    .filter(([, field]) => metaOf(field as z.ZodType).matters !== false)
    .map(([key]) => key);
}

function valueAt(value: unknown, path: readonly PropertyKey[]): unknown {
  let current: unknown = value;
  for (const key of path) current = (current as Record<PropertyKey, unknown> | undefined)?.[key];
  return current;
}

/** The message for a key that does not exist, in the way of writing (snake_case or camelCase) that it was given in. */
export function unknownKey(key: string, known: readonly string[]): string {
  const snake = key.includes('_');
  const candidates = snake ? known.map(toSnakeCase) : known;
  const nearest = candidates
    .map((name) => ({ name, distance: editDistance(key, name) }))
    .sort((a, b) => a.distance - b.distance)[0];
  const near = nearest !== undefined && nearest.distance <= Math.max(2, key.length / 3);
  return `unknown key "${key}"${near ? `; did you mean "${nearest.name}"?` : `; known keys: ${candidates.join(', ')}`}`;
}

export function toSnakeCase(key: string): string {
  return key.replace(/[A-Z]/g, (letter) => `_${letter.toLowerCase()}`);
}

export function toCamelCase(key: string): string {
  return key.replace(/[_-]([a-z0-9])/g, (_, letter: string) => letter.toUpperCase());
}

function editDistance(a: string, b: string): number {
  let row = Array.from({ length: b.length + 1 }, (_, j) => j);
  for (let i = 1; i <= a.length; i++) {
    const next = [i];
    for (let j = 1; j <= b.length; j++) {
      const replaced = (row[j - 1] as number) + (a[i - 1] === b[j - 1] ? 0 : 1);
      next.push(Math.min(replaced, (row[j] as number) + 1, (next[j - 1] as number) + 1));
    }
    row = next;
  }
  return row[b.length] as number;
}
