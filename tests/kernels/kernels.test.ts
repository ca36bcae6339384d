import { afterAll, beforeAll, describe, expect, test } from '@jest/globals';
import { MerfError } from '../../lib/errors.js';
import {
  attention,
  attentionBackward,
  type Device,
  fusedPolicyLoss,
  type GroupAdvantagesArguments,
  groupAdvantages,
  lossWeights,
  openDevice,
  policyLoss,
  sampleTokens,
  type Tensor,
} from '../../lib/kernels/index.js';

let device: Device;
beforeAll(() => {
  device = openDevice('cpu');
});

/** Numbers between -1 and 1, the same in every run. */
function numbers(length: number, seed = 1): Float32Array {
  let state = seed * 2654435761;
  return Float32Array.from({ length }, () => {
    state = (Math.imul(state ^ (state >>> 15), 2246822519) + 374761393) | 0;
    return state / 2 ** 31;
  });
}

const tensor = (length: number, shape: number[], seed?: number, dtype: 'f32' | 'bf16' = 'f32') =>
  device.tensor(numbers(length, seed), { shape, dtype });

async function failure(call: () => unknown): Promise<MerfError> {
  try {
    await call();
  } catch (error) {
    expect(error).toBeInstanceOf(MerfError);
    return error as MerfError;
  }
  throw new Error('It did not fail');
}

function expectClose(actual: ArrayLike<number>, expected: ArrayLike<number>, tolerance = 1e-5) {
  expect(actual.length).toBe(expected.length);
  for (let i = 0; i < actual.length; ++i) {
    expect(Math.abs((actual[i] as number) - (expected[i] as number))).toBeLessThan(tolerance);
  }
}

describe('tensors', () => {
  test('hold what they were given', async () => {
    const values = Float32Array.of(1, 2.5, -3, 1 / 3, 0, 7);
    const f32 = device.tensor(values, { shape: [2, 3] });
    values[0] = 99;
    expect(f32).toMatchObject({ shape: [2, 3], dtype: 'f32', disposed: false });
    expect(Array.from(await f32.read())).toEqual([1, 2.5, -3, Math.fround(1 / 3), 0, 7]);
    const bf16 = device.tensor(Float32Array.of(1, 1 / 3, 1.00390625, 1.01171875), { dtype: 'bf16' });
    expect(Array.from(await bf16.read())).toEqual([1, 0.333984375, 1, 1.015625]);
    const i32 = device.tensor(Int32Array.of(-1, 2 ** 31 - 1));
    expect(i32.dtype).toBe('i32');
    expect(Array.from(await i32.read())).toEqual([-1, 2 ** 31 - 1]);
    expect(Array.from(await device.tensor([2, 2]).read())).toEqual([0, 0, 0, 0]);
  });

  test('refuse what does not fit', async () => {
    const calls: (() => unknown)[] = [
      () => device.tensor('text' as unknown as Float32Array),
      () => device.tensor(new Float64Array(2) as unknown as Float32Array),
      () => device.tensor(Float32Array.of(1), { shape: [2] }),
      () => device.tensor(Float32Array.of(1), { shape: [] }),
      () => device.tensor(Float32Array.of(1), { shape: [1, 1, 1, 1, 1] }),
      () => device.tensor(Float32Array.of(1), { dtype: 'f64' as 'f32' }),
      () => device.tensor(Float32Array.of(1), { dtype: 'i32' as 'f32' }),
      () => device.tensor([-1]),
      () => device.tensor([2 ** 30, 2 ** 30]),
      () => device.tensor([2], { shape: [2] } as object),
      () => new (device.tensor([1]).constructor as new () => Tensor)(),
    ];
    for (const call of calls) expect((await failure(call)).code).toBe('INVALID_ARGUMENT');
    expect((await failure(() => openDevice('abacus'))).code).toBe('DEVICE_UNAVAILABLE');
  });

  test('more than there is memory for is refused when it is used', async () => {
    const huge = device.tensor([2 ** 20, 2 ** 19]);
    expect((await failure(() => huge.read())).code).toBe('OUT_OF_MEMORY');
    expect((await failure(() => huge.read())).code).toBe('OUT_OF_MEMORY');
    expect(Array.from(await device.tensor([1]).read())).toEqual([0]);
  });

  test('once disposed of are refused, and work under way is not harmed', async () => {
    const t = tensor(1 << 20, [1 << 20]);
    const reading = t.read();
    t.dispose();
    t.dispose();
    expect(t.disposed).toBe(true);
    expect(t.shape).toEqual([1 << 20]);
    expect((await reading).length).toBe(1 << 20);
    expect((await failure(() => t.read())).code).toBe('DISPOSED');
    const rewards = { rewards: t, groupOffsets: Int32Array.of(0, 1 << 20) };
    expect((await failure(() => groupAdvantages(rewards))).code).toBe('DISPOSED');
  });
});

