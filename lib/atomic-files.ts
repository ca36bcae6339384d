import { randomBytes } from 'node:crypto';
import { existsSync, mkdirSync, renameSync, rmSync, writeFileSync } from 'node:fs';
import { mkdir, open, readdir, rename, rm, stat } from 'node:fs/promises';
import { basename, dirname, join, resolve } from 'node:path';
import { MerfError } from './errors.js';

/** The code of an error of the operating system, as ENOENT; undefined for another error. */
export function errnoOf(error: unknown): string | undefined {
  const { code, syscall } = (error ?? {}) as NodeJS.ErrnoException;
  return syscall === undefined ? undefined : code;
}

/** Failures of the medium, not of the path that was given. */
const ofTheMedium = new Set(['ENOSPC', 'EDQUOT', 'EIO', 'EMFILE', 'ENFILE', 'ESTALE']);

/** What an error of the operating system comes out as; any other error stays what it is. */
function explained(path: string, verb: 'read' | 'written', error: unknown): unknown {
  const errno = errnoOf(error);
  if (errno === undefined) return error;
  const isOfTheMedium = ofTheMedium.has(errno);
  if (verb === 'written' && errno === 'ENOENT' && !existsSync(dirname(path))) {
    const message = `${path} cannot be written: its folder is gone, deleted or moved by somebody else`;
    return new MerfError('FILE_FAILED', message, { cause: error });
  }
  const code =
    verb === 'written'
      ? isOfTheMedium
        ? 'FILE_FAILED'
        : 'INVALID_ARGUMENT'
      : ['ENOENT', 'ENOTDIR'].includes(errno)
        ? 'FILE_NOT_FOUND'
        : 'FILE_FAILED';
  return new MerfError(code, `${path} cannot be ${verb}: ${(error as Error).message}`, { cause: error });
}

/**
 * Does what reads `path`.
 * @throws MerfError FILE_NOT_FOUND, FILE_FAILED naming the path where the system refuses, and what `read` throws
 */
export function whileReading<T>(path: string, read: () => T): T {
  try {
    return read();
  } catch (error) {
    throw explained(path, 'read', error);
  }
}

/**
 * Does what writes `path`.
 * @throws MerfError INVALID_ARGUMENT naming the path where the system refuses it, FILE_FAILED where the disk is full or broken
 *   or the folder around it is gone, and what `write` throws
 */
export function whileWriting<T>(path: string, write: () => T): T {
  try {
    return write();
  } catch (error) {
    throw explained(path, 'written', error);
  }
}

/** Makes the folder where it is not there; the one around it must be, so that a folder that was deleted stays so. */
export function makeFolder(path: string): void {
  whileWriting(path, () => {
    try {
      mkdirSync(path);
    } catch (error) {
      if (errnoOf(error) !== 'EEXIST') throw error;
    }
  });
}

/** Writes `text` beside `path` and renames it into place. Throws as `whileWriting` does. */
export function writeFileAtomically(path: string, text: string): void {
  const beside = `${path}.tmp-${process.pid}`;
  whileWriting(path, () => {
    try {
      writeFileSync(beside, text);
      renameSync(beside, path);
    } catch (error) {
      try {
        rmSync(beside, { force: true });
      } catch {
        // The first error says more.
      }
      throw error;
    }
  });
}

/**
 * Fills a folder beside `path` through `fill`, has it on the disk, so that no power cut leaves empty files, and renames
 * it into place.
 *
 * @param keeps which files of a folder that stands there already stay beside the new ones (default: none, so that the
 *   folder is replaced as a whole)
 * @throws MerfError INVALID_ARGUMENT where the folder cannot be written, FILE_FAILED where the disk is full or broken, and
 *   what `fill` throws
 */
export async function writeFolderAtomically(
  path: string,
  fill: (beside: string) => Promise<void>,
  keeps?: (name: string) => boolean,
): Promise<void> {
  const target = resolve(path);
  const unique = `${process.pid}-${randomBytes(4).toString('hex')}`;
  const beside = join(dirname(target), `.${basename(target)}.tmp-${unique}`);
  const old = join(dirname(target), `.${basename(target)}.old-${unique}`);
  const there = await stat(target).catch(() => undefined);
  if (there && !there.isDirectory()) {
    throw new MerfError('INVALID_ARGUMENT', `Expected a directory to write to but ${path} is a file`);
  }
  try {
    await mkdir(beside, { recursive: true });
    await fill(beside);
    await flush(beside);
    if (there && keeps) {
      const names = await readdir(beside);
      for (const name of names) await rename(join(beside, name), join(target, name));
      for (const name of await readdir(target)) {
        if (!keeps(name) && !names.includes(name)) await rm(join(target, name), { recursive: true });
      }
      return;
    }
    if (there) await rename(target, old);
    await rename(beside, target);
  } catch (error) {
    throw explained(path, 'written', error);
  } finally {
    for (const left of [beside, old]) await rm(left, { recursive: true, force: true }).catch(() => undefined);
  }
}

/**
 * The name of the file or folder that `name` stood in for beside its place, where a killed process left it; undefined for
 * any other name.
 */
export function leftoverOf(name: string): { of: string; kind: 'tmp' | 'old' } | undefined {
  const match = /^\.?(.+?)\.(tmp|old)-\d+(?:-[0-9a-f]{8,16})?$/.exec(name);
  return match === null ? undefined : { of: match[1] as string, kind: match[2] as 'tmp' | 'old' };
}

async function flush(folder: string): Promise<void> {
  for (const name of await readdir(folder, { recursive: true })) {
    const path = join(folder, name);
    if (!(await stat(path)).isFile()) continue;
    const file = await open(path, 'r+');
    try {
      await file.sync();
    } finally {
      await file.close();
    }
  }
}
