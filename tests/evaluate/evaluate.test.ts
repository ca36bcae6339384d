import { describe, expect, test } from '@jest/globals';
import {
  clusteredMean,
  evaluate,
  pairedDifference,
  passAtK,
  type RowResult,
} from '../../lib/evaluate/index.js';
import { Random, type Task } from '../../lib/tasks/index.js';
import { FakePolicy } from '../train/fake-policy.js';
import { type FakeRow, fakeTask } from '../train/fake-task.js';

/** The share of the k-subsets of n completions, the first c of them correct, that hold a correct one. */
function byCounting(n: number, c: number, k: number): number {
  let hits = 0;
  let all = 0;
  for (let set = 0; set < 1 << n; set++) {
    const members = set.toString(2).split('1').length - 1;
    if (members !== k) continue;
    all++;
    if ((set & ((1 << c) - 1)) !== 0) hits++;
  }
  return hits / all;
}

describe('passAtK', () => {
  test('is the share of subsets that hold a correct completion', () => {
    for (let n = 1; n <= 8; n++) {
      for (let c = 0; c <= n; c++) {
        for (let k = 1; k <= n; k++) expect(passAtK(n, c, k)).toBeCloseTo(byCounting(n, c, k), 12);
      }
    }
  });

  test('stays exact where the binomials overflow', () => {
    expect(passAtK(10_000, 1, 5_000)).toBeCloseTo(0.5, 10);
  });

  test('refuses a k that was not drawn', () => {
    expect(() => passAtK(4, 2, 5)).toThrow(/k/);
    expect(() => passAtK(4, 5, 1)).toThrow(/correct/);
  });
});

describe('clusteredMean', () => {
  test('is the usual standard error where every value is its own cluster', () => {
    const values = [0.25, 1, 0, 0.5, 0.75, 0, 1];
    const mean = values.reduce((a, b) => a + b) / 7;
    const variance = values.reduce((sum, value) => sum + (value - mean) ** 2, 0) / 6;
    const result = clusteredMean(values, [...'abcdefg']);
    expect(result).toEqual({
      mean: expect.closeTo(mean, 15),
      error: expect.closeTo(Math.sqrt(variance / 7), 15),
      clusters: 7,
    });
  });

  test('a case by hand: residuals of a cluster add before they are squared', () => {
    // The mean is 1/2; residuals add to 1/2, 0 and -1/2, so the variance is 3/2 * (1/4 + 1/4) / 36 = 1/48.
    const values = [1, 1, 0, 0, 1, 0];
    const { mean, error, clusters } = clusteredMean(values, ['a', 'a', 'a', 'b', 'b', 'c']);
    expect([mean, clusters]).toEqual([0.5, 3]);
    expect(error).toBeCloseTo(Math.sqrt(1 / 48), 15);
    expect(clusteredMean([0, 1, 0, 1, 0, 1], ['c', 'a', 'b', 'b', 'a', 'a']).error).toBeCloseTo(error, 15);
    // Without clusters: 6/4 / 5 / 6 = 1/20.
    expect(clusteredMean(values, ['1', '2', '3', '4', '5', '6']).error).toBeCloseTo(Math.sqrt(1 / 20), 15);
  });

  test('values said twice tell no more than said once, but for the factor of few clusters', () => {
    const once = [0, 1, 1, 0.5, 0];
    const names = ['a', 'b', 'c', 'd', 'e'];
    expect(clusteredMean([...once, ...once], [...names, ...names]).error).toBeCloseTo(
      clusteredMean(once, names).error,
      15,
    );
  });

  test('is how far the mean strays when rows are drawn anew, which the plain error is not', () => {
    const random = new Random(5);
    const normal = () =>
      Math.sqrt(-2 * Math.log(1 - random.uniform())) * Math.cos(2 * Math.PI * random.uniform());
    const clusters = Array.from({ length: 200 }, (_, i) => String(i >> 2));
    const each = clusters.map((_, i) => String(i));
    const draws = Array.from({ length: 1000 }, () => {
      const effects = new Map<string, number>();
      for (const name of clusters) if (!effects.has(name)) effects.set(name, normal());
      const values = clusters.map((name) => (effects.get(name) as number) + normal());
      return { clustered: clusteredMean(values, clusters), plain: clusteredMean(values, each) };
    });
    const rms = (values: readonly number[]) =>
      Math.sqrt(values.reduce((sum, value) => sum + value * value, 0) / values.length);
    const strayed = rms(draws.map(({ clustered }) => clustered.mean));
    // 50 clusters of 4: variance (1 + 1/4) / 50. A thousand draws know it to 2.2%.
    expect(strayed / Math.sqrt(1.25 / 50)).toBeCloseTo(1, 1);
    expect(
      Math.abs(rms(draws.map(({ clustered }) => clustered.error)) / Math.sqrt(1.25 / 50) - 1),
    ).toBeLessThan(0.03);
    expect(rms(draws.map(({ plain }) => plain.error)) / strayed).toBeLessThan(0.7);
  });

  test('one cluster has no error to show, and no values no mean', () => {
    expect(clusteredMean([0, 1], ['a', 'a'])).toEqual({ mean: 0.5, error: 0, clusters: 1 });
    expect(() => clusteredMean([], [])).toThrow(/at least one of values/);
    expect(() => clusteredMean([1, 2], ['a'])).toThrow('a cluster for each of 2 values but received 1');
  });
});