describe('attention', () => {
  const T = 7;
  const [Hq, Hk, D] = [4, 2, 8];
  const visibleUntil = Int32Array.of(7, 7, 5, 4, 5, 7, 7);
  const inputs = () => ({
    q: tensor(T * Hq * D, [T, Hq, D], 1),
    k: tensor(T * Hk * D, [T, Hk, D], 2),
    v: tensor(T * Hk * D, [T, Hk, D], 3),
    visibleUntil,
  });

  function reference(q: ArrayLike<number>, k: ArrayLike<number>, v: ArrayLike<number>): Float64Array {
    const at = (x: ArrayLike<number>, i: number) => x[i] as number;
    const out = new Float64Array(T * Hq * D);
    for (let i = 0; i < T; ++i) {
      for (let h = 0; h < Hq; ++h) {
        const from = Math.floor(h / (Hq / Hk));
        let sum = 0;
        for (let j = 0; j <= i; ++j) {
          if (i >= (visibleUntil[j] as number)) continue;
          let score = 0;
          for (let d = 0; d < D; ++d) score += at(q, (i * Hq + h) * D + d) * at(k, (j * Hk + from) * D + d);
          const p = Math.exp(score / Math.sqrt(D));
          sum += p;
          for (let d = 0; d < D; ++d) {
            out[(i * Hq + h) * D + d] = at(out, (i * Hq + h) * D + d) + p * at(v, (j * Hk + from) * D + d);
          }
        }
        for (let d = 0; d < D; ++d) out[(i * Hq + h) * D + d] = at(out, (i * Hq + h) * D + d) / sum;
      }
    }
    return out;
  }

  test('over a forest, forward and backward', async () => {
    const args = inputs();
    const { out, lse } = await attention(args);
    expect(out.shape).toEqual([T, Hq, D]);
    expect(lse.shape).toEqual([Hq, T]);
    const values = [await args.q.read(), await args.k.read(), await args.v.read()] as [
      Float32Array,
      Float32Array,
      Float32Array,
    ];
    expectClose(await out.read(), reference(...values));
    const weights = numbers(T * Hq * D, 4);
    const dout = device.tensor(weights, { shape: [T, Hq, D] });
    const { dq, dk, dv } = await attentionBackward({ ...args, out, lse, dout });
    const loss = (input: number, by: number, direction: Float32Array) => {
      const [q, k, v] = values.map((x, i) =>
        Float64Array.from(x, (value, j) => (i === input ? value + by * (direction[j] as number) : value)),
      ) as [Float64Array, Float64Array, Float64Array];
      return reference(q, k, v).reduce((sum, o, i) => sum + o * (weights[i] as number), 0);
    };
    for (const [input, gradient] of [dq, dk, dv].entries()) {
      const direction = numbers((values[input] as Float32Array).length, 5);
      const expected = (loss(input, 1e-5, direction) - loss(input, -1e-5, direction)) / 2e-5;
      const actual = (await gradient.read()).reduce((sum, g, i) => sum + g * (direction[i] as number), 0);
      expect(actual).toBeCloseTo(expected, 4);
    }
  });

  test('refuses what does not fit together', async () => {
    const args = inputs();
    const cases: [object, string][] = [
      [{ q: numbers(4) }, 'q'],
      [{ q: tensor(T * Hq, [T, Hq]) }, 'q'],
      [{ q: device.tensor(new Int32Array(T * Hq * D), { shape: [T, Hq, D] }) }, 'q'],
      [{ k: tensor(T * 3 * D, [T, 3, D]) }, 'k'],
      [{ k: tensor(T * Hk * D, [T, Hk, D], 1, 'bf16') }, 'k'],
      [{ v: tensor((T - 1) * Hk * D, [T - 1, Hk, D]) }, 'v'],
      [{ visibleUntil: Int32Array.of(7) }, 'visibleUntil'],
      [{ visibleUntil: Int32Array.of(7, 7, 5, 6, 5, 7, 7) }, 'visibleUntil'],
      [{ visibleUntil: [7, 7, 5, 4, 5, 7, 7] }, 'visibleUntil'],
      [{ scale: Number.NaN }, 'scale'],
      [{ scale: 'x' }, 'scale'],
    ];
    for (const [changes, argument] of cases) {
      const error = await failure(() =>
        attention({ ...args, ...changes } as Parameters<typeof attention>[0]),
      );
      expect(error.code).toBe('INVALID_ARGUMENT');
      expect(error.message).toContain(argument);
    }
    const { out, lse } = await attention(args);
    const gone = tensor(T * Hq * D, [T, Hq, D]);
    gone.dispose();
    expect((await failure(() => attentionBackward({ ...args, out, lse, dout: gone }))).code).toBe('DISPOSED');
    expect((await failure(() => attentionBackward({ ...args, out, lse: out, dout: out }))).message).toContain(
      'lse',
    );
  });
});

