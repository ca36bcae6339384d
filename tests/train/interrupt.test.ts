import { existsSync, mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, test } from '@jest/globals';
import { readMetrics } from '../../lib/train/metrics.js';
import { lettersTask, merf, tinyModel } from '../cli/run.js';
import { expectSameRun } from './same-run.js';

// A real model on the real engine, in a process of its own that is killed.
let folder: string;
const settings = [
  ...[
    'train',
    '--task',
    lettersTask,
    '--model',
    tinyModel,
    '--steps',
    '9',
    '--save-every',
    '2',
    '--seed',
    '3',
  ],
  ...['--prompts-per-step', '4', '--group-size', '4', '--max-tokens', '12', '--learning-rate', '1e-3'],
  ...['--mini-batches', '2', '--schedule', 'cosine', '--warmup-steps', '2', '--kl', '0.01', '--threads', '2'],
  ...['--evaluate-every', '4', '--evaluate-prompts', '2'],
];

beforeAll(async () => {
  folder = mkdtempSync(join(tmpdir(), 'merf-interrupt-'));
  const result = await merf([...settings, '--out', join(folder, 'unbroken')]);
  expect(result.stderr).toBe('');
  expect(result.code).toBe(0);
}, 120_000);
afterAll(() => rmSync(folder, { recursive: true, force: true }));

function expectSameAsUnbroken(run: string) {
  expectSameRun(join(folder, run), join(folder, 'unbroken'), 9);
}

describe('a run that is interrupted', () => {
  test('the unbroken run trained: weights moved, ratios began at 1, KL grew', () => {
    const rows = readMetrics(join(folder, 'unbroken', 'metrics.jsonl'));
    expect(rows.map((row) => row.step)).toEqual([0, 1, 2, 3, 4, 5, 6, 7, 8, 9]);
    for (const row of rows.slice(1)) expect(row.gradientNorm).toBeGreaterThan(0);
    expect(rows.at(-1)?.kl).toBeGreaterThan(0);
    const before = readFileSync(join(tinyModel, 'model.safetensors'));
    expect(readFileSync(join(folder, 'unbroken', 'model', 'model.safetensors')).equals(before)).toBe(false);
  });

  test('SIGKILL in mid-run, then --resume, ends with the same bits as the unbroken run', async () => {
    const out = join(folder, 'killed');
    const killed = await merf([...settings, '--out', out], {
      watch: (stdout, child) => {
        if (/^step 5\/9/m.test(stdout)) child.kill('SIGKILL');
      },
    });
    expect(killed.signal).toBe('SIGKILL');
    expect(existsSync(join(out, 'model'))).toBe(false);
    const resumed = await merf(['train', '--resume', out]);
    expect(resumed.stderr).toBe('');
    expect(resumed.stdout).toMatch(/Resuming after step [46] /);
    expectSameAsUnbroken('killed');
  }, 120_000);

  test.each(['SIGINT', 'SIGTERM'] as const)(
    '%s ends the step and saves; --resume goes on from there',
    async (signal) => {
      const out = join(folder, signal);
      let sent = false;
      const stopped = await merf([...settings, '--out', out], {
        watch: (stdout, child) => {
          if (sent || !/^step 3\/9/m.test(stdout)) return;
          sent = true;
          child.kill(signal);
        },
      });
      expect(stopped.signal).toBeNull();
      expect(stopped.code).toBe(0);
      const step = Number(/Stopped after step (\d)/.exec(stopped.stdout)?.[1]);
      expect(step).toBeGreaterThanOrEqual(3);
      expect(step).toBeLessThan(9);
      expect(existsSync(join(out, 'checkpoints', `step-00000${step}`, 'progress.json'))).toBe(true);
      const resumed = await merf(['train', '--resume', out]);
      expect(resumed.stdout).toContain(`Resuming after step ${step} `);
      expectSameAsUnbroken(signal);
    },
    120_000,
  );

  test('a second Ctrl-C gives up in mid-step; the checkpoint before it stays', async () => {
    const out = join(folder, 'abandoned');
    const large = ['--prompts-per-step', '8', '--group-size', '128', '--max-tokens', '60'];
    let begun = false;
    let warned = false;
    const abandoned = await merf(
      [...settings, ...large, '--evaluate-every', '0', '--save-every', '1', '--out', out],
      {
        watch: (stdout, child) => {
          if (!begun && /^step 1\/9/m.test(stdout)) {
            begun = true;
            // The signal comes in the middle of a later step, not in the checkpoint between.
            setTimeout(() => child.kill('SIGINT'), 1000);
          }
          if (!warned && stdout.includes('gives up at once')) {
            warned = true;
            child.kill('SIGINT');
          }
        },
      },
    );
    expect(abandoned.stderr).toMatch(/^merf: .*aborted\n$/);
    expect(abandoned.code).toBe(130);
    expect(existsSync(join(out, 'model'))).toBe(false);
    const step = Number(readdirSync(join(out, 'checkpoints')).at(-1)?.slice('step-'.length));
    expect(step).toBeGreaterThanOrEqual(1);
    const resumed = await merf(['train', '--resume', out, '--steps', String(step + 1)]);
    expect(resumed.stderr).toBe('');
    const steps = readMetrics(join(out, 'metrics.jsonl')).map((row) => row.step);
    expect(steps).toEqual(Array.from({ length: step + 1 }, (_, i) => i + 1));
  }, 180_000);

  test('another setting, model or data set is refused by name, more steps are not', async () => {
    const out = join(folder, 'unbroken');
    const resume = (...flags: string[]) => merf(['train', '--resume', out, ...flags]);
    const rate = await resume('--learning-rate', '2e-3');
    expect(rate.stderr).toMatch(/learningRate was 0\.001 and is 0\.002/);
    expect(rate.code).toBe(1);
    const model = await resume('--model', join(tinyModel, '..', 'qwen2'));
    expect(model.stderr).toMatch(/model was .* and is /);
    expect((await merf(['sft', '--resume', out])).stderr).toMatch(/kind was grpo and is sft/);
    const more = await resume('--steps', '10');
    expect(more.stderr).toBe('');
    expect(readMetrics(join(out, 'metrics.jsonl')).at(-1)?.step).toBe(10);
  }, 120_000);
});
