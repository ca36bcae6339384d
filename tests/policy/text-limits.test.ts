import { expect, test } from '@jest/globals';
import { TookTooLong, within } from '../../lib/policy/text-limits.js';

const waitWithoutWorking = (milliseconds: number) =>
  Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, milliseconds);

test('work that ran out of time while others had the processor is run anew', () => {
  let runs = 0;
  const result = within(200, () => {
    runs += 1;
    if (runs < 3) waitWithoutWorking(60_000);
    return 'done';
  });
  expect({ result, runs }).toEqual({ result: 'done', runs: 3 });
});

test('work that takes its time itself, or never gets any, is ended', () => {
  const forEver = () => {
    for (;;);
  };
  expect(() => within(200, forEver)).toThrow(TookTooLong);
  let runs = 0;
  expect(() =>
    within(100, () => {
      runs += 1;
      waitWithoutWorking(60_000);
    }),
  ).toThrow('it took longer than 100 ms');
  expect(runs).toBe(8);
});