describe('pairedDifference', () => {
  const results = (accuracies: readonly number[], identities: readonly string[]): RowResult[] =>
    accuracies.map((accuracy, i) => ({ accuracy, identity: identities[i] as string }));

  test('a case by hand', () => {
    const identities = ['p', 'p', 'q', 'r', 's'];
    const a = results([1, 0.5, 1, 0, 1], identities);
    const b = results([0.5, 0.5, 0, 0, 1], identities);
    // Differences 1/2, 0, 1, 0, 0: mean 0.3; residuals by puzzle -0.1, 0.7, -0.3, -0.3.
    expect(pairedDifference(a, b)).toEqual({
      difference: expect.closeTo(0.3, 15),
      error: expect.closeTo(Math.sqrt(((0.01 + 0.49 + 0.09 + 0.09) * 4) / 3) / 5, 15),
      rows: 5,
      clusters: 4,
    });
    expect(pairedDifference(b, a).difference).toBeCloseTo(-0.3, 15);
    expect(pairedDifference(b, a).error).toBe(pairedDifference(a, b).error);
  });

  test('what is hard for both drops out', () => {
    const identities = Array.from({ length: 40 }, (_, i) => String(i));
    const hard = identities.map((_, i) => (i % 2 === 0 ? 0 : 0.75));
    const better = hard.map((accuracy, i) => accuracy + (i % 4 === 0 ? 0.25 : 0));
    const [a, b] = [results(better, identities), results(hard, identities)];
    const { difference, error } = pairedDifference(a, b);
    expect(difference).toBeCloseTo(0.0625, 15);
    const alone = (rows: readonly RowResult[]) =>
      clusteredMean(
        rows.map(({ accuracy }) => accuracy),
        identities,
      ).error;
    expect(error).toBeLessThan(Math.hypot(alone(a), alone(b)) / 3);
  });

  test('refuses evaluations of other rows', () => {
    const a = results([1, 0], ['p', 'q']);
    expect(() => pairedDifference(a, a.slice(1))).toThrow('the same rows but received 2 rows and 1');
    expect(() => pairedDifference(a, results([1, 0], ['p', 'r']))).toThrow('they differ in row 2');
    expect(() => pairedDifference([], [])).toThrow(/at least one/);
  });
});

