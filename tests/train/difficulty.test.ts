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

  test('a row that is right under a hint alone is as hard as it was without', () => {
    const known = difficulty({ difficulty: 'prioritize', difficultyFloor: 0.1 });
    known.note([{ ...visit(1, 4), failed: visit(1, 0).episodes }], silent);
    expect(known.chance({ id: 1 })).toBe(1);
  });
});

test('a row that needed a hint counts by what was drawn without', () => {
  const known = difficulty({ difficulty: 'prioritize' });
  const hinted = { ...visit(1, 4), failed: visit(1, 0).episodes };
  known.note([hinted, visit(2, 4)], [...loud, ...silent]);
  expect([1, 2].map((id) => known.chance({ id }))).toEqual([1, 0.1]);
  expect(difficulty({ difficulty: 'weight' }).weights([hinted])).toEqual([1]);
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
    await runs
      .trainer(new FakePolicy(), {
        task: hard,
        rows: rowsOf(10),
        steps: 12,
        learningRate: 0.01,
        difficulty: 'skip',
        difficultyExplore: 0.2,
        difficultyFloor: 0.05,
      })
      .run();
    const late = runs.metrics().slice(3);
    const ids = late.flatMap(({ step }) =>
      byPrompt(runs.records(step)).map(([first]) => Number(/Number (\d+)/.exec(first?.prompt ?? '')?.[1])),
    );
    const hopeless = ids.filter((id) => id < 5).length / ids.length;
    // Half of the rows are hopeless, and they are still tried.
    expect(hopeless).toBeLessThan(0.35);
    expect(hopeless).toBeGreaterThan(0);
    expect(late.reduce((sum, { rowsSkipped }) => sum + (rowsSkipped as number), 0)).toBeGreaterThan(10);
    await runs.trainer(new FakePolicy(), { task: hard, steps: 1, out: 'plain' }).run();
    expect(runs.metrics('plain')[0]).not.toHaveProperty('rowsSkipped');
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
