import { existsSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, test } from '@jest/globals';
import { MerfError } from '../../lib/errors.js';
import { parseCompletion } from '../../lib/reward/completion.js';
import type { Reward } from '../../lib/reward/spec.js';
import '../../lib/tasks/dataset.js';
import type { Claim } from '../../lib/tasks/knights-and-knaves/claim.js';
import { parseStatements } from '../../lib/tasks/knights-and-knaves/dataset.js';
import { knightsAndKnaves, knightsAndKnavesInstruction } from '../../lib/tasks/knights-and-knaves/index.js';
import { answerLines } from '../../lib/tasks/knights-and-knaves/reasoning.js';
import { knightsAndKnavesReward } from '../../lib/tasks/knights-and-knaves/reward.js';
import { solve } from '../../lib/tasks/knights-and-knaves/solver.js';
import { Random } from '../../lib/tasks/random.js';
import { readRules, sorted, totalsInText } from '../reward/totals-in-text.js';

const row = { names: ['Zoey', 'Owen'], solution: [true, false] };

async function judge(raw: string, prompt?: string) {
  const completion = parseCompletion(prompt === undefined ? { raw } : { raw, prompt });
  const { total, parts } = await knightsAndKnavesReward.judge(completion, row);
  return [total, parts.format?.case, parts.correctness?.case];
}

const right = [3, 'demanded', 'right'];
const wrong = [-0.5, 'demanded', 'wrong'];
const unreadable = [-1, 'demanded', 'unreadable'];
const broken = [-3, 'broken', 'unreadable'];

describe('the reward, rule by rule', () => {
  const within = (answer: string) => `<think>hm</think><answer>${answer}</answer>`;

  test.each<[string, unknown[]]>([
    ['(1) Zoey is a knight\n(2) Owen is a knave', right],
    ['Owen is a knave, Zoey is a knight', right],
    ['zoey IS  A\nKNIGHT; OWEN is\ta Knave', right],
    ['(1) Zoey is a knight\n(2) Owen is a knight', wrong],
    ['(1) Zoey is a knave\n(2) Owen is a knight', wrong],
    ['', unreadable],
    [' \n ', unreadable],
    ['(1) Zoey is a knight', unreadable],
    ['Zoey is a knight, and so Owen is a knave, not a knight', unreadable],
    ['The knights: Zoey is a knight. Owen is a knave', unreadable],
    ['Zoey is a knight, Owen is the knave', unreadable],
    ['Zoey is a knight, Owen is a knaves', unreadable],
    ['Zoey is a knight, Bowen is a knave', unreadable],
    ['Zoey is a knight, Owens is a knave', unreadable],
    ['Zoey is a knight, öOwen is a knave', unreadable],
    ['Zoey is a knight, Owen_ is a knave', unreadable],
    ['Zoey isa knight, Owen is a knave', unreadable],
    ['Zoey is a knight, Mia is a knave', unreadable],
    ['Zoey is a knight, Zoey is a knave', unreadable],
  ])('%j', async (answer, expected) => {
    expect(await judge(within(answer))).toEqual(expected);
  });

  test('the first place that names a person counts', async () => {
    const both = { names: ['Zoey'], solution: [true] };
    const score = (answer: string) =>
      knightsAndKnavesReward
        .judge(parseCompletion({ raw: within(answer) }), both)
        .then((s) => s.parts.correctness?.case);
    expect(await score('Zoey is a knight')).toBe('right');
    expect(await score('Zoey is not telling; Zoey is a knight')).toBe('right');
    expect(await score('Zoey is a knave, Zoey is a knight')).toBe('unreadable');
    const three = { names: ['Ann', 'Bob', 'Cy'], solution: [true, true, true] };
    const first = 'Ann is a knave Ann is a knight Bob is a knight';
    expect((await knightsAndKnavesReward.judge(parseCompletion({ raw: within(first) }), three)).total).toBe(
      -1,
    );
  });

  const answer = '<answer>Zoey is a knight, Owen is a knave</answer>';
  test.each<[string, unknown[]]>([
    [`before <think></think> between ${answer} after`, right],
    [`<think></think>${answer}${answer}`, broken],
    [`<think><think></think>${answer}`, broken],
    [`<think></think></think>${answer}`, broken],
    [`${answer}<think></think>`, broken],
    [`</think><think>${answer}`, broken],
    [`<think>${answer}</think>`, broken],
    [`</think>${answer}`, broken],
    [answer, broken],
    ['<think></think><answer>Zoey is a knight, Owen is a knave', broken],
    ['<think></think></answer>Zoey is a knight, Owen is a knave<answer>', broken],
    [`<THINK></THINK>${answer}`, broken],
    ['', broken],
  ])('%j', async (raw, expected) => {
    expect(await judge(raw)).toEqual(expected);
  });

  test('a <think> that ends the prompt counts as part of the response', async () => {
    const prompt = '<|im_start|>assistant\n<think>\n';
    expect(await judge(`hm</think>${answer}`, prompt)).toEqual(right);
    expect(await judge(`<think>hm</think>${answer}`, prompt)).toEqual(broken);
    expect(await judge(`hm</think>${answer}`, '<|im_start|>assistant\n')).toEqual(broken);
  });

  test('names are taken literally', async () => {
    const odd = { names: ['A.B', 'C+ (x)'], solution: [true, false] };
    const score = async (text: string) =>
      (await knightsAndKnavesReward.judge(parseCompletion({ raw: within(text) }), odd)).total;
    expect(await score('A.B is a knight, C+ (x) is a knave')).toBe(3);
    expect(await score('AxB is a knight, C+ (x) is a knave')).toBe(-1);
  });
});

