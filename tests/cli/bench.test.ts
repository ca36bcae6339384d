import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, expect, test } from '@jest/globals';
import { merf, root, tinyModel } from './run.js';

const tiny = ['bench', '--model', tinyModel, '--sizes', '2x8x2x4'];

let folder: string;
beforeAll(() => {
  folder = mkdtempSync(join(tmpdir(), 'merf-bench-'));
});
afterAll(() => rmSync(folder, { recursive: true, force: true }));

test('--profile prints the operators of every phase', async () => {
  const { code, stdout, stderr } = await merf([...tiny, '--profile']);
  expect(stderr).toMatch(/two steps to warm up/);
  expect(code).toBe(0);
  const phases = stdout.split('\n\n');
  expect(phases.map((text) => text.split(',')[0])).toEqual(['rollout', 'forward and backward', 'update']);
  for (const phase of phases) {
    expect(phase).toMatch(/calls +seconds +rate +share/);
    expect(phase).toMatch(/sum of operators +\d+ /);
    expect(phase).toMatch(/outside operators +-?\d/);
  }
  expect(phases[0]).toMatch(/attention_decode +\d+ +\d\.\d{3} /);
  expect(phases[1]).toMatch(/head_loss/);
  expect(phases[2]).toMatch(/adamw/);
});

test('writes what it measured', async () => {
  const args = [...tiny, '--peers', 'none', '--no-operators', '--minutes', '0.001', '--out', folder];
  const { code, stdout, stderr } = await merf(args);
  expect(stderr).toMatch(/merf: a step in/);
  expect(code).toBe(0);
  expect(stdout).toMatch(/\| merf \| \d/);
  const [name] = /\S+\.json/.exec(stderr) ?? [];
  const report = JSON.parse(readFileSync(join(folder, (name as string).split('/').pop() as string), 'utf8'));
  expect(report.workload).toMatchObject({ prompts: 2, promptTokens: 8, group: 2, completionTokens: 4 });
  expect(report.steps[0].engines[0].runs[0].tokens).toBe(16);
});

test('--agent shows what a session saves', async () => {
  const model = ['--model', join(root, 'models', 'merf-mini'), '--sizes', '1x8x2x4'];
  const args = ['bench', ...model, '--agent', '--minutes', '0.001', '--out', folder];
  const { code, stdout, stderr } = await merf(args);
  expect(stderr).toMatch(/2 episodes of 4 turns behind 8 tokens/);
  expect(code).toBe(0);
  // Each further turn costs 252 tokens of the environment's and the token that was drawn last; else all that is there.
  expect(stdout).toMatch(/\| tokens prefilled \| 15\d\d \| 3\d{3} \| [12]\.\d\d x \|/);
  const [name] = /\S+-agent\.json/.exec(stderr) ?? [];
  const report = JSON.parse(readFileSync(join(folder, (name as string).split('/').pop() as string), 'utf8'));
  expect(report.session.length).toBe(report.plain.length);
  expect(report.plain[0]).toMatchObject({ tokensReused: 0 });
});

test('--launches prints what steps launch and move', async () => {
  const { code, stdout, stderr } = await merf([
    ...['bench', '--device', 'cuda-emulated', '--launches', '--model', tinyModel],
  ]);
  expect(stderr).toMatch(/counting shape:llama/);
  expect(code).toBe(0);
  const [decode, few, training] = stdout.split('\n### ').map((text) => text.replace(/^### /, ''));
  expect(decode).toMatch(/: one decode step of 64 completions/);
  expect(decode).toMatch(/\| kernel \| launches \| bytes read \| bytes written \|/);
  expect(decode).toMatch(/\| `sample_sums` \| 1 \| [1-9]\d+ \| [1-9]\d+ \|/);
  expect(few).toMatch(/: one decode step of 16 completions/);
  expect(training).toMatch(/\| `adamw` \| [1-9]\d* \| [1-9]\d+ \| [1-9]\d+ \|/);
});

test.each([
  [['--peers', 'tlr'], 1, /llama\.cpp, trl, pytorch or none for --peers but received tlr/],
  [
    ['--profile', '--scaling'],
    1,
    /one of --profile, --scaling and --agent but received --profile and --scaling/,
  ],
  [
    ['--agent', '--model', join(root, 'models', 'merf-mini'), '--sizes', '1x8x1x256'],
    1,
    /fewer than 256 tokens for --agent but received 256/,
  ],
  [['--agent'], 1, /at most 256 tokens, the model's context, but received 1032/],
  [['--launches'], 1, /--device cuda-emulated and --launches together but received --launches alone/],
  [['--device', 'cuda-emulated'], 1, /--launches together but received --device alone/],
  [['--sizes', '4x4'], 1, /--sizes but received 4x4/],
  [['--minutes', '0'], 2, /'0' is invalid[\s\S]*above 0/],
  [['--dtype', 'f16'], 2, /'f16' is invalid[\s\S]*bf16/],
])('%j is refused', async (args, wanted, pattern) => {
  const { code, stderr } = await merf([...tiny, ...args]);
  expect(stderr).toMatch(pattern);
  expect(code).toBe(wanted);
});