describe('sampling', () => {
  const rows = 2000;
  const keys = Uint32Array.from({ length: 2 * rows }, (_, i) => (i % 2 ? 0 : i / 2));
  const probabilities = [0.4, 0.3, 0.2, 0.1];
  const logits = () =>
    device.tensor(
      Float32Array.from({ length: rows * 4 }, (_, i) => Math.log(probabilities[i % 4] as number)),
      { shape: [rows, 4] },
    );

  test('draws from the distribution, and says with what probability', async () => {
    const args = { logits: logits(), keys, positions: new Int32Array(rows), seed: 3 };
    const drawn = await sampleTokens(args);
    const tokens = await drawn.tokens.read();
    const counts = [0, 0, 0, 0];
    tokens.forEach((t) => {
      counts[t] = (counts[t] as number) + 1;
    });
    const chiSquare = probabilities.reduce(
      (sum, p, i) => sum + ((counts[i] as number) - rows * p) ** 2 / (rows * p),
      0,
    );
    expect(chiSquare).toBeLessThan(16.3);
    const logprobs = Array.from(tokens, (t) => Math.log(probabilities[t] as number));
    expectClose(await drawn.logprobs.read(), logprobs);
    expectClose(await drawn.samplingLogprobs.read(), logprobs);
    const entropy = -probabilities.reduce((sum, p) => sum + p * Math.log(p), 0);
    expectClose(await drawn.entropies.read(), new Array(rows).fill(entropy));
    expect(Array.from(await (await sampleTokens(args)).tokens.read())).toEqual(Array.from(tokens));
    const other = await sampleTokens({ ...args, seed: 4n });
    expect(Array.from(await other.tokens.read())).not.toEqual(Array.from(tokens));
    const truncated = await sampleTokens({ ...args, topK: 2, temperature: 0.5 });
    const kept = await truncated.tokens.read();
    expect(Math.max(...kept)).toBe(1);
    expectClose(
      await truncated.samplingLogprobs.read(),
      Array.from(kept, (t) => Math.log((t === 0 ? 0.16 : 0.09) / 0.25)),
    );
    expectClose(
      await truncated.logprobs.read(),
      Array.from(kept, (t) => Math.log((t === 0 ? 0.16 : 0.09) / 0.3)),
    );
    expect(new Set(await (await sampleTokens({ ...args, temperature: 0 })).tokens.read())).toEqual(
      new Set([0]),
    );
  });

  test('refuses what does not fit', async () => {
    const args = { logits: logits(), keys, positions: new Int32Array(rows), seed: 3 };
    const cases: [object, string][] = [
      [{ logits: tensor(8, [8]) }, 'logits'],
      [{ logits: tensor(8, [2, 4], 1, 'bf16') }, 'logits'],
      [{ keys: new Uint32Array(3) }, 'keys'],
      [{ positions: new Int32Array(3) }, 'positions'],
      [{ positions: new Int32Array(rows).fill(-1) }, 'positions'],
      [{ seed: 1.5 }, 'seed'],
      [{ seed: -1 }, 'seed'],
      [{ topP: 0 }, 'topP'],
      [{ temperature: Number.NaN }, 'temperature'],
    ];
    for (const [changes, argument] of cases) {
      const error = await failure(() =>
        sampleTokens({ ...args, ...changes } as Parameters<typeof sampleTokens>[0]),
      );
      expect(error.code).toBe('INVALID_ARGUMENT');
      expect(error.message).toContain(argument);
    }
  });
});

