import { randomBytes } from 'node:crypto';
import {
  closeSync,
  existsSync,
  linkSync,
  openSync,
  readFileSync,
  readlinkSync,
  renameSync,
  rmSync,
  statSync,
  write,
  writeSync,
} from 'node:fs';
import { hostname } from 'node:os';
import { join } from 'node:path';
import { errnoOf, whileReading, whileWriting } from '../atomic-files.js';
import { MerfError } from '../errors.js';

/** What a lock's file says of the process that holds it. */
interface Holder {
  readonly token: string;
  readonly pid: number;
  readonly host: string;
  /** The set of processes that the number is of, and when the process began, where the system tells: numbers come again. */
  readonly processes: string | null;
  readonly began: string | null;
}

const lockName = 'run.lock';

/** How often a holder says that it lives, and the silence after which one on another machine counts as dead. */
const beatSeconds = 15;
const silenceSeconds = 300;

/**
 * The right to write into a run's folder, held by one process at a time. The file of a process that was killed stays; the
 * next one takes it over: on the same machine where that process is gone, from another one where its file has not been
 * touched for five minutes, by the clock of the file system.
 */
export class RunLock {
  readonly #path: string;
  readonly #holder: Holder;
  readonly #timer: NodeJS.Timeout;
  #descriptor: number;
  #isReleased = false;
  readonly #releaseAtExit = () => this.release();

  private constructor(
    private readonly folder: string,
    holder: Holder,
    descriptor: number,
  ) {
    this.#path = join(folder, lockName);
    this.#holder = holder;
    this.#descriptor = descriptor;
    const text = Buffer.from(textOf(holder));
    this.#timer = setInterval(() => {
      // Writing the same text again sets the file's time by the file system's own clock.
      write(this.#descriptor, text, 0, text.length, 0, () => undefined);
    }, beatSeconds * 1000).unref();
    process.on('exit', this.#releaseAtExit);
  }

  /** @throws MerfError BUSY naming the process that holds it; INVALID_ARGUMENT, FILE_FAILED where the folder cannot be written */
  static take(folder: string): RunLock {
    const holder = thisProcess();
    return new RunLock(folder, holder, place(folder, holder));
  }

  /** @throws MerfError BUSY where another process would be refused the lock now */
  static checkFree(folder: string): void {
    const path = join(folder, lockName);
    const found = readHolder(path);
    if (found !== undefined && isAlive(found, path, undefined)) throw busy(folder, found);
  }

