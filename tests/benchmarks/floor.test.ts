import { expect, test } from '@jest/globals';
import { bestRates, operationsOf, peakRate, secondsOf } from '../../benchmarks/floor.js';
import { grpoSizes, smollm2 } from '../../benchmarks/workloads.js';

test('the operations of the step that is measured', () => {
  const operations = operationsOf(smollm2, grpoSizes);
  // 106,168,320 weights of projections and 28,311,552 of the head.
  expect(operations.generation).toBe(2 * 106_168_320 * 3072 + 2 * 28_311_552 * 2048);
  expect(operations.generation / 1e12).toBeCloseTo(0.768, 3);
  expect(operations.step / 1e12).toBeCloseTo(3.07, 2);
  expect(operations.training).toBe(3 * operations.generation);
});

test('its seconds at a rate', () => {
  const parts = { generation: 1e12, training: 3e12, step: 4e12 };
  expect(secondsOf(parts, 500)).toEqual({ generation: 2, training: 6, step: 8 });
});

test('the rate is the best that was measured over many rows of the type', () => {
  const first = { 'f32/8': 300, 'f32/2048': 100, 'bf16/2048': 40 };
  const second = { 'f32/8': 310, 'f32/2048': 90, 'bf16/2048': 50 };
  const best = bestRates(first, second);
  expect(peakRate(best, 'f32')).toBe(100);
  expect(peakRate(best, 'bf16')).toBe(50);
  expect(peakRate({ 'f32/8': 300 }, 'f32')).toBeUndefined();
  expect(peakRate(undefined, 'f32')).toBeUndefined();
  expect(bestRates(first, undefined)).toBe(first);
});