describe('group advantages', () => {
  const rewards = () => device.tensor(Float32Array.of(3, -3, 0, 0, 2, 2, 5));
  const groupOffsets = Int32Array.of(0, 4, 6, 7);

  test('by group, batch and leave-one-out', async () => {
    const s = Math.sqrt(6) + 1e-4;
    const advantages = async (options: object) =>
      (await groupAdvantages({ rewards: rewards(), groupOffsets, ...options })).read();
    expectClose(await advantages({}), [3 / s, -3 / s, 0, 0, 0, 0, 0]);
    expectClose(await advantages({ scale: false }), [3, -3, 0, 0, 0, 0, 0]);
    expectClose(await advantages({ kind: 'leave_one_out' }), [4, -4, 0, 0, 0, 0, 0]);
  });

  test('of numbers are those of a tensor, bit for bit', async () => {
    const given = numbers(240, 11);
    for (const size of [1, 2, 3, 8, 240]) {
      const groups = Array.from({ length: 240 / size }, (_, g) =>
        Array.from(given.subarray(g * size, (g + 1) * size)),
      );
      const offsets = Int32Array.from({ length: groups.length + 1 }, (_, g) => g * size);
      for (const kind of ['group', 'batch', 'leave_one_out'] as const) {
        for (const options of [{ kind }, { kind, scale: false }, { kind, epsilon: 0 }]) {
          const rewards = device.tensor(Float32Array.from(given));
          const tensor = await groupAdvantages({ rewards, groupOffsets: offsets, ...options });
          expect((await groupAdvantages(groups, options)).flat()).toEqual(Array.from(await tensor.read()));
        }
      }
    }
    for (const options of [{ kind: 'median' }, { scale: 1 }, { epsilon: -1 }, { epsilon: Number.NaN }]) {
      expect((await failure(() => groupAdvantages([[1, 2]], options as object))).code).toBe(
        'INVALID_ARGUMENT',
      );
    }
    for (const rewards of [[[1, Number.NaN]], [[1, '2']], [7], [[1e39]]]) {
      const { code, message } = await failure(() => groupAdvantages(rewards as number[][]));
      expect([code, /rewards\[0\]/.test(message)]).toEqual(['INVALID_ARGUMENT', true]);
    }
  });

  test('refuses what does not fit', async () => {
    const cases: object[] = [
      { groupOffsets: Int32Array.of(0, 4, 6) },
      { groupOffsets: Int32Array.of(0, 6, 4, 7) },
      { groupOffsets: new Int32Array(0) },
      { kind: 'median' },
      { scale: 1 },
      { epsilon: -1 },
      { rewards: device.tensor(new Int32Array(7)) },
      { rewards: 7 },
    ];
    for (const changes of cases) {
      const args = { rewards: rewards(), groupOffsets, ...changes } as GroupAdvantagesArguments;
      expect((await failure(() => groupAdvantages(args))).code).toBe('INVALID_ARGUMENT');
    }
  });
});

