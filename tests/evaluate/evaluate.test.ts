import { describe, expect, test } from '@jest/globals';
import { evaluate, passAtK } from '../../lib/evaluate/index.js';
import { FakePolicy } from '../train/fake-policy.js';
import { fakeTask } from '../train/fake-task.js';

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