describe('the motivation', () => {
  test('states every score in every view, and every total follows from it and occurs', async () => {
    const pieces = [
      ...['<think>', '</think>', '<answer>', '</answer>', 'Zoey is a knight', 'Zoey is a knave'],
      ...['Owen is a knave', 'Owen is a knight', ', ', 'knight', 'hm '],
    ];
    const skeleton = [
      '<think>',
      'hm ',
      '</think>',
      '<answer>',
      'Zoey is a knight',
      ', ',
      'Owen is a knave',
      '</answer>',
    ];
    const random = new Random(11);
    const scores: Reward[] = [];
    for (let trial = 0; trial < 3000; trial++) {
      const parts = [...skeleton];
      for (let edits = random.below(4); edits > 0; edits--) {
        parts.splice(
          random.below(parts.length + 1),
          random.below(2),
          ...(random.chance(0.7) ? [random.pick(pieces)] : []),
        );
      }
      scores.push(await knightsAndKnavesReward.judge(parseCompletion({ raw: parts.join('') }), row));
    }
    const totals = sorted(scores.map((score) => score.total));
    expect(totals).toEqual([-3, -1, -0.5, 3]);
    expect(knightsAndKnavesReward.totals()).toEqual([3, -0.5, -1, -3]);
    const partsOf = (name: string) => sorted(scores.map((score) => score.parts[name]?.score as number));
    for (const [view, expected] of [
      ['full', totals],
      ['adverse', sorted(totals.map((total) => -total))],
      [{ partial: ['correctness'] }, partsOf('correctness')],
      [{ partial: ['format'] }, partsOf('format')],
      [{ partial: ['correctness', 'format'] }, totals],
      [{ template: '{{rules}}' }, totals],
    ] as const) {
      expect(totalsInText(readRules(knightsAndKnavesReward.describe(view)))).toEqual(expected);
    }
    expect(knightsAndKnavesReward.describe('full')).toMatch(/(^|\s)-1\.5 points if/);
  });

  test('is a paragraph at the end of the same system message; the partial one has no word of format', async () => {
    const task = await knightsAndKnaves.open();
    const puzzle = task.rows({ split: 'train', seed: 1 }).at(0);
    const [system, user] = task.messages(puzzle, 'none');
    expect(system).toEqual({ role: 'system', content: knightsAndKnavesInstruction });
    expect(user).toEqual({ role: 'user', content: puzzle.quiz });
    expect(system?.content).not.toMatch(/-?\d\.\d|point|score/);
    const told = task.messages(puzzle, 'full');
    expect(told).toHaveLength(2);
    expect(told[0]?.content).toBe(
      `${knightsAndKnavesInstruction}\n\n${knightsAndKnavesReward.describe('full')}`,
    );
    expect(knightsAndKnavesReward.describe({ partial: ['correctness'] })).not.toMatch(/format|tag|think/i);
  });
});

