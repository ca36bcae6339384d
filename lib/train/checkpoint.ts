import { existsSync, readdirSync, readFileSync, renameSync, rmSync, statSync } from 'node:fs';
import { join } from 'node:path';
import {
  leftoverOf,
  makeFolder,
  whileReading,
  whileWriting,
  writeFileAtomically,
  writeFolderAtomically,
} from '../atomic-files.js';
import { MerfError } from '../errors.js';
import type { Kept } from './kept.js';

/** What a policy must offer for its training state to be kept. */
export interface StatefulPolicy {
  saveState(folder: string): Promise<void>;
  loadState(folder: string): Promise<void>;
}

/**
 * The place of a run after a step. All randomness is counter-based, keyed by the run's seed and these
 * counters, so with the policy's state they are everything that the next step depends on.
 */
export interface Progress {
  /** Steps done. */
  step: number;
  /** Rows of the data consumed, over all epochs. */
  position: number;
}

/** Where a checkpoint is, and after which step. */
export interface Checkpoint {
  path: string;
  /** Steps done. */
  step: number;
}

/** What a checkpoint keeps beside the policy. */
export interface CheckpointContent extends Progress {
  /** What the trainer itself keeps, where it keeps anything. */
  state?: unknown;
}

const folderPattern = /^step-(\d{6,})$/;

/** The checkpoints in `folder`, oldest first. Folders that a killed process left unfinished have other names. */
export function listCheckpoints(folder: string): Checkpoint[] {
  if (!existsSync(folder)) return [];
  return whileReading(folder, () => readdirSync(folder))
    .filter((name) => folderPattern.test(name))
    .map((name) => ({ path: join(folder, name), step: Number(name.slice('step-'.length)) }))
    .sort((a, b) => a.step - b.step);
}

/** @throws MerfError FILE_NOT_FOUND, FILE_FAILED, MALFORMED_FILE naming the file */
function readCheckpoint({ path, step: named }: Checkpoint): CheckpointContent {
  const file = join(path, 'progress.json');
  const { step, position } = readJson(file) as Partial<Progress>;
  if (step !== named || !Number.isSafeInteger(position)) {
    throw new MerfError(
      'MALFORMED_FILE',
      `Expected step ${named} and a whole number for position in ${file}`,
    );
  }
  const state = join(path, 'trainer.json');
  return { step, position: position as number, ...(existsSync(state) && { state: readJson(state) }) };
}

function readJson(file: string): object {
  const text = whileReading(file, () => readFileSync(file, 'utf8'));
  try {
    const value: unknown = JSON.parse(text);
    if (typeof value === 'object' && value !== null) return value;
  } catch (cause) {
    throw new MerfError('MALFORMED_FILE', `Cannot read the checkpoint's ${file}: ${String(cause)}`, {
      cause,
    });
  }
  throw new MerfError('MALFORMED_FILE', `Expected an object in the checkpoint's ${file}`);
}

/** Writes a checkpoint beside its place, renames it there and deletes all but the newest `keep`. */
export async function saveCheckpoint(
  folder: string,
  policy: StatefulPolicy,
  progress: Progress,
  keep: number,
  state?: unknown,
): Promise<string> {
  makeFolder(folder);
  const path = join(folder, `step-${String(progress.step).padStart(6, '0')}`);
  await writeFolderAtomically(path, async (beside) => {
    await policy.saveState(join(beside, 'policy'));
    if (state !== undefined) writeFileAtomically(join(beside, 'trainer.json'), JSON.stringify(state));
    writeFileAtomically(join(beside, 'progress.json'), `${JSON.stringify(progress, null, 2)}\n`);
  });
  for (const old of listCheckpoints(folder).slice(0, -keep)) removeCheckpoint(old);
  return path;
}

export function removeCheckpoint({ path }: Checkpoint): void {
  whileWriting(path, () => rmSync(path, { recursive: true, force: true }));
}

/**
 * Brings the policy and what the trainer keeps to where they were. All is read before anything changes.
 * @throws MerfError FILE_NOT_FOUND, FILE_FAILED, MALFORMED_FILE where the checkpoint is not whole, RESUME_MISMATCH where it is
 *   of another model
 */
export async function loadCheckpoint(
  checkpoint: Checkpoint,
  policy: StatefulPolicy,
  kept?: Kept,
): Promise<Progress> {
  const { step, position, state } = readCheckpoint(checkpoint);
  await policy.loadState(join(checkpoint.path, 'policy'));
  try {
    if (state !== undefined) kept?.load(state);
  } catch (cause) {
    const file = join(checkpoint.path, 'trainer.json');
    throw new MerfError('MALFORMED_FILE', `Cannot use the checkpoint's ${file}: ${String(cause)}`, { cause });
  }
  return { step, position };
}

/** Removes what a killed process left beside the files and folders of the run in `out`. */
export function removeLitter(out: string): void {
  const ours: readonly [folder: string, names: RegExp][] = [
    [out, /^(run\.json|run\.lock|metrics\.jsonl|motivation\.jsonl|model)$/],
    [join(out, 'completions'), /^step-\d+\.(jsonl|txt)$/],
    [join(out, 'checkpoints'), folderPattern],
  ];
  for (const [folder, names] of ours) {
    if (!existsSync(folder)) continue;
    for (const name of whileReading(folder, () => readdirSync(folder))) {
      const left = leftoverOf(name);
      if (left === undefined || !names.test(left.of)) continue;
      const path = join(folder, name);
      const place = join(folder, left.of);
      // Others who ask for the lock in this moment have such a file as well.
      if (left.of === 'run.lock' && isFresh(path)) continue;
      whileWriting(path, () => {
        // Killed between two renamings, it had moved the old one away and the new one not into its place yet.
        if (left.kind === 'old' && left.of !== 'run.lock' && !existsSync(place)) renameSync(path, place);
        else rmSync(path, { recursive: true, force: true });
      });
    }
  }
}

function isFresh(path: string): boolean {
  try {
    return Date.now() - statSync(path).mtimeMs < 60_000;
  } catch {
    return true;
  }
}
