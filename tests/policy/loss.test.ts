import { describe, expect, test } from '@jest/globals';
import { planForest } from '../../lib/policy/forest.js';
import {
  checkTargets,
  type Loss,
  lossStats,
  nativeLoss,
  resolveLoss,
  sequenceWeights,
} from '../../lib/policy/loss.js';
import { expectFailure, random } from './helpers.js';

const options = { vocabSize: 100, contextLength: 64, maxTokens: 1 << 20 };
const lengths = [3, 0, 5];

describe('weights', () => {
  test.each([
    ['grpo', (n: number) => 1 / (3 * Math.max(n, 1))],
    ['gspo', (n: number) => 1 / (3 * Math.max(n, 1))],
    ['bnpo', () => 1 / 8],
    ['dapo', () => 1 / 8],
    ['cispo', () => 1 / 8],
    ['cross_entropy', () => 1 / 8],
    ['dr_grpo', () => 1 / (3 * 16)],
  ] as const)('of %s', (type, expected) => {
    const weights = sequenceWeights(resolveLoss({ type, maxTokens: 16 } as Loss), lengths);
    expect(Array.from(weights)).toEqual(lengths.map(expected));
  });

  test('are those of the whole forest in whatever batches it is computed', () => {
    const completion = (length: number) => ({
      tokens: new Array(length).fill(1),
      train: { advantage: 1, logprobs: new Array(length).fill(-1) },
    });
    const forest = [{ tokens: [1, 2, 3], children: [completion(3), completion(7), completion(5)] }];
    for (const maxTokens of [1000, 12, 1]) {
      const plan = planForest(forest, { ...options, maxTokens });
      const loss = resolveLoss({ type: 'grpo' });
      const weights = sequenceWeights(loss, plan.sequenceLengths);
      const old = plan.targets.map(({ train }) => train.logprobs ?? []);
      const rows = plan.batches.flatMap((batch) =>
        Array.from(nativeLoss(loss, plan, batch, weights, old).weights),
      );
      expect(rows).toHaveLength(15);
      expect(rows.reduce((sum, w) => sum + w, 0)).toBeCloseTo(1, 6);
      expect(rows[0]).toBeCloseTo(1 / 9, 7);
      expect(rows[14]).toBeCloseTo(1 / 15, 7);
    }
  });
});

describe('the loss', () => {
  test('has its defaults', () => {
    expect(resolveLoss({ type: 'grpo' })).toMatchObject({
      kind: 'policy_gradient_clip',
      clipLow: 0.2,
      clipHigh: 0.2,
      kl: 0,
    });
    expect(resolveLoss({ type: 'gspo' })).toMatchObject({ kind: 'gspo', clipLow: 3e-4, clipHigh: 4e-4 });
    expect(resolveLoss({ type: 'cispo' })).toMatchObject({ kind: 'cispo', clipHigh: 4 });
    expect(resolveLoss({ type: 'dapo', clipHigh: 0.28 })).toMatchObject({ clipLow: 0.2, clipHigh: 0.28 });
  });

  test.each([
    [{ type: 'ppo' }, 'loss.type'],
    [{ type: 'toString' }, 'loss.type'],
    [undefined, 'loss.type'],
    [{ type: 'grpo', clipLow: -1 }, 'clipLow'],
    [{ type: 'grpo', clipHigh: Number.NaN }, 'clipHigh'],
    [{ type: 'grpo', kl: -0.1 }, 'kl'],
    [{ type: 'grpo', entropy: Number.POSITIVE_INFINITY }, 'entropy'],
    [{ type: 'dr_grpo' }, 'maxTokens'],
  ])('refuses %j', async (loss, part) => {
    await expectFailure(() => resolveLoss(loss as Loss), 'INVALID_ARGUMENT', part);
  });

  test('needs advantages, and references for a KL penalty', async () => {
    const plan = (train: object) =>
      planForest([{ tokens: [1], children: [{ tokens: [2], train }] }], options).targets;
    await expectFailure(
      () => checkTargets(resolveLoss({ type: 'grpo' }), plan({})),
      'INVALID_ARGUMENT',
      'advantage',
    );
    const kl = resolveLoss({ type: 'grpo', kl: 0.1 });
    await expectFailure(
      () => checkTargets(kl, plan({ advantage: 1 })),
      'INVALID_ARGUMENT',
      'referenceLogprobs',
    );
    checkTargets(resolveLoss({ type: 'cross_entropy' }), plan({}));
  });
});

