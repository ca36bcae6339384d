import { describe, expect, test } from '@jest/globals';
import { MerfError } from '../../lib/errors.js';
import type { Task } from '../../lib/tasks/index.js';
import { parseCurriculum } from '../../lib/train/curriculum.js';
import { FakePolicy } from './fake-policy.js';
import { FakeRuns } from './fake-run.js';
import { type FakeRow, fakeTask } from './fake-task.js';

const runs = new FakeRuns();

describe('the words of a curriculum', () => {
  test('name steps, or leave them to success', () => {
    expect(parseCurriculum('people=2@0,3@50,2-5@100')).toEqual({
      option: 'people',
      stages: [
        { value: '2', step: 0 },
        { value: '3', step: 50 },
        { value: '2-5', step: 100 },
      ],
    });
    expect(parseCurriculum('people=2@0, 2,4@50')).toEqual({
      option: 'people',
      stages: [
        { value: '2', step: 0 },
        { value: '2,4', step: 50 },
      ],
    });
    expect(parseCurriculum('people=2, 3,2-5')).toEqual({
      option: 'people',
      stages: [{ value: '2' }, { value: '3' }, { value: '2-5' }],
    });
  });

  test.each([
    'people',
    '=2',
    'people=',
    'people=2',
    'people=2,',
    'people=2@1,3@5',
    'people=2@0,3@0',
    'people=2@0,3@x',
    'people=2@0,3',
  ])('%s is none', (text) => {
    expect(() => parseCurriculum(text)).toThrow(MerfError);
    expect(() => parseCurriculum(text)).toThrow(/for curriculum but received/);
  });
});

/** The task whose right completions begin with one letter. */
function beginningWith(letter: string): Promise<Task<FakeRow>> {
  return fakeTask({
    rows: letter === 'b' ? 40 : 30,
    verify: (text) => (text.startsWith(letter) ? 'right' : 'wrong'),
  });
}

describe('a run', () => {
  test('changes to the next value at its step, with rows of its own', async () => {
    const opened: object[] = [];
    await runs
      .trainer(new FakePolicy(), {
        task: await beginningWith('c'),
        curriculum: 'letter=a@0,b@2,a@4',
        openTask: (options) => {
          opened.push(options);
          return beginningWith(options.letter as string);
        },
        evaluateEvery: 6,
        evaluatePrompts: 4,
      })
      .run();
    expect(opened).toEqual([{ letter: 'a' }, { letter: 'b' }, { letter: 'a' }]);
    const rows = runs.metrics().filter(({ step }) => step > 0);
    const letters = ['a', 'a', 'b', 'b', 'a', 'a'];
    expect(rows.map(({ curriculum }) => curriculum)).toEqual(letters.map((letter) => `letter=${letter}`));
    for (const [i, { step }] of rows.entries()) {
      for (const { text, reward } of runs.records(step)) {
        expect(reward).toBe(text.startsWith(letters[i] as string) ? 1 : -1);
      }
    }
    // The third stage is one of its own, which begins with its first rows.
    expect(prompts(5)).toEqual(prompts(1));
    expect(prompts(2)).not.toEqual(prompts(1));
    // Evaluations stay on the task that was given.
    expect(runs.metrics().at(-1)?.evaluation?.none?.accuracy).toBeLessThan(0.9);
  });

  test('changes with success', async () => {
    const policy = new FakePolicy();
    policy.logits = [9, 0, 0, 0];
    await runs
      .trainer(policy, {
        task: await beginningWith('a'),
        curriculum: 'letter=a,b,c',
        curriculumCorrect: 0.9,
        curriculumWindow: 2,
        openTask: ({ letter }) => beginningWith(letter as string),
      })
      .run();
    const stages = runs.metrics().map(({ curriculum }) => curriculum);
    expect(stages).toEqual(['letter=a', 'letter=a', ...new Array(4).fill('letter=b')]);
  });

  test.each(['letter=a@0,b@2,c@5', 'letter=a,b,c'])('resumes exactly with %s', async (curriculum) => {
    await runs.expectExactResume({
      task: await beginningWith('a'),
      curriculum,
      curriculumCorrect: 0.1,
      curriculumWindow: 2,
      openTask: ({ letter }) => beginningWith(letter as string),
      difficulty: 'skip',
      replay: 4,
      dynamicSampling: 2,
    });
    expect(new Set(runs.metrics('broken').map((row) => row.curriculum)).size).toBe(3);
  });

  test('asks for what it needs', async () => {
    const task = await beginningWith('a');
    const openTask = ({ letter }: Readonly<Record<string, string>>) => beginningWith(letter as string);
    const make = (options: object) => () => runs.trainer(new FakePolicy(), { task, ...options });
    expect(make({ curriculum: 'letter=a,b' })).toThrow(/openTask/);
    expect(make({ curriculum: 'letter', openTask })).toThrow(/curriculum/);
    expect(make({ curriculum: 'letter=a,b', openTask, rows: [{ id: 1 }] })).toThrow(/rows/);
    const failing = runs.trainer(new FakePolicy(), {
      task,
      curriculum: 'letter=a,z',
      openTask: async ({ letter }) => {
        if (letter === 'z') throw new MerfError('INVALID_ARGUMENT', 'no such letter');
        return beginningWith(letter as string);
      },
    });
    await expect(failing.run()).rejects.toThrow('no such letter');
  });
});

function prompts(step: number): string[] {
  return [...new Set(runs.records(step).map(({ prompt }) => prompt))];
}
