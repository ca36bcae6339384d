import { expect, test } from '@jest/globals';
import { profileText } from '../../benchmarks/profile.js';
import { pointsOf, scalingMarkdown, scalingPlot } from '../../benchmarks/scaling.js';

const machine = {
  date: '2026-01-02',
  processor: 'Processor 9000',
  isa: 'AVX2',
  threads: 6,
  memoryBytes: 16 * 2 ** 30,
  versions: { merf: '1.2.3' },
};

const points = pointsOf(6).map((point) => ({
  ...point,
  runs: [{ generation: 1, training: 3, step: 4, tokens: 64 }],
}));

test('threads are doubled up to all that there are', () => {
  const of = (threads: number) =>
    pointsOf(threads).flatMap(({ series, x, threads: count }) => (series === 'threads' ? [[x, count]] : []));
  expect(of(6)).toEqual([
    [1, 1],
    [2, 2],
    [4, 4],
    [6, 6],
  ]);
  expect(of(1)).toEqual([[1, 1]]);
});

test('the cost of a group is that of one of its completions', () => {
  const text = scalingMarkdown(machine, 'SmolLM2-135M', 'f32', points);
  expect(text).toContain('| 8 | 0.125 | 0.375 | 0.5 | 1 |');
  expect(text).toContain('| 2048 | 1 | 3 | 4 | 1 |');
});

test('is drawn', async () => {
  const plot = await scalingPlot(points, 'title');
  expect(plot).toMatch(/^<svg/);
  expect(plot).toContain('completions of a prompt');
});

test('a profile adds up', () => {
  const operators = [
    { name: 'linear 8x4', calls: 3, seconds: 1.5, operations: 3e9, bytes: 0 },
    { name: 'copy', calls: 10, seconds: 0.25, operations: 0, bytes: 1e9 },
  ];
  expect(profileText([{ name: 'rollout', seconds: 2, operators }])).toBe(
    [
      'rollout, 2.000 s (100.0% of the step)',
      '                   calls  seconds         rate  share',
      'linear 8x4             3    1.500  2.0 GFLOP/s  75.0%',
      'copy                  10    0.250     4.0 GB/s  12.5%',
      'sum of operators      13    1.750  1.7 GFLOP/s  87.5%',
      'outside operators           0.250               12.5%',
      '',
    ].join('\n'),
  );
});
