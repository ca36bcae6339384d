import { readFileSync } from 'node:fs';
import { expect, test } from '@jest/globals';
import { task as factory } from '../../examples/own-task.js';
import { parseCompletion } from '../../lib/reward/completion.js';

test('the example of a task of one’s own says its rules and judges by them', async () => {
  const task = await factory.open({ largest: 9 });
  const row = task.rows({ split: 'train', seed: 1 }).at(0);
  const [system, user] = task.messages(row, 'full');
  expect(system?.content).toMatch(/\+2 points if .* is the sum\.\n0 points otherwise/);
  expect(user?.content).toBe(`What is ${row.a} + ${row.b}?`);
  const judge = (raw: string) => task.spec.judge(parseCompletion({ raw }), row);
  const shown = await judge(task.reference?.(row) as string);
  expect(shown).toEqual({ total: 2, parts: { correctness: { case: 'right', score: 2 } } });
  for (const raw of [`<answer>${row.a + row.b + 1}</answer>`, `${row.a + row.b}`, '']) {
    expect((await judge(raw)).total).toBe(0);
  }
});

test('its option is checked, and shapes its rows', async () => {
  const { rows } = await factory.open({ largest: 3 });
  const drawn = Array.from({ length: 100 }, (_, i) => rows({ split: 'train', seed: 0 }).at(i));
  expect(new Set(drawn.map(({ a }) => a))).toEqual(new Set([0, 1, 2, 3]));
  await expect(factory.open({ largest: 0 })).rejects.toMatchObject({
    code: 'INVALID_ARGUMENT',
    message: expect.stringContaining('largest: '),
  });
});

test('it is under 30 lines', () => {
  const text = readFileSync(new URL('../../examples/own-task.ts', import.meta.url), 'utf8');
  expect(text.trimEnd().split('\n').length).toBeLessThan(30);
});
