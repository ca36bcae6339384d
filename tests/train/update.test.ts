import { describe, expect, test } from '@jest/globals';
import type { Forest, LossStats } from '../../lib/policy/index.js';
import { smallnessNotice, update, updateNotice } from '../../lib/train/update.js';
import { FakePolicy } from './fake-policy.js';

const forest: Forest = [{ tokens: [0], children: [{ tokens: [1, 2, 3], train: { advantage: 1 } }] }];
const settings = {
  learningRate: 0.1,
  schedule: 'constant' as const,
  warmupSteps: 0,
  minLearningRate: 0,
  beta1: 0.9,
  beta2: 0.999,
  epsilon: 1e-8,
  weightDecay: 0,
  maxGradNorm: 0,
};

describe('update', () => {
  const run = (policy: FakePolicy, signal?: AbortSignal) => {
    let updates = 0;
    const beforeUpdate = () => {
      updates++;
    };
    const result = update(policy.asPolicy, forest, { type: 'grpo' }, settings, {
      step: 3,
      signal,
      beforeUpdate,
    });
    return { result, updates: () => updates };
  };

  test('moves the weights, and says by what', async () => {
    const policy = new FakePolicy();
    const { result, updates } = run(policy);
    const { stats, gradientNorm, learningRate, skipped } = await result;
    expect(stats).toMatchObject({ finite: true, tokens: 3 });
    expect(gradientNorm).toBeGreaterThan(0);
    expect(learningRate).toBe(0.1);
    expect(skipped).toBeUndefined();
    expect([updates(), policy.updates]).toEqual([1, 1]);
  });

  test('is skipped where the loss is not finite, without an error', async () => {
    const policy = new FakePolicy();
    policy.breakLossAt.add(0);
    const { result, updates } = run(policy);
    expect(await result).toEqual({ gradientNorm: Number.NaN, learningRate: 0.1, skipped: 'loss' });
    expect([updates(), policy.updates]).toEqual([0, 0]);
  });

  test('is skipped where the gradient is not finite', async () => {
    const policy = new FakePolicy();
    policy.breakGradientAt.add(0);
    const { result } = run(policy);
    expect(await result).toMatchObject({ skipped: 'gradient', stats: { finite: true } });
    expect(policy.updates).toBe(0);
  });

  test('leaves no gradients where a signal fires behind the last of them', async () => {
    const controller = new AbortController();
    class Late extends FakePolicy {
      override async forwardBackward(...args: Parameters<FakePolicy['forwardBackward']>): Promise<LossStats> {
        const stats = await super.forwardBackward(...args);
        expect(this.gradient.some((value) => value !== 0)).toBe(true);
        controller.abort();
        return stats;
      }
    }
    const policy = new Late();
    const { result, updates } = run(policy, controller.signal);
    await expect(result).rejects.toMatchObject({ code: 'ABORTED', message: 'step 3 was aborted' });
    expect(policy.gradient).toEqual([0, 0, 0, 0]);
    expect([updates(), policy.updates]).toEqual([0, 0]);
  });
});

describe('an update that changes nothing', () => {
  const saturated = () => {
    const policy = new FakePolicy();
    // All probability is on b, as after an update that was far too large: the gradient of its log-probability is 0.
    policy.logits = [0, 1e6, 0, 0];
    return policy;
  };
  const run = (of: Forest) =>
    update(saturated().asPolicy, of, { type: 'grpo' }, settings, { step: 3, beforeUpdate: () => undefined });
  const completion = (advantage: number | number[]): Forest => [
    { tokens: [0], children: [{ tokens: [1, 1], train: { advantage } }] },
  ];

  test('is told where there was something to learn, and only there', async () => {
    const dead = await run(completion(1));
    expect(dead).toMatchObject({ gradientNorm: 0, dead: true });
    expect(updateNotice(3, dead)).toMatch(/^Step 3: the gradient was exactly 0.*too high a learning rate/);
    expect(await run(completion([0, 0.5]))).toMatchObject({ dead: true });
    for (const forest of [completion(0), completion([0, 0]), []]) {
      const result = await run(forest);
      expect(result).not.toHaveProperty('dead');
      expect(updateNotice(3, result)).toBeUndefined();
    }
  });

  test('is foretold of settings that are too small', () => {
    expect(smallnessNotice(settings)).toBeUndefined();
    expect(smallnessNotice({ ...settings, learningRate: 1e-7, maxGradNorm: 1 })).toBeUndefined();
    expect(smallnessNotice({ ...settings, learningRate: 1e-12 })).toMatch(
      /learning rate of 1e-12 is less than/,
    );
    expect(smallnessNotice({ ...settings, maxGradNorm: 1e-10 })).toMatch(
      /maxGradNorm of 1e-10.*epsilon of 1e-8/,
    );
  });
});
