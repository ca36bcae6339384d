import { existsSync, mkdirSync, mkdtempSync, readFileSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, expect, test } from '@jest/globals';
import { allowModules, signatureOf } from '../../lib/cli/trust.js';
import { lettersTask, merf, tinyModel } from './run.js';

let folder: string;
const before = process.env.XDG_CONFIG_HOME;
beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), 'merf-trust-'));
  process.env.XDG_CONFIG_HOME = join(folder, 'account');
});
afterEach(() => {
  if (before === undefined) delete process.env.XDG_CONFIG_HOME;
  else process.env.XDG_CONFIG_HOME = before;
  rmSync(folder, { recursive: true, force: true });
});

let count = 0;
/** A run with this in its run.json. */
function run(launch: object | undefined, settings: object = {}): string {
  const out = join(folder, `run-${count++}`);
  mkdirSync(out);
  writeFileSync(join(out, 'run.json'), JSON.stringify({ kind: 'grpo', settings, identity: {}, launch }));
  return out;
}

const asked = { task: false, config: false, trust: false };

test('a run of a task that ships with merf, or of none, is never asked about, and needs no key', async () => {
  await allowModules(run({ task: 'knights-and-knaves', model: '/a/model' }), asked);
  await allowModules(run(undefined), asked);
  expect(signatureOf({ task: 'countdown' })).toBeUndefined();
  expect(existsSync(join(folder, 'account'))).toBe(false);
});

test("this account's own runs are not asked about, and its key is its own", async () => {
  const launch = { task: '/home/me/task.ts' };
  const signature = signatureOf(launch) as string;
  expect(signature).toMatch(/^[0-9a-f]{64}$/);
  const key = join(folder, 'account', 'merf', 'run-key');
  expect(statSync(key).mode & 0o777).toBe(0o600);
  await allowModules(run({ ...launch, signature }), asked);
  const config = { config: '/home/me/grpo.ts' };
  await allowModules(run({ ...config, signature: signatureOf(config) }), asked);
  expect(readFileSync(key, 'utf8')).toHaveLength(64);
});

test.each([
  ['without a signature', { task: '/tmp/evil.ts' }, {}],
  ['with the signature of another module', { task: '/tmp/evil.ts', signature: 'of another' }, {}],
  ['with a module among the settings', { task: 'math' }, { task: '/tmp/evil.ts' }],
  ['with a config file', { config: '/tmp/evil.ts' }, {}],
  ['with something else than text', { task: ['/tmp/evil.ts'] }, {}],
])('a run %s is refused where nobody can be asked', async (_, launch, settings) => {
  const signed =
    'signature' in launch && launch.signature === 'of another'
      ? { ...launch, signature: signatureOf({ task: '/home/me/task.ts' }) }
      : launch;
  const out = run(signed, settings);
  await expect(allowModules(out, asked)).rejects.toMatchObject({
    code: 'INVALID_ARGUMENT',
    message: expect.stringMatching(/run-\d+ was not made by this account.*\/tmp\/evil\.ts.*--trust-run/),
  });
  await allowModules(run(signed, settings), { ...asked, trust: true });
  await allowModules(run(signed, settings), { ...asked, task: true, config: true });
});

test('from end to end: a run made elsewhere runs no code until it is trusted, and then is this account’s', async () => {
  const out = join(folder, 'elsewhere');
  const flags = ['--steps', '1', '--prompts-per-step', '2', '--group-size', '2', '--max-tokens', '4'];
  const mark = join(folder, 'ran');
  const module = join(folder, 'task.mts');
  writeFileSync(
    module,
    `import { writeFileSync } from 'node:fs';\nwriteFileSync(${JSON.stringify(mark)}, '');\n` +
      `export { task } from ${JSON.stringify(lettersTask)};\n`,
  );
  const account = (name: string) => ({ env: { XDG_CONFIG_HOME: join(folder, name) } });
  const first = await merf(
    ['train', '--task', module, '--model', tinyModel, ...flags, '--out', out],
    account('one'),
  );
  expect(first).toMatchObject({ code: 0, stderr: '' });
  rmSync(mark);
  const resume = ['train', '--resume', out, '--steps', '2'];
  const refused = await merf(resume, account('other'));
  expect(refused.stderr).toMatch(/was not made by this account.*task\.mts/);
  expect(refused.code).toBe(1);
  expect(existsSync(mark)).toBe(false);
  expect(await merf([...resume, '--trust-run'], account('other'))).toMatchObject({ code: 0, stderr: '' });
  expect(existsSync(mark)).toBe(true);
  expect(await merf(['train', '--resume', out, '--steps', '3'], account('other'))).toMatchObject({
    code: 0,
    stderr: '',
  });
}, 240_000);
