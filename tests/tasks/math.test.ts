import { existsSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { afterAll, describe, expect, test } from '@jest/globals';
import { getTask, math, mathReward, parseCompletion, verifyDataset } from 'merf';

const shared = fileURLToPath(new URL('../../../shared/data/math/', import.meta.url));
const folder = mkdtempSync(join(tmpdir(), 'merf-math-'));
afterAll(() => rmSync(folder, { recursive: true }));

/** A file of rows, read by the task with these options. */
async function rowsOf(rows: readonly object[], options: object = {}) {
  const file = join(folder, `${Math.random()}.jsonl`);
  writeFileSync(file, rows.map((row) => JSON.stringify(row)).join('\n'));
  const task = await getTask('math', options as never);
  return (await task.read(file)).map((entry) => ('row' in entry ? entry.row : entry.problem));
}

describe('rows', () => {
  test('come from the columns that published data has', async () => {
    expect(
      await rowsOf([
        { prompt: 'How many?', answer: 204 },
        { problem: 'How far?', answer: '\\frac{1}{2}', url: 'x' },
        { question: 'How long?', answer: 'She has 48/2 = <<48/2=24>>24.\n#### 24' },
        { problem: 'Which?', solution: 'It is 2, so \\boxed{\\text{(B)}}.' },
        { problem: 'What?', answer: '7', solution: 'We add. So \\boxed{7}.' },
        { prompt: [{ role: 'user', content: 'x' }], question: 'Why?', answer: 27.5 },
      ]),
    ).toEqual([
      { problem: 'How many?', answer: '204' },
      { problem: 'How far?', answer: '\\frac{1}{2}' },
      { problem: 'How long?', answer: '24', reasoning: 'She has 48/2 = 24.' },
      { problem: 'Which?', answer: '\\text{(B)}', reasoning: 'It is 2, so \\boxed{\\text{(B)}}.' },
      { problem: 'What?', answer: '7', reasoning: 'We add. So \\boxed{7}.' },
      { problem: 'Why?', answer: '27.5' },
    ]);
    expect(
      await rowsOf([{ text: 'How?', problem: 'no', final: 3, answer: 4 }], {
        problemColumn: 'text',
        answerColumn: 'final',
      }),
    ).toEqual([{ problem: 'How?', answer: '3' }]);
  });

  test('say what they lack', async () => {
    const [first, second, third, fourth] = await rowsOf([
      { answer: 3 },
      { problem: 'p' },
      { problem: 'p', answer: true },
      { problem: 'p', solution: 'First this.\n\nThen that.' },
    ]);
    expect(first).toMatch(
      /text of a problem in one of the columns prompt, problem, question but found undefined/,
    );
    expect(second).toMatch(/answer, text or a number, in column answer but found undefined/);
    expect(third).toMatch(/column answer but found true/);
    expect(fourth).toMatch(/worked solution with \\boxed\{\} or #### in column solution but found neither/);
  });
});

describe('prompts', () => {
  test('ask once to box the answer', async () => {
    const task = await getTask('math');
    const system = (problem: string) => task.messages({ problem, answer: '1' }, 'none')[0]?.content as string;
    expect(system('How many?')).toContain('\\boxed{');
    expect(system('How many?\nPut your final answer within \\boxed{}.')).not.toContain('\\boxed');
    for (const text of [system('How many?'), system('\\boxed{}')]) expect(text).toContain('<think>');
  });

  test('tell the rules that judge', async () => {
    const task = await getTask('math');
    const [message] = task.messages({ problem: 'How many?', answer: '1' }, 'full');
    expect(message?.content).toContain(
      '+2 points if the last \\boxed{} after </think> holds the right answer',
    );
    expect(message?.content).toContain('-1.5 points if it holds anything else');
    expect(message?.content).toContain('-2 points if there is no answer in \\boxed{}');
    expect(task.spec.totals()).toEqual([3, -0.5, -1, -3]);
  });
});

describe('the reward', () => {
  const row = { problem: 'p', answer: '\\frac{1}{2}' };
  test.each<[raw: string, format: string, correctness: string]>([
    ['<think>x</think>\\boxed{0.5}', 'demanded', 'right'],
    ['<think>x</think>So it is $\\boxed{\\frac12}$.', 'demanded', 'right'],
    ['<think>x</think><answer>\\boxed{1/2}</answer>', 'demanded', 'right'],
    ['<think>\\boxed{0.5}</think>\\boxed{0.6}', 'demanded', 'wrong'],
    ['<think>x</think>\\boxed{0.5} or \\boxed{2}', 'demanded', 'wrong'],
    ['<think>x</think>\\boxed{9^{9^{9^{9}}}}', 'demanded', 'wrong'],
    ['<think>x</think><answer></answer>\\boxed{0.5}', 'demanded', 'unreadable'],
    ['<think>\\boxed{0.5}</think>0.5', 'broken', 'unreadable'],
    ['<think>x</think>\\boxed{}', 'broken', 'unreadable'],
    ['<think>x</think>\\boxed{0.5', 'broken', 'unreadable'],
    ['\\boxed{0.5}', 'broken', 'unreadable'],
    ['</think><think>\\boxed{0.5}', 'broken', 'unreadable'],
    ['<think>x</think></think>\\boxed{0.5}', 'broken', 'unreadable'],
    ['<think><think>x</think>\\boxed{0.5}', 'broken', 'unreadable'],
  ])(
    '%s: format %s, answer %s',
    async (raw, format, correctness) => {
      const { parts } = await mathReward.judge(parseCompletion({ raw }), row);
      expect([parts.format?.case, parts.correctness?.case]).toEqual([format, correctness]);
    },
    60_000,
  );
});

describe('generated problems', () => {
  test('are seeded, solved step by step, and get the highest total', async () => {
    for (const problemSteps of [1, 2, 5]) {
      const task = await math.open({ problemSteps });
      const rows = task.rows({ split: 'train', seed: 7 });
      const again = task.rows({ split: 'train', seed: 7 });
      for (let i = 0; i < 40; i++) {
        const row = rows.at(i);
        expect(again.at(i)).toEqual(row);
        // Each line of the solution is an equation that holds and goes on from the one before.
        const equations = [...(row.reasoning ?? '').matchAll(/(\d+) ([-+*/]) (\d+) = (\d+)\./g)];
        expect(equations).toHaveLength(problemSteps);
        let count = Number(/has (\d+)/.exec(row.problem)?.[1]);
        for (const [, left, sign, right, result] of equations) {
          expect(Number(left)).toBe(count);
          const [x, y] = [Number(left), Number(right)];
          count = sign === '+' ? x + y : sign === '-' ? x - y : sign === '*' ? x * y : x / y;
          expect(Number(result)).toBe(count);
        }
        expect(row.answer).toBe(String(count));
        expect(Number.isInteger(count) && count > 0).toBe(true);
      }
      const row = rows.at(0);
      for (const raw of [task.reference?.(row) as string, task.demonstrate?.(row) as string]) {
        expect(task.spec.isHighest(await task.spec.judge(parseCompletion({ raw }), row))).toBe(true);
      }
    }
  }, 60_000);

  test('rows without a worked solution are not demonstrated', async () => {
    const task = await getTask('math');
    expect(() => task.demonstrate?.({ problem: 'How many?', answer: '1' })).toThrow(
      'Expected a row with a worked solution to demonstrate but received How many?',
    );
  });
});

describe('published data', () => {
  const files = { 'math500.jsonl': 500, 'aime24.jsonl': 30, 'aime25.jsonl': 30, 'amc23.jsonl': 40 };
  for (const [name, count] of Object.entries(files)) {
    const file = join(shared, name);
    const run = existsSync(file) ? test : test.skip;
    run(
      `every row of ${name} is read and its answer gets the highest total (skipped without ${shared})`,
      async () => {
        const task = await getTask('math');
        const report = await verifyDataset(task, file, {});
        expect(report.problems).toEqual([]);
        expect(report).toMatchObject({
          rows: count,
          references: { highest: 3, atHighest: count },
          check: { name: 'answer is read', passed: count },
          duplicates: 0,
        });
      },
      300_000,
    );
  }

  test('an answer that cannot be read is reported', async () => {
    const file = join(folder, 'odd.jsonl');
    const rows = [
      { problem: 'p', answer: '3 +' },
      { problem: 'q', answer: '\\frac{1}{2}' },
    ];
    writeFileSync(file, rows.map((row) => JSON.stringify(row)).join('\n'));
    const report = await verifyDataset(await getTask('math'), file, {});
    expect(report.check?.passed).toBe(1);
    expect(report.problems).toEqual([
      {
        row: 1,
        where: `${file}, line 1`,
        reason: expect.stringMatching(/^its answer "3 \+" cannot be read: /),
      },
    ]);
  }, 60_000);
});
