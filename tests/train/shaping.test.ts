import { describe, expect, test } from '@jest/globals';
import type { Episode, EpisodeGroup } from '../../lib/rollout/index.js';
import { judgementOf } from '../../lib/train/advantages.js';
import { normalizeThenSum } from '../../lib/train/components.js';
import { importanceWeights } from '../../lib/train/importance.js';
import { overlongPunishment } from '../../lib/train/overlong.js';
import { grpoSchema } from '../../lib/train/settings.js';
import { readJson } from '../support/fixtures.js';
import { FakePolicy } from './fake-policy.js';
import { byPrompt, FakeRuns } from './fake-run.js';
import { fakeTask } from './fake-task.js';

interface Shaping {
  overlong: { maximum: number; buffer: number; lengths: number[]; expected: number[] }[];
  normalize_then_sum: { scores: number[][][]; expected: number[][] };
  importance: {
    trained: number[][];
    sampler: (number | null)[][];
    weights: { mode: string; low: number | null; high: number; expected: number[][] }[];
  };
}

const oracle = readJson<Shaping>('shaping.json');
const runs = new FakeRuns();
const settings = grpoSchema.parse({});

/** An episode of turns of the model with so many tokens each, and scores by component. */
function episode(lengths: readonly number[], scores: readonly number[]): Episode {
  const parts = Object.fromEntries(scores.map((score, i) => [`part ${i}`, { case: 'any', score }]));
  return {
    turns: lengths.map((length) => ({ role: 'model', tokens: new Int32Array(length) })),
    reward: { total: scores.reduce((sum, score) => sum + score, 0), parts },
  } as unknown as Episode;
}

function groupsOf(scores: readonly (readonly (readonly number[])[])[], length = 1): EpisodeGroup[] {
  return scores.map((group) => ({ row: undefined, episodes: group.map((ones) => episode([length], ones)) }));
}

describe('overlong punishment', () => {
  test('is that of TRL', () => {
    for (const { maximum, buffer, lengths, expected } of oracle.overlong) {
      const limits = { maxTokens: maximum, overlongBuffer: buffer, overlongPenalty: 1 };
      expect(lengths.map((length) => overlongPunishment(episode([length], [0]), limits))).toEqual(
        expected.map((value) => expect.closeTo(value, 12)),
      );
      const half = { ...limits, overlongPenalty: 0.5 };
      expect(overlongPunishment(episode([maximum], [0]), half)).toBe(-0.5);
    }
    const limits = { maxTokens: 8, overlongBuffer: 4, overlongPenalty: 1 };
    expect(overlongPunishment(episode([3, 6, 2], [0]), limits)).toBe(-0.5);
    expect(overlongPunishment(episode([8], [0]), { ...limits, overlongBuffer: 0 })).toBe(0);
  });

  test('shapes what advantages are made of, and leaves the records and the reward curve as they are', async () => {
    const task = await fakeTask({ verify: () => 'wrong' });
    const policy = new FakePolicy();
    await runs.trainer(policy, { task, steps: 1, overlongBuffer: 4, overlongPenalty: 2 }).run();
    const records = runs.records(1);
    const punished = records.map(({ tokens }) => (tokens > 2 ? (-(tokens - 2) / 4) * 2 : 0));
    const [row] = runs.metrics();
    expect(row?.reward).toBe(-1);
    expect(row?.overlong).toBeCloseTo(punished.reduce((sum, value) => sum + value, 0) / records.length, 12);
    expect(records.every(({ reward }) => reward === -1)).toBe(true);
    for (let prompt = 0; prompt < 4; prompt++) {
      const group = records.flatMap((r, i) => (r.promptIndex === prompt ? [punished[i] as number] : []));
      const mean = group.reduce((sum, value) => sum + value, 0) / group.length;
      const deviation = Math.sqrt(group.reduce((sum, value) => sum + (value - mean) ** 2, 0) / 3);
      const expected = group.map((value) => expect.closeTo((value - mean) / (deviation + 1e-4), 5));
      expect(byPrompt(records)[prompt]?.map(({ advantage }) => advantage)).toEqual(expected);
    }
    expect(() => runs.trainer(policy, { task, overlongBuffer: 7 })).toThrow(
      /overlongBuffer to be at most maxTokens = 6/,
    );
  });
});

