import { expect, test } from '@jest/globals';
import { task as factory } from '../../examples/own-task.js';
import { parseCompletion } from '../../lib/reward/completion.js';

test('the example of a task of one’s own says its rules and judges by them', async () => {
  const task = await factory.open();
  const row = task.rows({ split: 'train', seed: 1 }).at(0);
  const [system, user] = task.messages(row, 'full');
  expect(system?.content).toMatch(/\+2 points if .* is the sum\.\n0 points if .*\n-1 point if/);
  expect(system?.content).toContain('from 0 to +1 points: the shorter the response, the more');
  expect(user?.content).toBe(`What is ${row.a} + ${row.b}?`);
  const score = (raw: string) => task.spec.judge(parseCompletion({ raw }), row);
  const shown = await score(task.demonstrate?.(row) as string);
  expect(shown.parts.correctness).toEqual({ case: 'right', score: 2 });
  expect((await score(`<answer>${row.a + row.b + 1}</answer>`)).parts.correctness?.case).toBe('wrong');
  expect(await score('x'.repeat(500))).toMatchObject({ total: -1 });
  expect((await score('')).parts.brevity?.score).toBe(1);
});
