import { expect, test } from '@jest/globals';
import { z } from 'zod';
import { openTask, openTaskWith } from '../../lib/cli/task.js';
import { RewardSpec } from '../../lib/reward/index.js';
import { defineTask } from '../../lib/tasks/index.js';

const sums = defineTask({
  name: 'sums',
  options: {
    largest: z.int().default(9).meta({ description: 'largest number' }),
    signs: z.boolean().default(false).meta({ description: 'negative numbers too' }),
    words: z.string().default('plain').meta({ description: 'which words' }),
  },
  create: ({ largest }) => ({
    spec: new RewardSpec({
      name: 'sums',
      components: [
        {
          name: 'answer',
          cases: [{ name: 'any', score: 1, sentence: 'always' }],
          verify: () => 'any',
        },
      ],
    }),
    data: (random) => ({ a: random.below(largest) }),
    messages: ({ a }) => [{ role: 'user' as const, content: `${a}` }],
  }),
});

test('a task is opened with options changed, their values read as on the command line', async () => {
  const settings = { task: sums as never, words: 'long', seed: 3 };
  expect((await openTaskWith(settings, { largest: '20' })).options).toEqual({
    largest: 20,
    signs: false,
    words: 'long',
  });
  const changed = await openTaskWith(settings, { signs: 'true', words: '7' });
  expect(changed.options).toEqual({ largest: 9, signs: true, words: '7' });
  const puzzles = await openTaskWith({ task: 'knights-and-knaves', people: 2 }, { people: '3-4' });
  expect(puzzles.options.people).toEqual([3, 4]);
});

test('what the task does not have is named', async () => {
  await expect(openTaskWith({ task: sums as never }, { larges: '20' })).rejects.toMatchObject({
    code: 'INVALID_CONFIG',
    message: expect.stringMatching(/task sums: unknown key "larges"; did you mean "largest"\?/),
  });
  await expect(openTaskWith({ task: sums as never }, { largest: 'many' })).rejects.toThrow(/largest/);
  await expect(openTaskWith({}, { largest: '3' })).rejects.toThrow(/--task/);
  const opened = await openTask({ task: sums as never });
  await expect(openTaskWith({ task: opened }, { largest: '3' })).rejects.toThrow(/not open yet/);
});
