import { describe, expect, test } from '@jest/globals';
import { groupAdvantages, openDevice } from '../../lib/kernels/index.js';
import { Random } from '../../lib/tasks/random.js';
import { learningRateAt, type ScheduleKind } from '../../lib/train/schedule.js';

function rates(
  kind: ScheduleKind,
  steps: number,
  options: { warmupSteps?: number; minLearningRate?: number } = {},
) {
  return Array.from({ length: steps }, (_, i) =>
    learningRateAt(i + 1, { kind, learningRate: 1, decaySteps: 8, ...options }),
  );
}

describe('learningRateAt', () => {
  test('constant', () => {
    expect(rates('constant', 3)).toEqual([1, 1, 1]);
    expect(rates('constant', 4, { warmupSteps: 2 })).toEqual([0.5, 1, 1, 1]);
  });

  test('linear falls to the minimum and stays there', () => {
    expect(rates('linear', 10)).toEqual([1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0, 0]);
    expect(rates('linear', 10, { warmupSteps: 4, minLearningRate: 0.2 })).toEqual(
      [0.25, 0.5, 0.75, 1, 1, 0.8, 0.6, 0.4, 0.2, 0.2].map((rate) => expect.closeTo(rate, 12)),
    );
  });

  test('cosine is half way down in the middle', () => {
    const falling = rates('cosine', 9);
    expect(falling[0]).toBe(1);
    expect(falling[4]).toBeCloseTo(0.5, 12);
    expect(falling[8]).toBeCloseTo(0, 12);
    for (let i = 1; i < 9; i++) expect(falling[i]).toBeLessThan(falling[i - 1] as number);
  });

  test('a warm-up longer than the decay ends at the minimum', () => {
    expect(rates('linear', 11, { warmupSteps: 10 }).slice(-2)).toEqual([1, 0]);
  });

  test('an unknown kind is refused', () => {
    expect(() => rates('step' as ScheduleKind, 1)).toThrow(/constant, linear, cosine for schedule/);
  });
});

/** The formulas by themselves: what the kernel is held to. */
function inFloat64(
  groups: readonly (readonly number[])[],
  kind: 'group' | 'batch' | 'leave_one_out',
  scale: boolean,
): number[][] {
  const mean = (values: readonly number[]) => values.reduce((sum, value) => sum + value, 0) / values.length;
  const deviation = (values: readonly number[]) =>
    Math.sqrt(values.reduce((sum, value) => sum + (value - mean(values)) ** 2, 0) / (values.length - 1));
  return groups.map((group) => {
    if (group.length === 1) return [0];
    if (kind === 'leave_one_out') {
      return group.map((reward, i) => reward - mean(group.filter((_, other) => other !== i)));
    }
    const divisor = scale ? deviation(kind === 'batch' ? groups.flat() : group) + 1e-4 : 1;
    return group.map((reward) => (reward - mean(group)) / divisor);
  });
}

describe('groupAdvantages', () => {
  const rewards = [
    [1, 2, 3, 6],
    [0, 0, 0, 0],
  ];
  // Sample standard deviation of the first group, and of all eight.
  const groupDeviation = Math.sqrt((4 + 1 + 0 + 9) / 3);
  const batchDeviation = Math.sqrt((1 + 4 + 9 + 36 - 144 / 8) / 7);

  test('group: mean 0, in units of the deviation', async () => {
    const [first, second] = await groupAdvantages(rewards);
    expect(first).toEqual([-2, -1, 0, 3].map((d) => expect.closeTo(d / (groupDeviation + 1e-4), 6)));
    expect(second).toEqual([0, 0, 0, 0]);
    expect((await groupAdvantages(rewards, { scale: false }))[0]).toEqual([-2, -1, 0, 3]);
  });

  test('batch', async () => {
    const [first] = await groupAdvantages(rewards, { kind: 'batch' });
    expect(first).toEqual([-2, -1, 0, 3].map((d) => expect.closeTo(d / (batchDeviation + 1e-4), 6)));
  });

  test('leave one out: each against the mean of the others', async () => {
    const [first] = await groupAdvantages(rewards, { kind: 'leave_one_out' });
    expect(first).toEqual([1 - 11 / 3, 2 - 10 / 3, 3 - 3, 6 - 2].map((d) => expect.closeTo(d, 6)));
  });

  test('is the same of numbers and of tensors, and agrees with float64', async () => {
    const random = new Random(7);
    const groups = Array.from({ length: 9 }, (_, i) =>
      Array.from({ length: i + 1 }, () => random.uniform() * 6 - 3),
    );
    const offsets = [0];
    for (const group of groups) offsets.push((offsets.at(-1) as number) + group.length);
    const tensor = openDevice('cpu').tensor(Float32Array.from(groups.flat()));
    for (const kind of ['group', 'batch', 'leave_one_out'] as const) {
      for (const scale of [true, false]) {
        const expected = inFloat64(groups, kind, scale).flat();
        const args = { rewards: tensor, groupOffsets: Int32Array.from(offsets), kind, scale };
        const actual = await (await groupAdvantages(args)).read();
        expect(Array.from(actual)).toEqual(expected.map((advantage) => expect.closeTo(advantage, 5)));
        const ofNumbers = await groupAdvantages(groups, { kind, scale });
        expect(ofNumbers.map((group) => group.length)).toEqual(groups.map((group) => group.length));
        expect(ofNumbers.flat()).toEqual(Array.from(actual));
      }
    }
  });

  test('one alone has advantage 0, and none has none', async () => {
    expect(await groupAdvantages([[5]])).toEqual([[0]]);
    expect(await groupAdvantages([[5], [], [1, 3]], { scale: false })).toEqual([[0], [], [-1, 1]]);
    expect(await groupAdvantages([[], []])).toEqual([[], []]);
  });

  test.each([Number.NaN, Number.NEGATIVE_INFINITY, 1e300])(
    'a reward of %d is refused by name',
    async (bad) => {
      await expect(groupAdvantages([[1], [2, bad]])).rejects.toMatchObject({
        code: 'INVALID_ARGUMENT',
        message: expect.stringMatching(/a finite number for rewards\[1\]\[1\]/),
      });
    },
  );
});
