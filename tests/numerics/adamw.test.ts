import { expect, test } from '@jest/globals';
import type { NativeModel } from '../../lib/native.js';
import { Policy } from '../../lib/policy/index.js';
import { largestGap } from '../support/compare.js';
import { fixturePath, readJson } from '../support/fixtures.js';
import { report } from '../support/report.js';

interface AdamW {
  steps: number;
  count: number;
  learningRate: number;
  beta1: number;
  beta2: number;
  epsilon: number;
  weightDecay: number;
  parameter: number[];
  m: number[];
  v: number[];
}

test('AdamW follows PyTorch over 20 steps on given gradients: weights and moments within 1e-6', async () => {
  const { steps, count, parameter, m, v, ...options } = readJson<AdamW>('adamw.json');
  const policy = await Policy.load(fixturePath('llama'), { dtype: 'f32' });
  // Gradients of one's own choice have no way in but the engine's.
  const engine = (policy as unknown as { model: NativeModel }).model;
  const name = 'model.layers.0.self_attn.q_proj.weight';
  const size = (await engine.readTensor(name, 'value')).length;
  /** The fixture's numbers, then zeros. */
  const formula = (seed: number) =>
    Float32Array.from({ length: size }, (_, i) => (i < count ? Math.sin(seed + 0.7 * i) ** 3 : 0));

  await engine.writeTensor(name, 'value', formula(0));
  for (let step = 1; step <= steps; ++step) {
    await engine.writeTensor(name, 'gradient', formula(step));
    await policy.optimStep(options);
  }
  expect(policy.optimizerStep).toBe(steps);
  const gaps = await Promise.all(
    (
      [
        ['value', parameter],
        ['adam_m', m],
        ['adam_v', v],
      ] as const
    ).map(async ([kind, expected]) =>
      largestGap((await engine.readTensor(name, kind)).slice(0, count), expected),
    ),
  );
  report('AdamW against PyTorch, largest gap after 20 steps', Math.max(...gaps));
  for (const gap of gaps) expect(gap).toBeLessThan(1e-6);
  policy.dispose();
});
