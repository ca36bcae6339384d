// The demo's training loop on the emulated GPU: two steps of the shipped model's first layers, beside the CPU.
import { mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, test } from '@jest/globals';
import { Policy } from '../../lib/policy/index.js';
import { type CompletionRecord, readMetrics } from '../../lib/train/index.js';
import { merf, root } from '../cli/run.js';
import { relativeError } from '../support/compare.js';
import { readTensors } from '../support/fixtures.js';
import { report } from '../support/report.js';
import { cutModel } from './cut-model.js';

const shipped = join(root, 'models', 'merf-mini');
let folder: string;
let model: string;
beforeAll(async () => {
  folder = mkdtempSync(join(tmpdir(), 'merf-devices-'));
  model = await cutModel(shipped, join(folder, 'model'), 3);
});
afterAll(() => rmSync(folder, { recursive: true, force: true }));

// The demo's settings with fewer and shorter completions, and a seed by which they differ in their rewards.
const settings = ['--task', 'knights-and-knaves', '--people', '2', '--motivation', 'full'].concat(
  ['--steps', '2', '--prompts-per-step', '2', '--group-size', '4', '--max-tokens', '24', '--seed', '11'],
  ['--learning-rate', '2e-4', '--warmup-steps', '3', '--save-every', '0', '--entropy', '0.01'],
);

async function train(device: string) {
  const out = join(folder, device);
  const args = ['train', ...settings, '--model', model, '--device', device, '--out', out];
  const { stdout, stderr, code } = await merf(args);
  expect(stderr).toBe('');
  expect(stdout).toMatch(new RegExp(`^Training .*, on ${device}$`, 'm'));
  expect(code).toBe(0);
  const completions = join(out, 'completions');
  return {
    metrics: readMetrics(join(out, 'metrics.jsonl')),
    completions: readdirSync(completions)
      .filter((name) => name.endsWith('.jsonl'))
      .flatMap((name) => readFileSync(join(completions, name), 'utf8').trim().split('\n'))
      .map((line) => JSON.parse(line) as CompletionRecord),
    weights: readTensors(join(out, 'model', 'model.safetensors')),
  };
}

async function startOf(path: string): Promise<Map<string, Float32Array>> {
  const policy = await Policy.load(path, { device: 'cpu', dtype: 'f32', trainable: false });
  const start = new Map<string, Float32Array>();
  for (const { name } of policy.parameters()) start.set(name, await policy.readParameter(name));
  policy.dispose();
  return start;
}

describe("the demo's loop", () => {
  test('takes the same two steps on cuda-emulated as on the CPU', async () => {
    const cpu = await train('cpu');
    const gpu = await train('cuda-emulated');

    // Every token drawn is the same, and so is what the reward says of them.
    expect(cpu.completions.length).toBe(2 * 2 * 4);
    expect(new Set(cpu.completions.map(({ reward }) => reward)).size).toBeGreaterThan(1);
    expect(gpu.completions).toEqual(cpu.completions);

    expect(gpu.metrics.length).toBe(2);
    for (const [i, row] of cpu.metrics.entries()) {
      for (const name of ['reward', 'length', 'entropy', 'loss', 'gradientNorm'] as const) {
        const [expected, actual] = [Number(row[name]), Number(gpu.metrics[i]?.[name])];
        expect({
          name,
          gap: Math.abs(actual - expected) <= 1e-4 * Math.abs(expected),
          actual,
          expected,
        }).toMatchObject({ gap: true });
      }
    }

    // What the two steps changed, which is small beside the weights.
    const start = await startOf(model);
    let worst = 0;
    for (const [name, { data }] of cpu.weights) {
      const from = start.get(name) as Float32Array;
      const change = (to: ArrayLike<number>) => from.map((value, i) => (to[i] as number) - value);
      const others = gpu.weights.get(name)?.data as Float32Array;
      expect(others.length).toBe(data.length);
      worst = Math.max(worst, relativeError(change(others), change(data)));
    }
    report('change of the weights after two steps of the demo on cuda-emulated, relative', worst);
    expect(worst).toBeLessThan(2e-3);
  }, 180_000);
});
