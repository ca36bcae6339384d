import { open, readFile, stat } from 'node:fs/promises';
import { describeValue, MerfError } from '../errors.js';

/** A file that is not what it says: names the file and the place in it, what was expected and what was there. */
export function malformed(path: string, detail: string, cause?: unknown): MerfError {
  return new MerfError('MALFORMED_FILE', `${path}: ${detail}`, cause === undefined ? undefined : { cause });
}

export function unsupported(path: string, detail: string): MerfError {
  return new MerfError('UNSUPPORTED', `${path}: ${detail}`);
}

/** What stands at `path`. */
export async function kindOf(path: string): Promise<'file' | 'directory' | 'absent' | 'other'> {
  try {
    const stats = await stat(path);
    return stats.isFile() ? 'file' : stats.isDirectory() ? 'directory' : 'other';
  } catch (error) {
    if (['ENOENT', 'ENOTDIR'].includes((error as NodeJS.ErrnoException).code ?? '')) return 'absent';
    throw unreadable(path, error);
  }
}

const pointerStart = 'version https://git-lfs.github.com/spec/v';

/**
 * The error that names a Git LFS pointer, where the text of a file is one: what a clone without LFS leaves.
 */
function pointerError(path: string, text: string): MerfError | undefined {
  if (!text.startsWith(pointerStart)) return undefined;
  const size = /^size (\d+)$/m.exec(text)?.[1];
  const whole = size === undefined ? 'the file itself' : `the file itself, of ${size} bytes`;
  return malformed(
    path,
    `expected ${whole}, but found a Git LFS pointer to it (\`git lfs pull\` brings the file)`,
  );
}

/** The error that names a Git LFS pointer, where the file at `path` is one. */
export async function lfsPointer(path: string): Promise<MerfError | undefined> {
  const length = Math.min(await fileSize(path), 1024);
  return pointerError(path, Buffer.from(await readRange(path, 0, length)).toString('latin1'));
}

/** What reading a file failed with, as a MerfError. */
export function unreadable(path: string, error: unknown): MerfError {
  if (error instanceof MerfError) return error;
  return new MerfError('FILE_NOT_FOUND', `${path} cannot be read: ${(error as Error).message}`, {
    cause: error,
  });
}

/** The text of a file without its byte order mark, or undefined where there is none. */
export async function readTextIfPresent(path: string): Promise<string | undefined> {
  if ((await kindOf(path)) !== 'file') return undefined;
  let text: string;
  try {
    text = await readFile(path, 'utf8');
  } catch (error) {
    throw unreadable(path, error);
  }
  const pointer = pointerError(path, text);
  if (pointer !== undefined) throw pointer;
  return text.startsWith('\ufeff') ? text.slice(1) : text;
}

/**
 * Objects and arrays within each other; what walks them by recursion, as JSON.stringify does, has room for
 * these.
 */
const maxJsonDepth = 256;

/** Whether brackets outside of strings nest deeper than `maxJsonDepth`. */
function isTooDeep(text: string): boolean {
  let depth = 0;
  for (let i = 0; i < text.length; ++i) {
    switch (text.charCodeAt(i)) {
      case 0x22: // "
        for (++i; i < text.length && text.charCodeAt(i) !== 0x22; ++i) {
          if (text.charCodeAt(i) === 0x5c) ++i; // \
        }
        break;
      case 0x5b: // [
      case 0x7b: // {
        if (++depth > maxJsonDepth) return true;
        break;
      case 0x5d: // ]
      case 0x7d: // }
        --depth;
        break;
    }
  }
  return false;
}

/** @throws MerfError MALFORMED_FILE */
export function parseJsonObject(path: string, text: string): Record<string, unknown> {
  if (isTooDeep(text))
    throw malformed(path, `expected JSON of at most ${maxJsonDepth} levels but found more`);
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch (error) {
    throw malformed(path, `expected JSON, but ${(error as Error).message}`, error);
  }
  if (typeof value !== 'object' || value === null || Array.isArray(value)) {
    throw malformed(path, `expected a JSON object but found ${describeValue(value)}`);
  }
  return value as Record<string, unknown>;
}

/** Node reads less than 2 GiB at once. */
const maxReadBytes = 1 << 30;

/** `length` bytes at `offset`; fewer there than that is a malformed file. */
export async function readRange(path: string, offset: number, length: number): Promise<Uint8Array> {
  const bytes = new Uint8Array(length);
  try {
    const file = await open(path, 'r');
    try {
      for (let done = 0; done < length; ) {
        const wanted = Math.min(length - done, maxReadBytes);
        const { bytesRead } = await file.read(bytes, done, wanted, offset + done);
        if (bytesRead === 0) {
          throw malformed(
            path,
            `expected ${length} bytes at offset ${offset} but the file ends after ${done} of them`,
          );
        }
        done += bytesRead;
      }
    } finally {
      await file.close();
    }
  } catch (error) {
    throw unreadable(path, error);
  }
  return bytes;
}

/** @throws MerfError FILE_NOT_FOUND */
export async function fileSize(path: string): Promise<number> {
  const kind = await kindOf(path);
  if (kind !== 'file') {
    throw new MerfError(
      'FILE_NOT_FOUND',
      `${path} ${kind === 'absent' ? 'does not exist' : 'is not a file'}`,
    );
  }
  try {
    return (await stat(path)).size;
  } catch (error) {
    throw unreadable(path, error);
  }
}

/** Typed access to the keys of a JSON object or of GGUF metadata; every error names the file and the key. */
export class Fields {
  constructor(
    readonly path: string,
    private readonly get: (key: string) => unknown,
    private readonly keys: () => string[] = () => [],
  ) {}

  raw(key: string): unknown {
    const value = this.get(key);
    return value === null ? undefined : value;
  }

  has(key: string): boolean {
    return this.raw(key) !== undefined;
  }

  #wrong(key: string, expected: string, value: unknown): MerfError {
    const found = value === undefined ? 'it is missing' : `found ${describeValue(value)}`;
    return malformed(this.path, `expected ${expected} for ${key} but ${found}`);
  }

  integer(key: string, minimum: number, maximum: number, fallback?: number): number {
    const value = this.raw(key) ?? fallback;
    if (typeof value !== 'number' || !Number.isInteger(value) || value < minimum || value > maximum) {
      throw this.#wrong(key, `an integer from ${minimum} to ${maximum}`, value);
    }
    return value;
  }

  number(key: string, expected: string, accept: (value: number) => boolean, fallback?: number): number {
    const value = this.raw(key) ?? fallback;
    if (typeof value !== 'number' || !Number.isFinite(value) || !accept(value))
      throw this.#wrong(key, expected, value);
    return value;
  }

  boolean(key: string, fallback: boolean): boolean {
    const value = this.raw(key) ?? fallback;
    if (typeof value !== 'boolean') throw this.#wrong(key, 'true or false', value);
    return value;
  }

  string(key: string, fallback?: string): string {
    const value = this.raw(key) ?? fallback;
    if (typeof value !== 'string') throw this.#wrong(key, 'a string', value);
    return value;
  }

  object(key: string): Fields | undefined {
    const value = this.raw(key);
    if (value === undefined) return undefined;
    if (typeof value !== 'object' || Array.isArray(value)) throw this.#wrong(key, 'an object', value);
    const record = value as Record<string, unknown>;
    return new Fields(
      this.path,
      (inner) => record[inner],
      () => Object.keys(record),
    );
  }

  isEmpty(): boolean {
    return this.keys().length === 0;
  }
}
