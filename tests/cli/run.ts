import { type ChildProcess, spawn } from 'node:child_process';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { afterAll } from '@jest/globals';

export const root = dirname(dirname(dirname(fileURLToPath(import.meta.url))));
export const tinyModel = join(root, 'tests', 'fixtures', 'llama');
export const lettersTask = join(root, 'tests', 'cli', 'letters-task.ts');

const entry = `
const { main } = await import(${JSON.stringify(join(root, 'lib', 'cli', 'index.ts'))});
process.exitCode = await main(process.argv.slice(1));
`;

/** Where the account's own files are for the processes of a test: not those of whoever runs it. */
const account = mkdtempSync(join(tmpdir(), 'merf-account-'));
afterAll(() => rmSync(account, { recursive: true, force: true }));

export interface Result {
  code: number | null;
  signal: NodeJS.Signals | null;
  stdout: string;
  stderr: string;
}

/** Runs the command line from the sources. `watch` sees the output as it grows and may send signals. */
export function merf(
  args: readonly string[],
  options: {
    cwd?: string;
    watch?: (stdout: string, child: ChildProcess) => void;
    onSpawn?: (child: ChildProcess) => void;
    input?: string;
    /** Variables added to this process's environment. */
    env?: Record<string, string>;
  } = {},
): Promise<Result> {
  const child = spawn(
    process.execPath,
    ['--import', import.meta.resolve('tsx'), '--input-type=module', '-e', entry, '--', ...args],
    {
      cwd: options.cwd ?? root,
      env: { ...process.env, XDG_CONFIG_HOME: account, ...options.env },
      stdio: ['pipe', 'pipe', 'pipe'],
    },
  );
  options.onSpawn?.(child);
  child.stdin.end(options.input ?? '');
  let stdout = '';
  let stderr = '';
  child.stdout.setEncoding('utf8').on('data', (text: string) => {
    stdout += text;
    options.watch?.(stdout, child);
  });
  child.stderr.setEncoding('utf8').on('data', (text: string) => {
    stderr += text;
  });
  return new Promise((resolve, reject) => {
    child.on('error', reject);
    child.on('close', (code, signal) => resolve({ code, signal, stdout, stderr }));
  });
}