describe('policy loss', () => {
  const R = 5;
  const old = Float32Array.of(-1, -2, -1.5, -0.5, -3);
  const now = Float32Array.of(-0.5, -2.1, -1.4, -0.9, -3);
  const advantages = Float32Array.of(1, -1, 2, -0.5, 0.7);
  const weights = Float32Array.of(0.2, 0.1, 0, 0.3, 0.4);
  const rows = () => ({
    weights: device.tensor(weights),
    advantages: device.tensor(advantages),
    oldLogprobs: device.tensor(old),
  });

  test('of given log-probabilities', async () => {
    const { loss, coefficients } = await policyLoss({ logprobs: device.tensor(now), ...rows() });
    let expected = 0;
    const derivatives = Array.from({ length: R }, (_, r) => {
      const [a, w] = [advantages[r] as number, weights[r] as number];
      const ratio = Math.exp((now[r] as number) - (old[r] as number));
      const clipped = Math.min(Math.max(ratio, 0.8), 1.2);
      expected -= w * Math.min(ratio * a, clipped * a);
      return ratio * a <= clipped * a ? -w * ratio * a : 0;
    });
    expect(loss).toBeCloseTo(expected, 5);
    expectClose(await coefficients.read(), derivatives);
  });

  test('with its statistics, where they are asked for', async () => {
    const entropies = device.tensor(Float32Array.of(1, 2, 3, 4, 5));
    const args = { logprobs: device.tensor(now), entropies, ...rows() };
    expect(await policyLoss(args)).not.toHaveProperty('statistics');
    const { statistics } = await policyLoss({ ...args, statistics: true });
    // The row of weight 0 counts for nothing.
    const counted = [0, 1, 3, 4];
    const ratios = counted.map((r) => Math.exp((now[r] as number) - (old[r] as number)));
    expect(statistics).toMatchObject({ tokens: 4, entropy: 3, kl: 0, clipLowFraction: 0.25 });
    expect(statistics?.clipHighFraction).toBe(0.25);
    expect(statistics?.clipFraction).toBe(0.5);
    expect(statistics?.ratio.mean).toBeCloseTo(ratios.reduce((sum, ratio) => sum + ratio, 0) / 4, 6);
    expect(statistics?.ratio.min).toBeCloseTo(Math.min(...ratios), 6);
    expect(statistics?.ratio.max).toBeCloseTo(Math.max(...ratios), 6);
  });

  test('with weights of the penalty and of the bonus', async () => {
    const reference = Float32Array.of(-1, -2, -1, -1, -2);
    const entropies = Float32Array.of(1, 2, 3, 4, 5);
    const klWeights = Float32Array.of(0, 1, 0.5, 0, 0.25);
    const entropyWeights = Float32Array.of(0.5, 0, 0, 1, 0);
    const plain = await policyLoss({ logprobs: device.tensor(now), ...rows() });
    const { loss, coefficients } = await policyLoss({
      logprobs: device.tensor(now),
      entropies: device.tensor(entropies),
      ...rows(),
      referenceLogprobs: device.tensor(reference),
      klCoefficient: 0.3,
      entropyCoefficient: 0.2,
      klWeights: device.tensor(klWeights),
      entropyWeights: device.tensor(entropyWeights),
    });
    let expected = plain.loss;
    const derivatives = Array.from(await plain.coefficients.read(), (own, r) => {
      const d = (reference[r] as number) - (now[r] as number);
      const weight = 0.3 * (klWeights[r] as number);
      expected += weight * (Math.exp(d) - d - 1);
      expected -= 0.2 * (entropyWeights[r] as number) * (entropies[r] as number);
      return own + weight * (1 - Math.exp(d));
    });
    expect(loss).toBeCloseTo(expected, 6);
    expectClose(await coefficients.read(), derivatives);
    const short = await failure(() =>
      policyLoss({
        logprobs: device.tensor(now),
        ...rows(),
        klWeights: device.tensor(new Float32Array(R - 1)),
      }),
    );
    expect(short).toMatchObject({
      code: 'INVALID_ARGUMENT',
      message: expect.stringContaining('klWeights'),
    });
  });

  test('weights rows by token, by completion or by a constant', async () => {
    const rows = { sequences: Int32Array.of(0, 0, 0, 1, 1, 1, 1, 1), completions: 4 };
    expectClose(lossWeights({ ...rows, aggregation: 'token_mean' }), new Array(8).fill(1 / 8), 1e-8);
    const byCompletion = [...new Array(3).fill(1 / 12), ...new Array(5).fill(1 / 20)];
    expectClose(lossWeights({ ...rows, aggregation: 'sequence_mean' }), byCompletion, 1e-8);
    const constant = lossWeights({ ...rows, aggregation: 'constant', maxTokens: 16 });
    expectClose(constant, new Array(8).fill(1 / 64), 1e-8);
    const normalizer = { completions: 8, tokens: 32 };
    expectClose(
      lossWeights({ ...rows, aggregation: 'token_mean', normalizer }),
      new Array(8).fill(1 / 32),
      1e-8,
    );
    const part = lossWeights({ ...rows, aggregation: 'sequence_mean', normalizer: { completions: 8 } });
    expectClose(
      part,
      byCompletion.map((weight) => weight / 2),
      1e-8,
    );
    for (const key of ['completions', 'tokens']) {
      const zero = await failure(() =>
        lossWeights({ ...rows, aggregation: 'token_mean', normalizer: { [key]: 0 } }),
      );
      expect(zero).toMatchObject({ code: 'INVALID_ARGUMENT', message: expect.stringContaining(key) });
    }
    const refused = await failure(() => lossWeights({ ...rows, aggregation: 'constant' }));
    expect(refused).toMatchObject({
      code: 'INVALID_ARGUMENT',
      message: expect.stringContaining('maxTokens'),
    });
  });

  test('fused with the head, and its gradients', async () => {
    const [T, H, V] = [4, 6, 11];
    const hidden = numbers(T * H, 7);
    const weight = numbers(V * H, 8);
    const sourceRows = Int32Array.of(0, 2, 2, 3, 0);
    const targets = Int32Array.of(1, 10, 3, 0, 5);
    const value = (x: ArrayLike<number>, w: ArrayLike<number>) => {
      let sum = 0;
      for (let r = 0; r < R; ++r) {
        const logits = Array.from({ length: V }, (_, v) => {
          let dot = 0;
          for (let h = 0; h < H; ++h)
            dot += (x[(sourceRows[r] as number) * H + h] as number) * (w[v * H + h] as number);
          return dot;
        });
        const logSum = Math.log(logits.reduce((s, l) => s + Math.exp(l), 0));
        const logprob = (logits[targets[r] as number] as number) - logSum;
        const ratio = Math.exp(logprob - (old[r] as number));
        const a = advantages[r] as number;
        sum -= (weights[r] as number) * Math.min(ratio * a, Math.min(Math.max(ratio, 0.8), 1.2) * a);
      }
      return sum;
    };
    const result = await fusedPolicyLoss({
      hidden: device.tensor(hidden, { shape: [T, H] }),
      weight: device.tensor(weight, { shape: [V, H] }),
      rows: sourceRows,
      targets,
      ...rows(),
    });
    expect(result.loss).toBeCloseTo(value(hidden, weight), 5);
    expect(result.dhidden.shape).toEqual([T, H]);
    expect(result.dweight.shape).toEqual([V, H]);
    const alongs = [
      {
        gradient: result.dhidden,
        of: (by: number, d: Float32Array) =>
          value(
            hidden.map((x, i) => x + by * (d[i] as number)),
            weight,
          ),
      },
      {
        gradient: result.dweight,
        of: (by: number, d: Float32Array) =>
          value(
            hidden,
            weight.map((x, i) => x + by * (d[i] as number)),
          ),
      },
    ];
    for (const { gradient, of } of alongs) {
      const values = await gradient.read();
      const direction = numbers(values.length, 9);
      const expected = (of(1e-3, direction) - of(-1e-3, direction)) / 2e-3;
      expect(values.reduce((sum, g, i) => sum + g * (direction[i] as number), 0)).toBeCloseTo(expected, 3);
    }
    expect(Array.from(await result.dhidden.read()).slice(H, 2 * H)).toEqual(new Array(H).fill(0));
  });

  test('refuses what does not fit', async () => {
    const args = { logprobs: device.tensor(now), ...rows() };
    const cases: [object, string][] = [
      [{ logprobs: undefined }, 'logprobs'],
      [{ weights: device.tensor(new Float32Array(4)) }, 'weights'],
      [{ advantages: undefined }, 'advantages'],
      [{ advantages: device.tensor(new Int32Array(R)) }, 'advantages'],
      [{ klCoefficient: 0.1 }, 'referenceLogprobs'],
      [{ entropyCoefficient: 0.1 }, 'entropies'],
      [{ kind: 'gspo' }, 'sequences'],
      [{ kind: 'gspo', sequences: Int32Array.of(1, 1, 1, 1, 1) }, 'sequences'],
      [{ clipHigh: -1 }, 'clipHigh'],
    ];
    for (const [changes, argument] of cases) {
      const error = await failure(() =>
        policyLoss({ ...args, ...changes } as Parameters<typeof policyLoss>[0]),
      );
      expect(error.code).toBe('INVALID_ARGUMENT');
      expect(error.message).toContain(argument);
    }
    const fused = {
      hidden: tensor(8, [2, 4]),
      weight: tensor(12, [3, 4]),
      rows: Int32Array.of(0, 1, 1, 0, 0),
      targets: Int32Array.of(0, 1, 2, 1, 0),
      ...rows(),
    };
    const fusedCases: [object, string][] = [
      [{ weight: tensor(15, [3, 5]) }, 'weight'],
      [{ weight: tensor(12, [3, 4], 1, 'bf16') }, 'weight'],
      [{ rows: Int32Array.of(0, 1, 2, 0, 0) }, 'rows'],
      [{ rows: new Int32Array(0) }, 'rows'],
      [{ targets: Int32Array.of(0, 1, 3, 1, 0) }, 'targets'],
      [{ targets: Int32Array.of(0) }, 'targets'],
    ];
    for (const [changes, argument] of fusedCases) {
      const error = await failure(() =>
        fusedPolicyLoss({ ...fused, ...changes } as Parameters<typeof fusedPolicyLoss>[0]),
      );
      expect(error.code).toBe('INVALID_ARGUMENT');
      expect(error.message).toContain(argument);
    }
  });
});

