import { describe, expect, test } from '@jest/globals';
import { figuresOf, goalsOf, markdown, median, type Report, type Steps } from '../../benchmarks/report.js';

const run = (generation: number, training: number) => ({
  generation,
  training,
  step: generation + training,
  tokens: 2048,
});

const steps: Steps = {
  dtype: 'f32',
  floor: { generation: 8, training: 24, step: 32 },
  engines: [
    {
      name: 'merf',
      versions: {},
      runs: [run(11, 29), { ...run(10, 28), gap: 2e-6 }, run(10, 30)],
      peakBytes: 2.5e9,
    },
    { name: 'trl', versions: { TRL: '1.0' }, runs: [run(100, 300)], peakBytes: 10e9 },
    { name: 'llama.cpp', versions: {}, runs: [{ generation: 50, tokens: 2048 }] },
    {
      name: 'pytorch',
      versions: {},
      runs: [],
      error: 'pytorch failed, it ended with exit code 1: no memory',
    },
  ],
  motivation: [run(11, 31)],
  keeping: [
    { name: 'merf, keeping some', versions: {}, runs: [{ ...run(11, 20), gap: 0 }], peakBytes: 4e9 },
    { name: 'merf, keeping all', versions: {}, runs: [], error: 'no memory' },
  ],
};

const report: Report = {
  date: '2026-01-02',
  processor: 'Processor 9000',
  isa: 'AVX2',
  threads: 2,
  memoryBytes: 16 * 2 ** 30,
  versions: { merf: '1.2.3' },
  matrixRate: { 'f32/2048': 96 },
  workload: { model: 'SmolLM2-135M', prompts: 4, promptTokens: 256, group: 8, completionTokens: 64 },
  steps: [steps],
  operators: [
    { case: 'loss', engine: 'merf', dtype: 'f32', metrics: { ms: 200, memory_mib: 90 } },
    { case: 'loss', engine: 'PyTorch, eager', dtype: 'f32', metrics: { ms: 500 } },
    { case: 'loss', engine: 'PyTorch, torch.compile', dtype: 'f32', metrics: { ms: 300 } },
    { case: 'loss', engine: 'PyTorch, eager', dtype: 'bf16', metrics: { ms: 1 } },
    { case: 'sampling', engine: 'merf', dtype: 'f32', metrics: { ms: 20 } },
  ],
};

test('medians', () => {
  expect(median([3, 1, 2])).toBe(2);
  expect(median([4, 1, 2, 3])).toBe(2.5);
  expect(figuresOf([])).toBeUndefined();
  expect(figuresOf([{ generation: 4, tokens: 8 }])).toEqual({ generation: 4, tokensPerSecond: 2 });
  expect(figuresOf(steps.engines[0]?.runs ?? [])).toEqual({
    generation: 10,
    training: 29,
    step: 40,
    tokensPerSecond: 204.8,
  });
});

describe('goals', () => {
  const of = (changes: Partial<Steps> = {}) =>
    Object.fromEntries(goalsOf({ ...steps, ...changes }).map(({ what, value }) => [what, value]));

  test('are ratios of medians', () => {
    expect(of()).toEqual({
      'a step, in floors': 1.25,
      'a step, keeping some, in floors': 31 / 32,
      'generation, in its part of the floor': 1.25,
      "generated tokens/s, in llama.cpp's": 5,
      'peak memory': 2.5,
      'a step with a motivation of 200 tokens, in steps without': 1.05,
    });
  });

  test('are left out where there is nothing to say', () => {
    expect(of({ engines: [] })).toEqual({});
    expect(Object.keys(of({ dtype: 'bf16', floor: undefined, engines: steps.engines.slice(0, 2) }))).toEqual([
      'peak memory',
      'a step with a motivation of 200 tokens, in steps without',
    ]);
  });
});

describe('the table', () => {
  const text = markdown(report);

  test('names machine and versions', () => {
    expect(text).toMatch(
      /^# Processor 9000\n\n2026-01-02; 2 threads, AVX2, 16 GiB of memory\. merf 1\.2\.3\.\n/,
    );
  });

  test('has medians and ratios of every engine, and why one has none', () => {
    expect(text).toContain('| merf | 40 | 10 | 29 | 205 | 2.5 |  |  |  | 3 |');
    expect(text).toContain('| merf, 200 common tokens in front | 42 | 11 | 31 | 186 |  |  |  |  | 1 |');
    expect(text).toContain('| merf, keeping some | 31 | 11 | 20 | 186 | 4 |  |  |  | 1 |\n| trl |');
    expect(text).toContain('where it trained on it, in nats: 0.0000020.');
    expect(text).toContain('| trl | 400 | 100 | 300 | 20.5 | 10 | 10 | 10 | 4 | 1 |');
    expect(text).toContain('| llama.cpp |  | 50 |  | 41 |  |  | 5 |  | 1 |');
    expect(text).toMatch(/\| pytorch \|.*\| pytorch failed, .* no memory \|/);
    expect(text).toContain('| the floor, at 96 GFLOP/s | 32 | 8 | 24 |  |  | 0.8 |  |  |  |');
  });

  test('says of each goal whether it is met', () => {
    expect(text).toContain('| a step, in floors | 1.25x | at most 1.3x | met |');
    expect(text).toContain("| generated tokens/s, in llama.cpp's | 5x | at least 10x | missed |");
  });

  test('sets operators beside the fastest peer of their type', () => {
    expect(text).toContain('| loss | f32 | 200 | 300 | 1.5 | torch.compile |');
    expect(text).toContain('| sampling | f32 | 20 |  |  |  |');
  });
});
