import { createHmac, randomBytes, timingSafeEqual } from 'node:crypto';
import { mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import { homedir } from 'node:os';
import { dirname, join } from 'node:path';
import { createInterface } from 'node:readline/promises';
import { errnoOf } from '../atomic-files.js';
import { withControlsShown } from '../control-characters.js';
import { MerfError } from '../errors.js';
import { taskNames } from '../tasks/index.js';
import { readSavedRun, type SavedRun } from '../train/loop.js';

// A run.json names the module of its task, which resuming imports: whoever can hand a run to somebody could make them run code.
// So a run is signed with a key that only this account has, and one without that signature is asked about.

interface Modules {
  readonly task?: string | undefined;
  readonly config?: string | undefined;
}

/**
 * The signature under the modules that a run names; undefined where it names none, or where the account's key can neither be
 * read nor made.
 */
export function signatureOf(modules: Modules): string | undefined {
  const { task, config } = modules;
  if (namesIn({ task, config }).length === 0) return undefined;
  const key = accountKey();
  return key && createHmac('sha256', key).update(signedText(modules)).digest('hex');
}

export interface TrustFlags {
  /** Whether the command line itself names a task, or a config file, in place of the run's. */
  readonly task: boolean;
  readonly config: boolean;
  /** Whether it says that the run is trusted. */
  readonly trust: boolean;
}

const answers = new Map<string, Promise<void>>();

/**
 * Makes sure that the modules which resuming the run in `folder` would import are this account's own, or that the user wants
 * them run: by --trust-run, or asked on a terminal. Asked once for a folder.
 * @throws MerfError INVALID_ARGUMENT naming the modules, and as `readSavedRun`
 */
export function allowModules(folder: string, flags: TrustFlags): Promise<void> {
  const answer = answers.get(folder) ?? decide(folder, flags);
  answers.set(folder, answer);
  return answer;
}

async function decide(folder: string, flags: TrustFlags): Promise<void> {
  const run = readSavedRun(folder);
  const { task, config } = run.launch ?? {};
  const strange = namesIn({
    ...(!flags.config && { config, other: run.settings.config }),
    ...(!flags.task && { task, another: run.settings.task }),
  });
  if (strange.length === 0 || flags.trust || isSigned(run)) return;
  const names = strange.join(' and ');
  if (process.stdin.isTTY && process.stderr.isTTY) {
    const terminal = createInterface({ input: process.stdin, output: process.stderr });
    try {
      const question = `${folder} was not made by this account. Resuming it runs the code in ${names}. Run it? [y/N] `;
      const answer = await terminal.question(withControlsShown(question));
      if (/^y(es)?$/i.test(answer.trim())) return;
    } finally {
      terminal.close();
    }
  }
  throw new MerfError(
    'INVALID_ARGUMENT',
    `${folder} was not made by this account, and resuming it would run the code in ${names}: read it, and then give ` +
      '--trust-run, or name a task of your own with --task',
  );
}

function isSigned({ launch = {}, settings }: SavedRun): boolean {
  const { task, config, signature } = launch;
  const isText = (value: unknown) => value === undefined || typeof value === 'string';
  // What merf writes names them in `launch` alone.
  if (!isText(task) || !isText(config) || 'task' in settings || 'config' in settings) return false;
  const expected = signatureOf(launch as Modules);
  if (expected === undefined || typeof signature !== 'string') return false;
  const [given, wanted] = [Buffer.from(signature), Buffer.from(expected)];
  return given.length === wanted.length && timingSafeEqual(given, wanted);
}

function namesIn(values: Readonly<Record<string, unknown>>): string[] {
  return Object.values(values)
    .filter((value) => value !== undefined && !taskNames().includes(value as string))
    .map(String);
}

function signedText({ task = '', config = '' }: Modules): string {
  return JSON.stringify(['merf run modules', task, config]);
}

/** The key of the account that merf runs in, made where there is none. */
function accountKey(): string | undefined {
  const file = join(process.env.XDG_CONFIG_HOME || join(homedir(), '.config'), 'merf', 'run-key');
  try {
    mkdirSync(dirname(file), { recursive: true, mode: 0o700 });
    writeFileSync(file, randomBytes(32).toString('hex'), { flag: 'wx', mode: 0o600 });
  } catch (error) {
    if (errnoOf(error) !== 'EEXIST') return undefined;
  }
  try {
    const key = readFileSync(file, 'utf8');
    return key.length === 64 ? key : undefined;
  } catch {
    return undefined;
  }
}
