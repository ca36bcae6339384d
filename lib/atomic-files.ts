import { randomBytes } from 'node:crypto';
import { renameSync, writeFileSync } from 'node:fs';
import { mkdir, open, readdir, rename, rm, stat } from 'node:fs/promises';
import { basename, dirname, join, resolve } from 'node:path';
import { MerfError } from './errors.js';

/** Writes `text` beside `path` and renames it into place. */
export function writeFileAtomically(path: string, text: string): void {
  const beside = `${path}.tmp-${process.pid}`;
  writeFileSync(beside, text);
  renameSync(beside, path);
}

/**
 * Fills a folder beside `path` through `fill`, has it on the disk, so that no power cut leaves empty files, and renames
 * it into place.
 *
 * @param keeps which files of a folder that stands there already stay beside the new ones (default: none, so that the
 *   folder is replaced as a whole)
 * @throws MerfError INVALID_ARGUMENT where the folder cannot be written, and what `fill` throws
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
    if ((error as NodeJS.ErrnoException).syscall === undefined) throw error;
    const reason = (error as Error).message;
    throw new MerfError('INVALID_ARGUMENT', `${path} cannot be written: ${reason}`, { cause: error });
  } finally {
    for (const left of [beside, old]) await rm(left, { recursive: true, force: true }).catch(() => undefined);
  }
}

/** Whether a name is that of a folder which a killed process left beside the folder `of`. */
export function isLeftover(name: string, of: RegExp): boolean {
  const match = /^\.(.+)\.(?:tmp|old)-\d+-[0-9a-f]{8}$/.exec(name);
  return match !== null && of.test(match[1] as string);
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
