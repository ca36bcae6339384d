import { existsSync, mkdirSync, readdirSync, readFileSync, rmSync } from 'node:fs';
import { join } from 'node:path';
import { isLeftover, writeFileAtomically, writeFolderAtomically } from '../atomic-files.js';
import { MerfError } from '../errors.js';

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

export interface Checkpoint extends Progress {
  path: string;
  /** What the trainer itself keeps, where it keeps anything. */
  state?: unknown;
}

const folderPattern = /^step-(\d{6,})$/;

/** The checkpoints in `folder`, oldest first. Folders that a killed process left unfinished do not count. */
export function listCheckpoints(folder: string): Checkpoint[] {
  if (!existsSync(folder)) return [];
  return readdirSync(folder)
    .filter((name) => folderPattern.test(name) && existsSync(join(folder, name, 'progress.json')))
    .map((name) => readCheckpoint(join(folder, name)))
    .sort((a, b) => a.step - b.step);
}

function readCheckpoint(path: string): Checkpoint {
  const file = join(path, 'progress.json');
  let progress: Partial<Progress>;
  try {
    progress = JSON.parse(readFileSync(file, 'utf8')) as Partial<Progress>;
  } catch (cause) {
    throw new MerfError('MALFORMED_FILE', `Cannot read the checkpoint's ${file}: ${String(cause)}`, {
      cause,
    });
  }
  const { step, position } = progress;
  if (!Number.isSafeInteger(step) || !Number.isSafeInteger(position)) {
    throw new MerfError('MALFORMED_FILE', `Expected whole numbers for step and position in ${file}`);
  }
  const state = join(path, 'trainer.json');
  if (!existsSync(state)) return { path, step: step as number, position: position as number };
  try {
    const kept: unknown = JSON.parse(readFileSync(state, 'utf8'));
    return { path, step: step as number, position: position as number, state: kept };
  } catch (cause) {
    throw new MerfError('MALFORMED_FILE', `Cannot read the checkpoint's ${state}: ${String(cause)}`, {
      cause,
    });
  }
}

/** Writes a checkpoint beside its place, renames it there and deletes all but the newest `keep`. */
export async function saveCheckpoint(
  folder: string,
  policy: StatefulPolicy,
  progress: Progress,
  keep: number,
  state?: unknown,
): Promise<string> {
  mkdirSync(folder, { recursive: true });
  const path = join(folder, `step-${String(progress.step).padStart(6, '0')}`);
  await writeFolderAtomically(path, async (beside) => {
    await policy.saveState(join(beside, 'policy'));
    if (state !== undefined) writeFileAtomically(join(beside, 'trainer.json'), JSON.stringify(state));
    writeFileAtomically(join(beside, 'progress.json'), `${JSON.stringify(progress, null, 2)}\n`);
  });
  for (const name of readdirSync(folder)) {
    if (isLeftover(name, folderPattern)) rmSync(join(folder, name), { recursive: true, force: true });
  }
  for (const old of listCheckpoints(folder).slice(0, -keep))
    rmSync(old.path, { recursive: true, force: true });
  return path;
}

export async function loadCheckpoint(checkpoint: Checkpoint, policy: StatefulPolicy): Promise<void> {
  await policy.loadState(join(checkpoint.path, 'policy'));
}
