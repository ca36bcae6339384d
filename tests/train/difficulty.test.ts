import { describe, expect, test } from '@jest/globals';
import type { EpisodeGroup } from '../../lib/rollout/index.js';
import { Difficulty, type DifficultySettings } from '../../lib/train/difficulty.js';
import { grpoSchema } from '../../lib/train/settings.js';
import { FakePolicy } from './fake-policy.js';
import { byPrompt, FakeRuns } from './fake-run.js';
import { type FakeRow, fakeTask } from './fake-task.js';

const runs = new FakeRuns();
const task = await fakeTask({ rows: 400 });

function difficulty(settings: Partial<DifficultySettings>): Difficulty<FakeRow> {
  return new Difficulty(task, { ...grpoSchema.parse({}), ...settings });
}

/** A group of four of which so many are right. */
function visit(id: number, right: number): EpisodeGroup<FakeRow> {
  const episodes = Array.from({ length: 4 }, (_, i) => {
    const total = i < right ? 1 : -1;
    return { reward: { total, parts: { start: { case: i < right ? 'right' : 'wrong', score: total } } } };
  });
  return { row: { id }, episodes } as unknown as EpisodeGroup<FakeRow>;
}

const silent = [[0, 0, 0, 0]];
const loud = [[1, -1, 0, 0]];

describe('skip', () => {
  test('the chance falls with every visit without a signal, to the floor, and comes back with one', () => {
    const known = difficulty({ difficulty: 'skip', difficultyExplore: 0.5, difficultyFloor: 0.1 });
    const chances = [4, 0, 4, 4].map((right) => {
      known.note([visit(1, right)], silent);
      return known.chance({ id: 1 });
    });
    expect(chances).toEqual([0.5, 0.25, 0.125, 0.1]);
    expect(known.chance({ id: 2 })).toBe(1);
    known.note([visit(1, 2)], loud);
    expect(known.chance({ id: 1 })).toBe(1);
  });

  test('rows are drawn as often as their chance says, each position always alike', () => {
    const known = difficulty({ difficulty: 'skip', difficultyExplore: 0.25, seed: 3 });
    known.note([visit(1, 4)], silent);
    const drawn = Array.from({ length: 4000 }, (_, position) => known.draws({ id: 1 }, position));
    expect(drawn.filter(Boolean).length / 4000).toBeCloseTo(0.25, 1);
    expect(Array.from({ length: 4000 }, (_, position) => known.draws({ id: 1 }, position))).toEqual(drawn);
    expect(known.draws({ id: 2 }, 0)).toBe(true);
  });
});

describe('prioritize', () => {
  test('a row is drawn in proportion to how often it fails, at least as often as the floor says', () => {
    const known = difficulty({ difficulty: 'prioritize', difficultyDecay: 0.5, difficultyFloor: 0.1 });
    known.note([visit(1, 4), visit(2, 1), visit(3, 0)], [...silent, ...loud, ...silent]);
    expect([1, 2, 3].map((id) => known.chance({ id }))).toEqual([0.1, 0.75, 1]);
    known.note([visit(1, 2), visit(2, 3)], [...loud, ...loud]);
    expect([1, 2].map((id) => known.chance({ id }))).toEqual([0.25, 0.5]);
  });
});

describe('weight', () => {
  test('advantages are multiplied by a power of the failure rate, this visit counted', () => {
    const known = difficulty({ difficulty: 'weight', difficultyDecay: 0.5, difficultyFocus: 2 });
    expect(known.weights([visit(1, 2), visit(2, 1)])).toEqual([0.25, 0.5625]);
    known.note([visit(1, 2)], loud);
    expect(known.weights([visit(1, 4)])).toEqual([0.0625]);
    expect(known.chance({ id: 1 })).toBe(1);
    expect(difficulty({ difficulty: 'skip' }).weights([visit(1, 2)])).toBeUndefined();
  });

  test('reaches what is learned', async () => {
    await runs.trainer(new FakePolicy(), { task, steps: 1, out: 'plain' }).run();
    await runs.trainer(new FakePolicy(), { task, steps: 1, difficulty: 'weight' }).run();
    const plain = byPrompt(runs.records(1, 'plain'));
    for (const [i, group] of byPrompt(runs.records(1)).entries()) {
      const right = group.filter(({ reward }) => reward === 1).length / group.length;
      const expected = plain[i]?.map(({ advantage }) => advantage * (1 - right));
      expect(group.map(({ advantage }) => advantage)).toEqual(
        expected?.map((value) => expect.closeTo(value, 10)),
      );
    }
  });
});

describe('a run', () => {
  test('passes rows over that taught nothing, and counts them', async () => {
    // Ten rows come round every two and a half steps, and half of them can't be got right.
    const hard = await fakeTask({
      rows: 10,
      verify: (text, { id }) => (id >= 5 && text.startsWith('b') ? 'right' : 'wrong'),
    });
    const options = { task: hard, steps: 30, learningRate: 0.01, rows: rowsOf(10) };
    await runs.trainer(new FakePolicy(), { ...options, out: 'plain' }).run();
    await runs
      .trainer(new FakePolicy(), {
        ...options,
        difficulty: 'skip',
        difficultyExplore: 0.2,
        difficultyFloor: 0.05,
      })
      .run();
    const uniform = (run: string) =>
      runs
        .metrics(run)
        .slice(5)
        .reduce((sum, { uniformGroups }) => sum + uniformGroups, 0) / 25;
    expect(uniform('run')).toBeLessThan(uniform('plain') - 0.15);
    expect(runs.metrics().some(({ rowsSkipped }) => (rowsSkipped as number) > 0)).toBe(true);
    expect(runs.metrics('plain')[0]).not.toHaveProperty('rowsSkipped');
    // What can't be got right is still tried.
    const late = runs
      .metrics()
      .slice(5)
      .flatMap(({ step }) => runs.records(step));
    expect(late.some(({ prompt }) => /Number [0-4]\n/.test(prompt))).toBe(true);
  });

  test.each(['skip', 'prioritize', 'weight'] as const)('resumes exactly with %s', async (kind) => {
    const few = await fakeTask({
      verify: (text, { id }) => (id % 2 === 0 && text.startsWith('b') ? 'right' : 'wrong'),
    });
    await runs.expectExactResume({ task: few, rows: rowsOf(6), difficulty: kind, dynamicSampling: 2 });
    const skipped = runs.metrics('broken').reduce((sum, row) => sum + (row.rowsSkipped as number), 0);
    if (kind !== 'weight') expect(skipped).toBeGreaterThan(0);
  });
});

function rowsOf(count: number): FakeRow[] {
  return Array.from({ length: count }, (_, id) => ({ id }));
}