describe('generated puzzles', () => {
  test('are the same for the same seed, differ otherwise, and have as many people as asked', async () => {
    const task = await knightsAndKnaves.open({ people: '2-3,5' });
    const rows = task.rows({ split: 'train', seed: 5 });
    const again = task.rows({ split: 'train', seed: 5 });
    expect(again.at(7)).toEqual(rows.at(7));
    expect(task.rows({ split: 'train', seed: 6 }).at(7)).not.toEqual(rows.at(7));
    expect(again.fingerprint).toBe(rows.fingerprint);
    expect(task.rows({ split: 'train', seed: 6 }).fingerprint).not.toBe(rows.fingerprint);
    const people = new Set(Array.from({ length: 60 }, (_, i) => rows.at(i).names.length));
    expect([...people].sort()).toEqual([2, 3, 5]);
  });

  test('no claims of the training split come up for the test, nor do they with people in another order', async () => {
    const task = await knightsAndKnaves.open({ people: 3 });
    const seen = (split: 'train' | 'test', seed: number, order: readonly number[]) => {
      const rows = task.rows({ split, seed });
      const swapped = (claim: Claim): Claim =>
        JSON.parse(JSON.stringify(claim), (key, value) => (key === 'person' ? order[value] : value));
      return new Set(
        Array.from({ length: 400 }, (_, i) => {
          const { statements } = rows.at(i);
          return JSON.stringify(order.map((_, place) => swapped(statements[order.indexOf(place)] as Claim)));
        }),
      );
    };
    const held = seen('test', 2, [0, 1, 2]);
    expect(held.size).toBeGreaterThan(150);
    for (const order of [
      [0, 1, 2],
      [0, 2, 1],
      [1, 0, 2],
      [1, 2, 0],
      [2, 0, 1],
      [2, 1, 0],
    ]) {
      const train = seen('train', 1, order);
      expect([...held].filter((claims) => train.has(claims))).toEqual([]);
    }
  });

  test('reference and demonstration get the highest total', async () => {
    const task = await knightsAndKnaves.open({ people: [2, 4, 8], depth: 2 });
    const rows = task.rows({ split: 'test', seed: 3 });
    for (let i = 0; i < 40; i++) {
      for (const write of [task.reference, task.demonstrate]) {
        const raw = write?.(rows.at(i)) as string;
        expect((await task.spec.judge(parseCompletion({ raw }), rows.at(i))).total).toBe(3);
      }
      expect(task.check?.find(rows.at(i))).toBeUndefined();
    }
  });

  test.each<[unknown]>([
    [1],
    [9],
    [2.5],
    ['x'],
    ['3-'],
    ['5-3'],
    ['2-99999999'],
    [[]],
    [[3, 12]],
    [{}],
    [true],
    [''],
  ])('refuses %j people', async (people) => {
    await expect(knightsAndKnaves.open({ people: people as number })).rejects.toMatchObject({
      code: 'INVALID_ARGUMENT',
      message: expect.stringContaining('people: expected numbers from 2 to 8'),
    });
  });
});

