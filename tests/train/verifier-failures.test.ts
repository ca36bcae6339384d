import { existsSync, mkdtempSync, readdirSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, expect, test } from '@jest/globals';
import { merf, root, tinyModel } from '../cli/run.js';

let folder: string;
beforeAll(() => {
  folder = mkdtempSync(join(tmpdir(), 'merf-verifiers-'));
});
afterAll(() => rmSync(folder, { recursive: true, force: true }));

/** A task whose verifier does `deed` in the second of the steps of 16 completions. */
function taskThat(name: string, deed: string): string {
  const path = join(folder, `${name}.mts`);
  const from = (module: string) => JSON.stringify(join(root, 'lib', module));
  writeFileSync(
    path,
    `import { RewardSpec } from ${from('reward/index.ts')};
     import { defineTask } from ${from('tasks/index.ts')};
     let asked = 0;
     const cases = [{ name: 'even', score: 1, sentence: 'if even' }, { name: 'odd', score: 0, sentence: 'if odd' }];
     const verify = ({ text }) => {
       asked += 1;
       if (asked === 20) { ${deed} }
       return text.length % 2 === 0 ? 'even' : 'odd';
     };
     export const task = defineTask({
       name: 'deeds',
       spec: new RewardSpec({ name: 'deeds', timeoutSeconds: 1, components: [{ name: 'length', cases, verify }] }),
       data: [...'abcdefgh'].map((word) => ({ word })),
       messages: ({ word }) => [{ role: 'user', content: word }],
     });`,
  );
  return path;
}

const later = (deed: string) =>
  `return (async () => { await new Promise((r) => setTimeout(r, 5)); ${deed} })();`;

test.each([
  ['ends-the-process', 'process.exit(0);', /The verifier of length .* called process\.exit\(0\)/],
  ['ends-it-later', later('process.exit(3);'), /The verifier of length .* called process\.exit\(3\)/],
  ['hangs-later', later('for (;;);'), /The verifier of length .* took longer than 1 s/],
  ['rejects', "void Promise.reject(new Error('too late'));", /nobody waited for.*: too late/],
  ['throws-later', "setTimeout(() => { throw new Error('too late'); });", /nobody waited for.*: too late/],
])(
  'a verifier that %s ends the run with exit code 1, and what was trained is kept and named',
  async (name, deed, message) => {
    const out = join(folder, name);
    const result = await merf([
      ...['train', '--task', taskThat(name, deed), '--model', tinyModel, '--steps', '4', '--save-every', '0'],
      ...['--prompts-per-step', '4', '--group-size', '4', '--max-tokens', '12', '--out', out],
    ]);
    expect(result.code).toBe(1);
    const lines = result.stderr.trim().split('\n');
    expect(lines.at(-1)).toMatch(message);
    const checkpoints = readdirSync(join(out, 'checkpoints'));
    // A failure beside the step in progress may come when that step has changed the weights, which then ends first.
    expect(['step-000001', 'step-000002']).toContain(checkpoints.join());
    expect(lines.at(-1)).toMatch(
      new RegExp(`; resume .*, which goes on after step \\d from .*${checkpoints.join()}$`),
    );
    expect(existsSync(join(out, 'run.lock'))).toBe(false);
  },
  120_000,
);

test('what ends the process outside of verifiers is reported with its exit code, and is no success', async () => {
  const out = join(folder, 'outside');
  const deed = "process.on('SIGUSR2', () => process.exit(0)); process.kill(process.pid, 'SIGUSR2');";
  const result = await merf([
    ...[
      'train',
      '--task',
      taskThat('outside', deed),
      '--model',
      tinyModel,
      '--steps',
      '400',
      '--save-every',
      '1',
    ],
    ...['--prompts-per-step', '4', '--group-size', '4', '--max-tokens', '12', '--out', out],
  ]);
  expect(result.code).toBe(1);
  expect(result.stderr).toMatch(
    /merf: the process was ended in the middle of the run, with exit code 0; resume .*, which goes on after step \d+ from/,
  );
}, 120_000);