  /**
   * Makes sure that the folder is still there and this process's.
   * @throws MerfError FILE_FAILED where it was deleted or moved, BUSY where another process took it over
   */
  check(): void {
    const found = readHolder(this.#path);
    if (found?.token === this.#holder.token) return;
    if (found !== undefined) throw busy(this.folder, found);
    if (!existsSync(join(this.folder, 'run.json'))) {
      throw new MerfError(
        'FILE_FAILED',
        `The run's folder ${this.folder} is gone: it was deleted or moved while the run went on`,
      );
    }
    // Somebody removed the file alone, which makes the folder nobody's.
    const before = this.#descriptor;
    this.#descriptor = place(this.folder, this.#holder);
    closeSync(before);
  }

  release(): void {
    if (this.#isReleased) return;
    this.#isReleased = true;
    clearInterval(this.#timer);
    process.off('exit', this.#releaseAtExit);
    closeSync(this.#descriptor);
    held.delete(this.#holder.token);
    try {
      if (readHolder(this.#path)?.token === this.#holder.token) rmSync(this.#path, { force: true });
    } catch {
      // What cannot be removed is taken over once this process has ended.
    }
  }
}

/** The tokens of this process's own locks: one with its number and another token is of a process before it. */
const held = new Set<string>();

function thisProcess(): Holder {
  const token = randomBytes(8).toString('hex');
  held.add(token);
  return {
    token,
    pid: process.pid,
    host: hostname(),
    processes: processSpace(),
    began: startOf(process.pid) ?? null,
  };
}

function textOf(holder: Holder): string {
  return `${JSON.stringify(holder)}\n`;
}

/** Puts the file of `holder` there, for which its descriptor is returned. Throws as `RunLock.take` does. */
function place(folder: string, holder: Holder): number {
  const path = join(folder, lockName);
  // A link puts the file there whole or not at all, and only where there is none.
  const beside = join(folder, `${lockName}.tmp-${holder.pid}-${holder.token}`);
  const descriptor = whileWriting(beside, () => openSync(beside, 'wx+'));
  try {
    whileWriting(beside, () => writeSync(descriptor, textOf(holder)));
    for (;;) {
      if (placed(beside, path)) return descriptor;
      const found = readHolder(path);
      if (found === undefined) continue;
      if (isAlive(found, path, beside)) throw busy(folder, found);
      takeAway(path, found);
    }
  } catch (error) {
    closeSync(descriptor);
    throw error;
  } finally {
    rmSync(beside, { force: true });
  }
}

function placed(beside: string, path: string): boolean {
  return whileWriting(path, () => {
    try {
      linkSync(beside, path);
      return true;
    } catch (error) {
      if (errnoOf(error) === 'EEXIST') return false;
      if (!['EPERM', 'ENOTSUP', 'EOPNOTSUPP', 'ENOSYS', 'EMLINK'].includes(errnoOf(error) ?? '')) throw error;
    }
    // A file system without links: the name is taken first, and the file with its text renamed over it.
    try {
      closeSync(openSync(path, 'wx'));
    } catch (error) {
      if (errnoOf(error) === 'EEXIST') return false;
      throw error;
    }
    renameSync(beside, path);
    return true;
  });
}

/** What the file says; a file without sense is of a holder of whom nothing is known. */
function readHolder(path: string): Holder | undefined {
  return whileReading(path, () => {
    let text: string;
    try {
      text = readFileSync(path, 'utf8');
    } catch (error) {
      if (errnoOf(error) === 'ENOENT') return undefined;
      throw error;
    }
    try {
      const { token, pid, host, processes, began } = JSON.parse(text) as Partial<Holder>;
      if (typeof token === 'string' && typeof pid === 'number' && typeof host === 'string') {
        return { token, pid, host, processes: processes ?? null, began: began ?? null };
      }
    } catch {
      // Falls through to a holder that nothing is known of.
    }
    return { token: '', pid: 0, host: '', processes: null, began: null };
  });
}

/** @param beside a file of this moment in the same folder, for the clock of its file system */
function isAlive(holder: Holder, path: string, beside: string | undefined): boolean {
  if (holder.host === hostname() && holder.processes === processSpace()) {
    const began = startOf(holder.pid);
    if (began !== undefined && holder.began !== null) return began === holder.began;
    return holder.pid === process.pid ? held.has(holder.token) : began !== null && isRunning(holder.pid);
  }
  try {
    const moment = beside === undefined ? Date.now() : statSync(beside).mtimeMs;
    return moment - statSync(path).mtimeMs < silenceSeconds * 1000;
  } catch {
    return false;
  }
}

function isRunning(pid: number): boolean {
  try {
    process.kill(pid, 0);
    return true;
  } catch (error) {
    return errnoOf(error) === 'EPERM';
  }
}

/** Removes the lock of a process that is gone, unless another one was faster and the lock is a living one's by now. */
function takeAway(path: string, stale: Holder): void {
  const aside = `${path}.old-${process.pid}-${randomBytes(4).toString('hex')}`;
  whileWriting(path, () => {
    try {
      renameSync(path, aside);
    } catch (error) {
      if (errnoOf(error) === 'ENOENT') return;
      throw error;
    }
    if (readHolder(aside)?.token !== stale.token) placed(aside, path);
    rmSync(aside, { force: true });
  });
}

function busy(folder: string, { pid, host }: Holder): MerfError {
  const who = pid === 0 ? 'another process' : `process ${pid} on ${host}`;
  const elsewhere =
    host === hostname()
      ? ''
      : `; if it is gone, wait ${silenceSeconds / 60} minutes or delete ${join(folder, lockName)}`;
  return new MerfError('BUSY', `${folder} is in use by ${who}${elsewhere}`);
}

/** The namespace of process numbers, as containers have their own, and the boot; null where there is no /proc. */
function processSpace(): string | null {
  try {
    const boot = readFileSync('/proc/sys/kernel/random/boot_id', 'utf8').trim();
    return `${boot} ${readlinkSync('/proc/self/ns/pid')}`;
  } catch {
    return null;
  }
}

/** When the process began, in ticks since the boot; null where it has ended, undefined where the system does not say. */
function startOf(pid: number): string | null | undefined {
  if (!existsSync('/proc/self/stat')) return undefined;
  try {
    const text = readFileSync(`/proc/${pid}/stat`, 'utf8');
    const [state = 'X', ...rest] = text.slice(text.lastIndexOf(')') + 2).split(' ');
    // What was killed stands there until its parent asks for it.
    return 'ZX'.includes(state) ? null : rest[18];
  } catch {
    return null;
  }
}
