import { afterAll, beforeAll, describe, expect, test } from '@jest/globals';
import { packForest } from '../../lib/policy/forest.js';
import { type Forest, Policy, type TrainTarget } from '../../lib/policy/index.js';
import { checkTargets, type Loss, type LossStats, resolveLoss } from '../../lib/policy/loss.js';
import { expectFailure, random, tinyConfig, tokenizerFiles } from './helpers.js';

const options = { vocabSize: 100, contextLength: 64 };

let policy: Policy;
beforeAll(async () => {
  policy = await Policy.create(tinyConfig, tokenizerFiles(), {
    dtype: 'f32',
    seed: 3,
    standardDeviation: 0.3,
  });
});
afterAll(() => policy.dispose());

/** One call, whose gradients are thrown away. */
async function found(forest: Forest, loss: Loss, maxTokens?: number): Promise<LossStats> {
  const stats = await policy.forwardBackward(forest, loss, { maxTokens });
  await policy.zeroGradients();
  return stats;
}

const sum = (values: Iterable<number>) => Array.from(values).reduce((total, value) => total + value, 0);

describe('weights', () => {
  const lengths = [3, 0, 5];
  /** Completions of these lengths, masked where that is 0; the loss is that of `only` alone. */
  const forest = (only: number): Forest => [
    {
      tokens: [1, 2, 3],
      children: lengths.map((length, i) => ({
        tokens: Array.from({ length: Math.max(length, 1) }, (_, t) => 10 + 7 * i + t),
        train: { advantage: i === only ? 1 : 0, ...(length === 0 && { mask: [0] }) },
      })),
    },
  ];

  test.each([
    ['grpo', (n: number) => 1 / (3 * Math.max(n, 1))],
    ['gspo', (n: number) => 1 / (3 * Math.max(n, 1))],
    ['bnpo', () => 1 / 8],
    ['dapo', () => 1 / 8],
    ['cispo', () => 1 / 8],
    ['cross_entropy', () => 1 / 8],
    ['dr_grpo', () => 1 / (3 * 16)],
  ] as const)('of %s', async (type, expected: (length: number) => number) => {
    for (const maxTokens of [undefined, 1]) {
      if (type === 'cross_entropy') {
        const { loss, logprobs } = await found(forest(0), { type }, maxTokens);
        expect(loss).toBeCloseTo(-expected(0) * sum(logprobs.flatMap((row) => [...row])), 6);
        continue;
      }
      for (const [i, length] of lengths.entries()) {
        const { loss, logprobs } = await found(forest(i), { type, maxTokens: 16 }, maxTokens);
        // Each of the completion's tokens gives -A, at a ratio of 1; of cispo -A times its log-probability.
        const rows = type === 'cispo' ? sum(logprobs[i] as Float32Array) : length;
        expect(loss).toBeCloseTo(-expected(length) * rows, 7);
      }
    }
  });

  test('are those of the whole forest in whatever micro-batches it is computed', async () => {
    const completion = (length: number, advantage: number) => ({
      tokens: new Array(length).fill(1),
      train: { advantage },
    });
    for (const maxTokens of [1000, 12, 1]) {
      const loss = async (...advantages: [number, number, number]) => {
        const children = [3, 7, 5].map((length, i) => completion(length, advantages[i] as number));
        const stats = await found([{ tokens: [1, 2, 3], children }], { type: 'grpo' }, maxTokens);
        expect(stats.tokens).toBe(15);
        return -stats.loss;
      };
      expect(await loss(1, 1, 1)).toBeCloseTo(1, 6);
      expect((await loss(1, 0, 0)) / 3).toBeCloseTo(1 / 9, 7);
      expect((await loss(0, 0, 1)) / 5).toBeCloseTo(1 / 15, 7);
    }
  });
});