describe('statements of the published files', () => {
  test('become claims', () => {
    const [first, second, third] = parseStatements(
      "(('not', ('telling-truth', 2)), ('or', ('telling-truth', 1), ('lying', 2)), ('and', ('->', ('lying', 0), ('telling-truth', 1)), ('<=>', ('lying', 1), ('lying', 2)), ('lying', 0)))",
    );
    expect(first).toEqual({ kind: 'not', claim: { kind: 'knight', person: 2 } });
    expect(second).toEqual({
      kind: 'or',
      left: { kind: 'knight', person: 1 },
      right: { kind: 'knave', person: 2 },
    });
    expect(third).toEqual({
      kind: 'and',
      left: {
        kind: 'and',
        left: { kind: 'if', left: { kind: 'knave', person: 0 }, right: { kind: 'knight', person: 1 } },
        right: { kind: 'iff', left: { kind: 'knave', person: 1 }, right: { kind: 'knave', person: 2 } },
      },
      right: { kind: 'knave', person: 0 },
    });
    expect(parseStatements("(('lying', 0),)")).toEqual([{ kind: 'knave', person: 0 }]);
  });

  test.each([
    ["(('lying', 0)", 'at character 14 of column statements but found the end'],
    ["(('lying', 0)) x", 'Expected the end at character 15'],
    ["(('lying' 0))", 'at character 10'],
    ["(('lying', -1))", 'Expected a formula or ")" at character 11'],
    ["(('lying', 5),)", 'persons from 0 to 0 in column statements but found 5'],
    ["(('xor', ('lying', 0), ('lying', 0)),)", '["xor"'],
    ["(('->', ('lying', 0)),)", '["->"'],
    ["(('toString', ('lying', 0), ('lying', 0)),)", '["toString"'],
    ["('lying', 0)", '"lying"'],
    ['', 'found the end'],
    ["'lying'", 'Expected "("'],
    ['('.repeat(100_000), 'nested at most 100 deep'],
  ])('what is none is refused (%#)', (text, part) => {
    expect(() => parseStatements(text)).toThrow(part);
  });
});

const folder = join(import.meta.dirname, '../../../shared/data/kk');
const published = existsSync(folder);
if (!published) console.warn(`Skipped: the published puzzles are not there (${folder})`);

(published ? describe : describe.skip)('the published puzzles [needs ../shared]', () => {
  const files = [3, 5, 7].flatMap((n) => [`${n}ppl-train.parquet`, `${n}ppl-test.parquet`]);

  test.each(files)(
    '%s: the solver finds exactly the solution, and the answer in tags gets 3',
    async (name) => {
      const task = await knightsAndKnaves.open();
      const rows = await task.load(join(folder, name));
      expect(rows).toHaveLength(name.includes('train') ? 900 : 100);
      for (const row of rows) {
        expect(solve(row.statements)).toEqual([row.solution]);
        expect(row.answer).toBe(answerLines(row.names, row.solution));
        const completion = parseCompletion({ raw: `<think>…</think><answer>${row.answer}</answer>` });
        expect((await task.spec.judge(completion, row)).total).toBe(3);
      }
    },
  );

  test('serve as a data set, with rows of their own held out or a test file', async () => {
    const data = join(folder, '3ppl-test.parquet');
    const task = await knightsAndKnaves.open({ data });
    const train = task.rows({ split: 'train', seed: 1 });
    const held = task.rows({ split: 'test', seed: 1 });
    expect((train.size ?? 0) + (held.size ?? 0)).toBe(100);
    expect(held.size).toBeGreaterThan(3);
    const both = await knightsAndKnaves.open({ data, testData: join(folder, '5ppl-test.parquet') });
    expect(both.rows({ split: 'train', seed: 1 }).size).toBe(100);
    expect(both.rows({ split: 'test', seed: 1 }).at(0).names).toHaveLength(5);
  });
});

test('a depth out of range is refused', async () => {
  for (const depth of [0, 5, 1.5]) {
    const error = await knightsAndKnaves.open({ depth }).catch((e: unknown) => e);
    expect(error).toBeInstanceOf(MerfError);
    expect((error as MerfError).message).toContain('depth: ');
  }
});