describe('statistics', () => {
  const draw = random(5);
  const logprobs = (n: number, spread: number, around?: readonly number[]) =>
    Array.from({ length: n }, (_, i) => (around?.[i] ?? -1) + (draw() - 0.5) * spread);
  const completions = [4, 6, 3].map((n, i) => {
    const old = logprobs(n, 1);
    return {
      n,
      old,
      now: logprobs(n, 1.2, old),
      reference: logprobs(n, 1, old),
      advantage: [1.5, -0.5, 1][i] as number,
    };
  });
  const mask = [1, 1, 0];
  const plan = planForest(
    [
      {
        tokens: [1],
        children: completions.map(({ n, old, reference, advantage }, i) => ({
          tokens: new Array(n).fill(2),
          train: { advantage, logprobs: old, referenceLogprobs: reference, ...(i === 2 && { mask }) },
        })),
      },
    ],
    options,
  );
  const old = completions.map((c) => c.old);
  const result = {
    loss: 0.25,
    logprobs: completions.map((c) => Float32Array.from(c.now)),
    entropies: completions.map((c) => new Float32Array(c.n).fill(2)),
  };
  const active = completions
    .flatMap((c, i) =>
      c.now.map((now, t) => ({
        ratio: Math.exp(now - (c.old[t] as number)),
        d: (c.reference[t] as number) - now,
        advantage: c.advantage,
        i,
        t,
      })),
    )
    .filter(({ i, t }) => i !== 2 || mask[t] === 1);
  const mean = (values: number[]) => values.reduce((sum, v) => sum + v, 0) / values.length;

  test('are means over the active tokens', () => {
    const stats = lossStats(resolveLoss({ type: 'grpo', clipLow: 0.2, clipHigh: 0.3 }), plan, old, result);
    expect(stats).toMatchObject({ loss: 0.25, tokens: 12, entropy: 2 });
    expect(stats.kl).toBeCloseTo(mean(active.map(({ d }) => Math.exp(d) - d - 1)), 5);
    expect(stats.ratio.mean).toBeCloseTo(mean(active.map(({ ratio }) => ratio)), 5);
    expect(stats.ratio.min).toBeCloseTo(Math.min(...active.map(({ ratio }) => ratio)), 5);
    expect(stats.ratio.max).toBeCloseTo(Math.max(...active.map(({ ratio }) => ratio)), 5);
    const low = active.filter(({ ratio, advantage }) => ratio < 0.8 && advantage < 0).length / 12;
    const high = active.filter(({ ratio, advantage }) => ratio > 1.3 && advantage > 0).length / 12;
    expect(low + high).toBeGreaterThan(0);
    expect(stats).toMatchObject({ clipLowFraction: low, clipHighFraction: high });
    expect(stats.clipFraction).toBeCloseTo(low + high, 12);
  });

  test('of gspo have one ratio a completion', () => {
    const stats = lossStats(resolveLoss({ type: 'gspo' }), plan, old, result);
    const ratios = [0, 1, 2].map((i) =>
      Math.exp(mean(active.filter((row) => row.i === i).map(({ ratio }) => Math.log(ratio)))),
    );
    expect(stats.ratio.mean).toBeCloseTo(mean(ratios), 5);
    expect(stats.ratio.min).toBeCloseTo(Math.min(...ratios), 5);
  });

  test('of cross-entropy have no ratio', () => {
    const stats = lossStats(resolveLoss({ type: 'cross_entropy' }), plan, [], result);
    expect(stats.ratio).toEqual({ mean: 1, min: 1, max: 1 });
    expect(stats.clipFraction).toBe(0);
  });
});