afterAll(() => {
  // Handles that nobody disposed of must not keep the process from its end.
  device.tensor([1]);
});

test('a signal that has fired ends every kernel', async () => {
  const signal = AbortSignal.abort();
  const visibleUntil = new Int32Array(4).fill(4);
  const shaped = () => tensor(64, [4, 2, 8]);
  const given = { q: shaped(), k: shaped(), v: shaped(), visibleUntil };
  const { out, lse } = await attention(given);
  const ones = () => device.tensor(new Float32Array(4).fill(1));
  const loss = { weights: ones(), advantages: ones(), oldLogprobs: ones() };
  const rows = Int32Array.of(0, 1, 2, 3);
  const calls = [
    () => attention({ ...given, signal }),
    () => attentionBackward({ ...given, out, lse, dout: shaped(), signal }),
    () => policyLoss({ ...loss, logprobs: ones(), signal }),
    () =>
      fusedPolicyLoss({
        ...loss,
        hidden: tensor(32, [4, 8]),
        weight: tensor(80, [10, 8]),
        rows,
        targets: rows,
        signal,
      }),
    () => groupAdvantages({ rewards: ones(), groupOffsets: Int32Array.of(0, 4), signal }),
    () =>
      sampleTokens({
        logits: tensor(40, [4, 10]),
        keys: new Uint32Array(8),
        positions: new Int32Array(4),
        seed: 1,
        signal,
      }),
  ];
  for (const call of calls) expect((await failure(call)).code).toBe('ABORTED');
});

test('tensors end with their block', async () => {
  let kept: Tensor | undefined;
  {
    using inner = device.tensor([3]);
    kept = inner;
    expect(kept.disposed).toBe(false);
  }
  expect(kept.disposed).toBe(true);
});