describe('by target', () => {
  const lengths = [4, 3, 5];
  const types = ['grpo', 'dapo', 'dr_grpo', 'bnpo', 'cispo', 'gspo'] as const;
  const draw = random(11);
  const old = lengths.map((length) => Float32Array.from({ length }, () => -4 + draw()));
  const reference = lengths.map((length) => Float32Array.from({ length }, () => -4 + draw()));
  const forest = (train: (i: number) => Partial<TrainTarget> | undefined): Forest => [
    {
      tokens: [1, 2],
      children: lengths.flatMap((length, i) => {
        const own = train(i);
        const tokens = Array.from({ length }, (_, t) => 20 + 9 * i + t);
        return own === undefined ? [] : [{ tokens, train: { advantage: 0, logprobs: old[i], ...own } }];
      }),
    },
  ];
  /** The loss and all gradients of one call. */
  async function gradients(of: Forest, loss: Loss) {
    const stats = await policy.forwardBackward(of, loss);
    const parameters = await Promise.all(
      policy.parameters().map(({ name }) => policy.readParameter(name, 'gradient')),
    );
    await policy.zeroGradients();
    return { stats, loss: stats.loss, values: Float32Array.from(parameters.flatMap((p) => [...p])) };
  }
  type Found = { loss: number; values: Float32Array };
  function expectSum(whole: Found, parts: Found[]) {
    const values = whole.values.map((_, i) => sum(parts.map((part) => part.values[i] as number)));
    const size = Math.max(...values.map(Math.abs));
    expect(size).toBeGreaterThan(1e-4);
    const gap = whole.values.map((value, i) => Math.abs(value - (values[i] as number)));
    expect(Math.max(...gap)).toBeLessThan(2e-6 * Math.max(1, size));
    expect(whole.loss).toBeCloseTo(sum(parts.map(({ loss }) => loss)), 6);
  }

  test('an advantage may differ from token to token', async () => {
    const advantages = [[1, 0.5, -1, 2], [0, 0, -0.7], new Float32Array([0.3, -2, 0, 0, 1])];
    for (const type of types) {
      const loss: Loss = { type, maxTokens: 8, clipLow: 0.2, clipHigh: 0.3 };
      const whole = await gradients(
        forest((i) => ({ advantage: advantages[i] as ArrayLike<number> })),
        loss,
      );
      const parts = [];
      for (const [i, row] of advantages.entries()) {
        for (const [t, advantage] of Array.from(row).entries()) {
          if (advantage === 0) continue;
          // The loss is linear in the advantages, one of which is left at a time.
          const alone = Array.from({ length: lengths[i] as number }, (_, k) => (k === t ? advantage : 0));
          parts.push(
            await gradients(
              forest((j) => ({ advantage: j === i ? alone : 0 })),
              loss,
            ),
          );
        }
      }
      expectSum(whole, parts);
    }
  });

  test('a penalty and a bonus of its own are beside the advantages of others', async () => {
    for (const type of types) {
      const loss: Loss = { type, maxTokens: 8, kl: 0.3, entropy: 0.2 };
      const advantage = [1, 0, -1];
      const referenceLogprobs = (i: number) => reference[i];
      // The second is an anchor; the third has no reference.
      const whole = await gradients(
        forest((i) => ({
          advantage: advantage[i],
          ...(i === 1 && { kl: 0.7, entropy: 0 }),
          ...(i === 2 ? { kl: 0 } : { referenceLogprobs: referenceLogprobs(i) }),
        })),
        loss,
      );
      const all = { type, maxTokens: 8 };
      const only = (one: number, train: Partial<TrainTarget>) =>
        gradients(
          forest((i) => (i === one ? train : {})),
          all,
        );
      expectSum(whole, [
        await gradients(
          forest((i) => ({ advantage: advantage[i] })),
          all,
        ),
        await only(0, { kl: 0.3, referenceLogprobs: reference[0] }),
        await only(1, { kl: 0.7, referenceLogprobs: reference[1] }),
        await only(0, { entropy: 0.2 }),
        await only(2, { entropy: 0.2 }),
      ]);
      const { logprobs } = whole.stats;
      const k3 = [0, 1].flatMap((i) =>
        Array.from(reference[i] as Float32Array, (value, t) => {
          const d = value - (logprobs[i]?.[t] as number);
          return Math.exp(d) - d - 1;
        }),
      );
      expect(whole.stats.kl).toBeCloseTo(sum(k3) / k3.length, 5);
    }
  });

  test('parts of a batch with its normalizer add up to the batch, without what has no gradient', async () => {
    const normalizer = { completions: 3, tokens: 12 };
    const train = (i: number) => ({ advantage: [1, -1, 0.5][i] as number, referenceLogprobs: reference[i] });
    for (const type of types) {
      const loss: Loss = { type, maxTokens: 8, kl: 0.1, entropy: 0.2 };
      const whole = await gradients(forest(train), loss);
      const part = (of: number[]) =>
        gradients(
          forest((i) => (of.includes(i) ? train(i) : undefined)),
          { ...loss, normalizer },
        );
      expectSum(whole, [await part([0, 2]), await part([1])]);
      const withIdle = await gradients(
        forest((i) => (i === 1 ? { advantage: 0 } : { advantage: 1 })),
        { type, maxTokens: 8 },
      );
      const without = await gradients(
        forest((i) => (i === 1 ? undefined : { advantage: 1 })),
        { type, maxTokens: 8, normalizer },
      );
      expectSum(withIdle, [without]);
    }
    const entropy = (await found(forest(train), { type: 'cross_entropy' })).loss;
    const halved = await found(forest(train), { type: 'cross_entropy', normalizer: { tokens: 24 } });
    expect(halved.loss).toBeCloseTo(entropy / 2, 6);
  });

  test('the bonus is the mean entropy over all tokens whatever the type', async () => {
    for (const type of types) {
      const { loss, entropy } = await found(
        forest(() => ({ advantage: 0 })),
        { type, maxTokens: 100, entropy: 0.5 },
      );
      expect(loss).toBeCloseTo(-0.5 * entropy, 6);
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
    [{ type: 'grpo', temperature: -1 }, 'loss.temperature'],
    [{ type: 'grpo', temperature: Number.NaN }, 'loss.temperature'],
    [{ type: 'grpo', normalizer: { completions: 0 } }, 'normalizer.completions'],
    [{ type: 'cross_entropy', normalizer: { tokens: -1 } }, 'normalizer.tokens'],
    [{ type: 'dapo', normalizer: { tokens: Number.NaN } }, 'normalizer.tokens'],
  ])('refuses %j', async (loss, part) => {
    await expectFailure(() => resolveLoss(loss as Loss), 'INVALID_ARGUMENT', part);
  });

  test('needs advantages, and references for a KL penalty', async () => {
    const targets = (train: object) =>
      packForest([{ tokens: [1], children: [{ tokens: [2], train }] }], options).targets;
    await expectFailure(
      () => checkTargets(resolveLoss({ type: 'grpo' }), targets({})),
      'INVALID_ARGUMENT',
      'advantage',
    );
    const kl = resolveLoss({ type: 'grpo', kl: 0.1 });
    await expectFailure(
      () => checkTargets(kl, targets({ advantage: 1 })),
      'INVALID_ARGUMENT',
      'referenceLogprobs',
    );
    checkTargets(kl, targets({ advantage: 1, kl: 0 }));
    await expectFailure(
      () => checkTargets(resolveLoss({ type: 'grpo' }), targets({ advantage: 1, kl: 0.2 })),
      'INVALID_ARGUMENT',
      'kl is 0.2',
    );
    checkTargets(resolveLoss({ type: 'cross_entropy' }), targets({}));
  });
});

describe('statistics', () => {
  const draw = random(5);
  const lengths = [4, 6, 3];
  const mask = [1, 1, 0];
  const advantages = [1.5, -0.5, 1];
  const completion = (i: number) => Array.from({ length: lengths[i] as number }, (_, t) => 20 + 9 * i + t);
  const plain: Forest = [
    { tokens: [1], children: lengths.map((_, i) => ({ tokens: completion(i), train: {} })) },
  ];
  let forest: Forest;
  let active: { ratio: number; d: number; advantage: number; entropy: number; i: number }[];

  beforeAll(async () => {
    const now = await policy.score(plain);
    const near = (row: Float32Array, spread: number) =>
      Float32Array.from(row, (value) => value + (draw() - 0.5) * spread);
    const old = now.logprobs.map((row) => near(row, 1.2));
    const reference = old.map((row) => near(row, 1));
    forest = [
      {
        tokens: [1],
        children: lengths.map((_, i) => ({
          tokens: completion(i),
          train: {
            advantage: advantages[i],
            logprobs: old[i],
            referenceLogprobs: reference[i],
            ...(i === 2 && { mask }),
          },
        })),
      },
    ];
    active = now.logprobs.flatMap((row, i) =>
      Array.from(row, (logprob, t) => ({
        ratio: Math.exp(logprob - (old[i]?.[t] as number)),
        d: (reference[i]?.[t] as number) - logprob,
        advantage: advantages[i] as number,
        entropy: now.entropies[i]?.[t] as number,
        i,
        t,
      })).filter(({ t }) => i !== 2 || mask[t] === 1),
    );
  });
  const mean = (values: number[]) => sum(values) / values.length;

  test('are means over the active tokens', async () => {
    const stats = await found(forest, { type: 'grpo', clipLow: 0.2, clipHigh: 0.3 });
    expect(stats).toMatchObject({ finite: true, tokens: 12 });
    expect(stats.entropy).toBeCloseTo(mean(active.map(({ entropy }) => entropy)), 5);
    expect(stats.kl).toBeCloseTo(mean(active.map(({ d }) => Math.exp(d) - d - 1)), 5);
    expect(stats.ratio.mean).toBeCloseTo(mean(active.map(({ ratio }) => ratio)), 5);
    expect(stats.ratio.min).toBeCloseTo(Math.min(...active.map(({ ratio }) => ratio)), 5);
    expect(stats.ratio.max).toBeCloseTo(Math.max(...active.map(({ ratio }) => ratio)), 5);
    const low = active.filter(({ ratio, advantage }) => ratio < 0.8 && advantage < 0).length / 12;
    const high = active.filter(({ ratio, advantage }) => ratio > 1.3 && advantage > 0).length / 12;
    expect(low).toBeGreaterThan(0);
    expect(high).toBeGreaterThan(0);
    expect(stats).toMatchObject({ clipLowFraction: low, clipHighFraction: high });
    expect(stats.clipFraction).toBeCloseTo(low + high, 12);
  });

  test('are the same with a penalty, which does not change what is measured', async () => {
    const { loss: _, ...without } = await found(forest, { type: 'grpo' });
    const { loss: __, ...penalized } = await found(forest, { type: 'grpo', kl: 0.1 });
    expect(penalized).toEqual(without);
  });

  test('of gspo have one ratio a completion', async () => {
    const stats = await found(forest, { type: 'gspo' });
    const ratios = [0, 1, 2].map((i) =>
      Math.exp(mean(active.filter((row) => row.i === i).map(({ ratio }) => Math.log(ratio)))),
    );
    expect(stats.ratio.mean).toBeCloseTo(mean(ratios), 5);
    expect(stats.ratio.min).toBeCloseTo(Math.min(...ratios), 5);
    expect(stats.ratio.max).toBeCloseTo(Math.max(...ratios), 5);
  });

  test('of cross-entropy have no ratio', async () => {
    const stats = await found(plain, { type: 'cross_entropy' });
    expect(stats.ratio).toEqual({ mean: 1, min: 1, max: 1 });
    expect(stats.clipFraction).toBe(0);
  });

  test('take the policy itself for those targets alone that have no old log-probabilities', async () => {
    const [root] = forest;
    const mixed = root?.children?.map((child, i) =>
      i === 1 ? { ...child, train: { ...child.train, logprobs: undefined } } : child,
    );
    const stats = await found([{ tokens: [1], children: mixed }], { type: 'grpo' });
    const ratios = active.map(({ ratio, i }) => (i === 1 ? 1 : ratio));
    expect(stats.ratio.mean).toBeCloseTo(mean(ratios), 5);
    const all = await found(
      [{ tokens: [1], children: mixed?.map((c) => ({ ...c, train: { advantage: 1 } })) }],
      { type: 'grpo' },
    );
    expect(all.ratio).toEqual({ mean: 1, min: 1, max: 1 });
  });

  test('of a loss that is not finite are unknown, and its gradients zero', async () => {
    const train = { advantage: -1, logprobs: [-1e4, -1e4] };
    await policy.forwardBackward(plain, { type: 'cross_entropy' });
    const stats = await policy.forwardBackward([{ tokens: [1], children: [{ tokens: [2, 3], train }] }], {
      type: 'grpo',
      clipHigh: 1e30,
    });
    expect(stats).toMatchObject({ finite: false, tokens: 2, kl: Number.NaN, entropy: Number.NaN });
    expect(Number.isFinite(stats.loss)).toBe(false);
    for (const { name } of policy.parameters()) {
      expect((await policy.readParameter(name, 'gradient')).every((value) => value === 0)).toBe(true);
    }
  });
});