describe('advantages of components', () => {
  const { scores, expected } = oracle.normalize_then_sum;

  test('are those of TRL, and exactly 0 in a group that is alike', async () => {
    const advantages = normalizeThenSum(scores);
    expect(advantages).toEqual(expected.map((group) => group.map((value) => expect.closeTo(value, 6))));
    expect(advantages[1]).toEqual([0, 0, 0, 0, 0]);
    const judged = await judgementOf(groupsOf(scores), {
      ...settings,
      multiObjectiveAggregation: 'normalize_then_sum',
    });
    expect(judged.advantages).toEqual(advantages);
    expect(judged.rewards[0]?.[0]).toBeCloseTo(
      scores[0]?.[0]?.reduce((sum, one) => sum + one, 0) as number,
      12,
    );
  });

  test('tell apart episodes of the same total, and have the punishment as one component more', async () => {
    const gdpo = { ...settings, multiObjectiveAggregation: 'normalize_then_sum' as const };
    const groups = groupsOf([
      [
        [3, 0, 0],
        [0, 2, 1],
        [0, 1, 2],
        [1, 1, 1],
      ],
    ]);
    const { advantages: summed } = await judgementOf(groups, settings);
    expect(summed).toEqual([[0, 0, 0, 0]]);
    const { advantages: apart } = await judgementOf(groups, gdpo);
    expect(Math.max(...(apart[0] as number[]))).toBeGreaterThan(0.5);

    const short = { row: undefined, episodes: [episode([2], [1]), episode([8], [1]), episode([4], [1])] };
    const limits = { ...gdpo, maxTokens: 8, overlongBuffer: 4 };
    const { advantages } = await judgementOf([short], limits);
    const punishments = [[[0], [-1], [0]]];
    expect(advantages).toEqual(normalizeThenSum(punishments));
    expect((await judgementOf([short], gdpo)).advantages).toEqual([[0, 0, 0]]);
  });

  test('train through the trainer', async () => {
    const task = await fakeTask();
    await runs
      .trainer(new FakePolicy(), { task, steps: 2, multiObjectiveAggregation: 'normalize_then_sum' })
      .run();
    const records = runs.records(2);
    const groups = byPrompt(records);
    const scores = groups.map((group) => group.map((r) => [r.parts.start?.score as number]));
    expect(groups.map((group) => group.map(({ advantage }) => advantage))).toEqual(normalizeThenSum(scores));
  });
});

describe('clipped and weighted advantages', () => {
  test('stay within the bound', async () => {
    const groups = groupsOf([[[1], [0], [0], [0], [0], [0], [0], [0]]]);
    const plain = (await judgementOf(groups, settings)).advantages[0] as number[];
    expect(plain[0]).toBeGreaterThan(2);
    const clipped = (await judgementOf(groups, { ...settings, clipAdvantages: 2 })).advantages[0] as number[];
    expect(clipped[0]).toBe(2);
    expect(clipped.slice(1)).toEqual(plain.slice(1));
    const low = (await judgementOf(groups, { ...settings, clipAdvantages: 0.25 })).advantages[0] as number[];
    expect(low).toEqual([0.25, ...new Array(7).fill(-0.25)]);
    const weighted = await judgementOf(groups, { ...settings, clipAdvantages: 2 }, [0.5]);
    expect(weighted.advantages[0]).toEqual(plain.map((advantage) => advantage * 0.5));
  });
});

describe('importance weights', () => {
  const { trained, sampler, weights } = oracle.importance;

  test.each(weights)('are those of TRL: $mode within [$low, $high]', ({ mode, low, high, expected }) => {
    const [level, kind] = mode.split('_') as ['token' | 'sequence', 'truncate' | 'mask'];
    trained.forEach((logprobs, i) => {
      const drawn = (sampler[i] as (number | null)[]).map((value) => value ?? Number.NaN);
      const options = { level, mode: kind, cap: high, ...(low !== null && { floor: low }) };
      expect(Array.from(importanceWeights(logprobs, drawn, options))).toEqual(
        (expected[i] as number[]).map((value) => expect.closeTo(value, 6)),
      );
    });
  });

  test('leave masked tokens out of the ratio of a sequence', () => {
    const options = { level: 'sequence', mask: [1, 0, 1], cap: 10 } as const;
    const all = importanceWeights([-1, -9, -1], [-1.5, -1, -1.25], options);
    expect(Array.from(all)).toEqual(new Array(3).fill(expect.closeTo(Math.exp(0.75), 6)));
  });

  test('say what is wrong', () => {
    expect(() => importanceWeights([0, 0], [0])).toThrow(/2 values.* for sampler/);
    expect(() => importanceWeights([0], [0], { mask: [] })).toThrow(/1 values.* for mask/);
    expect(() => importanceWeights([0], [0], { cap: 0 })).toThrow(/cap/);
    expect(() => importanceWeights([0], [0], { floor: -1 })).toThrow(/floor/);
    expect(() => importanceWeights([0], [0], { floor: 2, cap: 1 })).toThrow(/cap/);
    expect(() => importanceWeights([0], [0], { level: 'word' as 'token' })).toThrow(/level/);
    expect(() => importanceWeights([0], [0], { mode: 'clip' as 'mask' })).toThrow(/mode/);
  });
});
