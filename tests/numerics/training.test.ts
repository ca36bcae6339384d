import { expect, test } from '@jest/globals';
import { type Forest, Policy } from '../../lib/policy/index.js';
import { relativeError } from '../support/compare.js';
import { fixturePath, readJson, readTensors } from '../support/fixtures.js';
import { report } from '../support/report.js';

interface Training {
  learningRate: number;
  beta1: number;
  beta2: number;
  epsilon: number;
  weightDecay: number;
  maxGradNorm: number;
  steps: number;
  losses: number[];
  gradientNorms: number[];
}

test('20 clipped AdamW steps follow PyTorch: losses, gradient norms, final parameters', async () => {
  const { losses, gradientNorms, steps, ...options } = readJson<Training>('training.json');
  const { batch } = readJson<{
    batch: { root: number[]; groups: { question: number[]; completions: number[][] }[] };
  }>('llama/expected.json');
  const forest: Forest = [
    {
      tokens: batch.root,
      children: batch.groups.map(({ question, completions }) => ({
        tokens: question,
        children: completions.map((tokens) => ({ tokens, train: {} })),
      })),
    },
  ];
  const policy = await Policy.load(fixturePath('llama'), { dtype: 'f32' });
  try {
    for (let step = 0; step < steps; ++step) {
      const { loss } = await policy.forwardBackward(forest, { type: 'cross_entropy' });
      const { gradientNorm, applied } = await policy.optimStep(options);
      expect(applied).toBe(true);
      expect(Math.abs(loss / (losses[step] as number) - 1)).toBeLessThan(1e-5);
      expect(Math.abs(gradientNorm / (gradientNorms[step] as number) - 1)).toBeLessThan(1e-4);
    }
    let worst = 0;
    for (const [name, { data }] of readTensors(fixturePath('training.safetensors'))) {
      const error = relativeError(await policy.readParameter(name), data as Float32Array);
      expect({ name, within: error < 1e-5 }).toEqual({ name, within: true });
      worst = Math.max(worst, error);
    }
    report('20 AdamW steps, relative error of the worst parameter', worst);
  } finally {
    policy.dispose();
  }
});