describe('evaluate', () => {
  test('counts what the completions came to', async () => {
    const task = await fakeTask();
    const rows = Array.from({ length: 50 }, (_, id) => ({ id }));
    const seen: { text: string; total: number }[] = [];
    const result = await evaluate(new FakePolicy().asPolicy, task, rows, {
      samples: 4,
      maxTokens: 5,
      motivation: 'full',
      batch: 16,
      onGroup: ({ episodes }) => {
        expect(episodes[0]?.prompt.text).toContain('begins with b');
        for (const { completion, reward } of episodes) {
          seen.push({ text: completion.text, total: reward.total });
        }
      },
    });
    expect(seen).toHaveLength(200);
    const right = seen.filter(({ text }) => text.startsWith('b')).length / 200;
    expect(result.accuracy).toBeCloseTo(right, 12);
    expect(result.reward).toBeCloseTo(2 * right - 1, 12);
    expect(result.cases.start).toEqual({
      right: expect.closeTo(right, 12),
      wrong: expect.closeTo(1 - right, 12),
    });
    expect(result.passAt['1']).toBeCloseTo(right, 12);
    expect(result.passAt['2']).toBeGreaterThan(right);
    expect(result.passAt['4']).toBeGreaterThan(result.passAt['2'] as number);
    // Uniform over four letters: a quarter begins with b.
    expect(Math.abs(right - 0.25)).toBeLessThan(0.13);
    expect(result.motivation).toBe('full');
    // Batches draw from streams of their own.
    expect(new Set(seen.slice(0, 16).map((s) => s.text))).not.toEqual(
      new Set(seen.slice(16, 32).map((s) => s.text)),
    );
  });

  test('the same seed gives the same numbers, another seed others', async () => {
    const task = await fakeTask();
    const rows = Array.from({ length: 30 }, (_, id) => ({ id }));
    const run = (seed: number) =>
      evaluate(new FakePolicy().asPolicy, task, rows, { seed, maxTokens: 5 }).then(
        ({ seconds, ...rest }) => rest,
      );
    expect(await run(1)).toEqual(await run(1));
    expect(await run(1)).not.toEqual(await run(2));
  });

  test('rows that the task takes for the same are one cluster of the error', async () => {
    const task = await fakeTask();
    // Rows of one tenth are the same puzzle to this task.
    const tenths: Task<FakeRow> = { ...task, identity: ({ id }) => String(Math.floor(id / 10)) };
    const rows = Array.from({ length: 40 }, (_, id) => ({ id }));
    const seen: RowResult[] = [];
    const run = (of: Task<FakeRow>) =>
      evaluate(new FakePolicy().asPolicy, of, rows, {
        samples: 4,
        maxTokens: 5,
        batch: 32,
        onRow: (result) => seen.push(result),
      });
    const apart = await run(task);
    const together = await run(tenths);
    const [first, second] = [seen.slice(0, 40), seen.slice(40)];
    expect(first.map(({ accuracy }) => accuracy)).toEqual(second.map(({ accuracy }) => accuracy));
    expect(new Set(first.map(({ identity }) => identity)).size).toBe(40);
    expect(second.map(({ identity }) => identity)).toEqual(rows.map(({ id }) => String(Math.floor(id / 10))));

    expect([apart.rows, apart.clusters, together.rows, together.clusters]).toEqual([40, 40, 40, 4]);
    expect(together.accuracy).toBe(apart.accuracy);
    const residuals = first.map(({ accuracy }) => accuracy - apart.accuracy);
    const squares = (values: readonly number[]) => values.reduce((sum, value) => sum + value * value, 0);
    expect(apart.accuracyError).toBeCloseTo(Math.sqrt(squares(residuals) / 39 / 40), 14);
    const sums = [0, 10, 20, 30].map((from) => residuals.slice(from, from + 10).reduce((a, b) => a + b, 0));
    expect(together.accuracyError).toBeCloseTo(Math.sqrt((squares(sums) * 4) / 3) / 40, 14);
    expect(together.accuracyError).not.toBeCloseTo(apart.accuracyError, 4);
  });

  test('refuses an empty data set and an impossible k', async () => {
    const task = await fakeTask();
    const policy = new FakePolicy().asPolicy;
    await expect(evaluate(policy, task, [])).rejects.toMatchObject({ code: 'EMPTY_DATASET' });
    await expect(evaluate(policy, task, [{ id: 1 }], { samples: 2, passAt: [4] })).rejects.toThrow(/k/);
    await expect(evaluate(policy, task, [{ id: 1 }], { samples: 0 })).rejects.toThrow(/samples/);
  });

  test('stops where the signal fires', async () => {
    const task = await fakeTask();
    const policy = new FakePolicy();
    const abort = new AbortController();
    policy.onSample = () => {
      if (policy.sampleCalls.length === 2) abort.abort();
    };
    const rows = Array.from({ length: 30 }, (_, id) => ({ id }));
    const run = evaluate(policy.asPolicy, task, rows, { batch: 8, signal: abort.signal });
    await expect(run).rejects.toMatchObject({ code: 'ABORTED' });
    expect(policy.sampleCalls).toHaveLength(2);
  });
});
