import { readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { expect } from '@jest/globals';
import { readMetrics } from '../../lib/train/metrics.js';

/** Expects weights, states, numbers and completions of two runs of so many steps to be the same to the last bit. */
export function expectSameRun(run: string, unbroken: string, steps: number): void {
  const checkpoint = `step-${String(steps).padStart(6, '0')}`;
  const files = (of: string) =>
    ['model', join('checkpoints', checkpoint, 'policy')].flatMap((part) =>
      readdirSync(join(of, part)).map((name) => join(part, name)),
    );
  const names = files(unbroken);
  expect(files(run)).toEqual(names);
  expect(names.some((name) => name.endsWith('.safetensors'))).toBe(true);
  for (const name of names) {
    const [expected, actual] = [unbroken, run].map((of) => readFileSync(join(of, name))) as [Buffer, Buffer];
    expect({ name, equal: actual.equals(expected) }).toEqual({ name, equal: true });
  }
  const numbers = (of: string) =>
    readMetrics(join(of, 'metrics.jsonl')).map(({ step, reward, loss, ratio, kl, gradientNorm }) => ({
      step,
      reward,
      loss,
      ratio,
      kl,
      gradientNorm,
    }));
  expect(numbers(run)).toEqual(numbers(unbroken));
  const completions = (of: string) =>
    readdirSync(join(of, 'completions')).map((name) => [
      name,
      readFileSync(join(of, 'completions', name), 'utf8'),
    ]);
  expect(completions(run)).toEqual(completions(unbroken));
}
