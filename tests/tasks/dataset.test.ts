import { execFileSync } from 'node:child_process';
import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { pathToFileURL } from 'node:url';
import { afterAll, describe, expect, test } from '@jest/globals';
import { MerfError } from '../../lib/errors.js';
import { formatVerifyReport, verifyDataset } from '../../lib/evaluate/verify.js';
import { Tokenizer } from '../../lib/policy/index.js';
import { parseCompletion } from '../../lib/reward/completion.js';
import { RewardSpec } from '../../lib/reward/spec.js';
import { generatedRows, readRows, requireRows, shuffledRows, splitOf } from '../../lib/tasks/dataset.js';
import { defineTask } from '../../lib/tasks/define.js';
import { knightsAndKnaves } from '../../lib/tasks/knights-and-knaves/index.js';
import { getTask, taskNames } from '../../lib/tasks/registry.js';
import { tokenizerFiles } from '../policy/helpers.js';
import { fakeTokenizer } from '../train/fake-policy.js';

const folder = mkdtempSync(join(tmpdir(), 'merf-tasks-'));
afterAll(() => rmSync(folder, { recursive: true }));

function write(name: string, content: string | Uint8Array): string {
  const file = join(folder, name);
  writeFileSync(file, content);
  return file;
}

async function failureOf(run: () => unknown): Promise<MerfError> {
  try {
    await run();
  } catch (error) {
    if (error instanceof MerfError) return error;
    throw error;
  }
  throw new Error('Expected a MerfError but nothing was thrown');
}

interface Sum {
  readonly a: number;
  readonly b: number;
  readonly answer?: number;
}

const sums = new RewardSpec<Sum>({
  name: 'sums',
  components: [
    {
      name: 'correctness',
      cases: [
        { name: 'right', score: 1, sentence: 'if it is the sum' },
        { name: 'wrong', score: 0, sentence: 'otherwise' },
      ],
      verify: ({ text }, { a, b }) => (Number(text) === a + b ? 'right' : 'wrong'),
    },
  ],
});

const sumTask = {
  name: 'sums',
  spec: sums,
  messages: ({ a, b }: Sum) => [{ role: 'user' as const, content: `${a} + ${b}?` }],
};

function parseSum(fields: Readonly<Record<string, unknown>>): Sum {
  for (const column of ['a', 'b']) {
    if (typeof fields[column] !== 'number') throw new Error(`Expected a number in column ${column}`);
  }
  return fields as unknown as Sum;
}

const someSums = Array.from({ length: 40 }, (_, i) => ({ a: i, b: 2 * i }));

describe('reading files', () => {
  test('JSONL: blank lines and a byte order mark are skipped, bad lines are kept with their place', async () => {
    const file = write(
      'mixed.jsonl',
      '\uFEFF{"a":1,"b":2}\r\n\n{"a":1,\n[1]\n{"a":1,"b":"x"}\n{"a":3,"b":4}',
    );
    const loaded = await readRows(file, parseSum);
    expect(loaded.map(({ number, where }) => [number, where.replace(file, 'F')])).toEqual([
      [1, 'F, line 1'],
      [2, 'F, line 3'],
      [3, 'F, line 4'],
      [4, 'F, line 5'],
      [5, 'F, line 6'],
    ]);
    expect(loaded[0]).toMatchObject({ row: { a: 1, b: 2 } });
    expect(loaded[1]).toMatchObject({ problem: expect.stringContaining('Expected a JSON object but ') });
    expect(loaded[2]).toMatchObject({ problem: 'Expected a JSON object but found array of length 1' });
    expect(loaded[3]).toMatchObject({ problem: 'Expected a number in column b' });
    const error = await failureOf(() => requireRows(loaded));
    expect(error.code).toBe('MALFORMED_FILE');
    expect(error.message).toContain(`${file}, line 3: Expected a JSON object`);
  });

  test('the issues of a zod error name their columns', async () => {
    const { z } = await import('zod');
    const file = write('zod.jsonl', '{"a":1,"b":"x"}');
    const schema = z.object({ a: z.number(), b: z.number() });
    const [loaded] = await readRows(file, (fields) => schema.parse(fields));
    expect(loaded).toMatchObject({ problem: expect.stringMatching(/^column b: .*number/) });
  });

  test.each<[string, string, string | Uint8Array | undefined, string, string]>([
    ['no file', 'none.jsonl', undefined, 'FILE_NOT_FOUND', 'there is no such file'],
    ['nothing in it', 'empty.jsonl', '\n \n', 'EMPTY_DATASET', 'empty.jsonl'],
    ['another kind', 'rows.csv', 'a,b\n1,2', 'UNSUPPORTED', 'rows.csv'],
    ['no Parquet', 'fake.parquet', 'PAR1 this is none of it PAR1', 'MALFORMED_FILE', 'fake.parquet'],
    ['an empty Parquet', 'empty.parquet', '', 'MALFORMED_FILE', 'empty.parquet'],
    [
      'random bytes',
      'noise.parquet',
      Uint8Array.from({ length: 999 }, (_, i) => (i * i) % 251),
      'MALFORMED_FILE',
      'noise',
    ],
  ])('%s is refused', async (_, name, content, code, part) => {
    const file = content === undefined ? join(folder, name) : write(name, content);
    const error = await failureOf(() => readRows(file, parseSum));
    expect(error.code).toBe(code);
    expect(error.message).toContain(part);
  });

  test('a folder is refused', async () => {
    mkdirSync(join(folder, 'folder.jsonl'));
    expect((await failureOf(() => readRows(join(folder, 'folder.jsonl'), parseSum))).code).toBe(
      'FILE_NOT_FOUND',
    );
  });
});

describe('row sources', () => {
  test('each pass has every row once, in an order of its own, and any position can be asked for', () => {
    const rows = shuffledRows(someSums, 3);
    const pass = (n: number) => someSums.map((_, i) => rows.at(n * someSums.length + i).a);
    const [first, second] = [pass(0), pass(1)];
    expect([...first].sort((a, b) => a - b)).toEqual(someSums.map(({ a }) => a));
    expect([...second].sort((a, b) => a - b)).toEqual(someSums.map(({ a }) => a));
    expect(second).not.toEqual(first);
    const resumed = shuffledRows(someSums, 3);
    expect(resumed.at(57)).toEqual(rows.at(57));
    expect(resumed.at(12)).toEqual(rows.at(12));
    expect(resumed.fingerprint).toBe(rows.fingerprint);
    expect(shuffledRows(someSums, 4).fingerprint).not.toBe(rows.fingerprint);
    expect(shuffledRows(someSums.slice(1), 3).fingerprint).not.toBe(rows.fingerprint);
    expect(shuffledRows(someSums, 4).at(0)).not.toEqual(rows.at(0));
  });

  test('refuse no rows and positions that are none', async () => {
    expect((await failureOf(() => shuffledRows([], 1))).code).toBe('EMPTY_DATASET');
    for (const position of [-1, 0.5, Number.NaN]) {
      expect((await failureOf(() => shuffledRows([1], 1).at(position))).code).toBe('INVALID_ARGUMENT');
    }
  });

  test('a generator that makes one row only cannot hold any out', async () => {
    const other = splitOf('"same"') === 'test' ? 'train' : 'test';
    const rows = generatedRows({
      split: other,
      fingerprint: '',
      draw: () => 'same',
      identity: JSON.stringify,
    });
    expect((await failureOf(() => rows.at(0))).code).toBe('EMPTY_DATASET');
  });
});

describe('defineTask', () => {
  test('with a generator', async () => {
    const task = await defineTask<Sum>({
      ...sumTask,
      data: (random) => ({ a: random.below(50), b: random.below(50) }),
    }).open();
    const rows = task.rows({ split: 'train', seed: 1 });
    const order = [4, 0, 9, 4];
    expect(order.map((i) => rows.at(i))).toEqual(
      order.map((i) => task.rows({ split: 'train', seed: 1 }).at(i)),
    );
    const keys = (split: 'train' | 'test', seed: number) => {
      const source = task.rows({ split, seed });
      return new Set(Array.from({ length: 300 }, (_, i) => JSON.stringify(source.at(i))));
    };
    const train = keys('train', 1);
    expect(train.size).toBeGreaterThan(200);
    expect([...keys('test', 2)].filter((key) => train.has(key))).toEqual([]);
    expect(task.messages(rows.at(0), 'none')).toEqual(sumTask.messages(rows.at(0)));
    expect(task.messages(rows.at(0), 'full')[0]).toEqual({ role: 'system', content: sums.describe('full') });
  });

  test('with a file, parsed, and with rows', async () => {
    const file = write('sums.jsonl', someSums.map((row) => JSON.stringify(row)).join('\n'));
    for (const data of [file, someSums]) {
      const task = await defineTask<Sum>({ ...sumTask, data, parse: parseSum }).open();
      const train = task.rows({ split: 'train', seed: 1 });
      const held = task.rows({ split: 'test', seed: 1 });
      expect((train.size ?? 0) + (held.size ?? 0)).toBe(someSums.length);
      const tested = await defineTask<Sum>({
        ...sumTask,
        data,
        testData: [{ a: 7, b: 7 }],
        parse: parseSum,
      }).open();
      expect(tested.rows({ split: 'train', seed: 1 }).size).toBe(someSums.length);
      expect(tested.rows({ split: 'test', seed: 1 }).at(0)).toEqual({ a: 7, b: 7 });
    }
  });

  test('refuses data that cannot be', async () => {
    const wrong = write('wrong.jsonl', '{"a":1,"b":1}\n{"a":"1","b":1}');
    const error = await failureOf(() => defineTask<Sum>({ ...sumTask, data: wrong, parse: parseSum }).open());
    expect([error.code, error.message]).toEqual([
      'MALFORMED_FILE',
      `${wrong}, line 2: Expected a number in column a`,
    ]);
    // A row alone is in one split, whose rows are there, and none are in the other.
    const one = await defineTask<Sum>({ ...sumTask, data: [{ a: 1, b: 1 }] }).open();
    const few = await failureOf(() => [
      one.rows({ split: 'train', seed: 0 }),
      one.rows({ split: 'test', seed: 0 }),
    ]);
    expect([few.code, few.message]).toEqual(['EMPTY_DATASET', expect.stringContaining('give test rows')]);
    const split = splitOf(one.identity({ a: 1, b: 1 }));
    expect(one.rows({ split, seed: 0 }).size).toBe(1);
    const none = await failureOf(() => defineTask<Sum>({ ...sumTask, data: 5 as never }));
    expect(none.code).toBe('INVALID_ARGUMENT');
    for (const [key, value] of Object.entries({ name: '', spec: {}, messages: 'What?' })) {
      const broken = { ...sumTask, data: someSums, [key]: value };
      const wrong = await failureOf(() => defineTask<Sum>(broken as never));
      expect([wrong.code, wrong.message]).toEqual([
        'INVALID_ARGUMENT',
        expect.stringContaining(`for ${key} but received`),
      ]);
    }
  });
});

describe('getTask', () => {
  test('knows its names and the options of each', async () => {
    expect(taskNames()).toContain('knights-and-knaves');
    const task = await getTask('knights-and-knaves', { people: 3, data: undefined } as never);
    expect(task.name).toBe('knights-and-knaves');
    const unknown = await failureOf(() => getTask('knights'));
    expect([unknown.code, unknown.message]).toEqual([
      'INVALID_ARGUMENT',
      expect.stringContaining('Expected one of knights-and-knaves'),
    ]);
    const option = await failureOf(() => getTask('knights-and-knaves', { poeple: 3 } as never));
    expect(option.message).toContain('unknown key "poeple"; did you mean "people"?');
    expect(option.code).toBe('INVALID_ARGUMENT');
  });

  test('names a module that is not there', async () => {
    const error = await failureOf(() => getTask('./no-such-task.ts'));
    expect([error.code, error.message]).toEqual([
      'FILE_NOT_FOUND',
      expect.stringContaining('./no-such-task.ts'),
    ]);
  });
});

describe('a task in a module of the user', () => {
  const library = (path: string) =>
    JSON.stringify(pathToFileURL(join(import.meta.dirname, '../../lib', path)).href);

  /** What a process of its own, which imports TypeScript as the command line does, says about the module. */
  function load(file: string, options = {}): string {
    const script = `
      import { getTask } from ${library('tasks/registry.ts')};
      try {
        const task = await getTask(process.argv[1], ${JSON.stringify(options)});
        const row = task.rows({ split: 'train', seed: 1 }).at(0);
        console.log(task.name, JSON.stringify(task.messages(row, 'full')));
      } catch (error) {
        console.log(error.code, error.message);
      }`;
    const args = ['--import', 'tsx', '--input-type=module', '-e', script, file];
    return execFileSync(process.execPath, args, {
      encoding: 'utf8',
      cwd: join(import.meta.dirname, '../..'),
    });
  }

  const source = `
    import { defineTask } from ${library('tasks/define.ts')};
    import { RewardSpec } from ${library('reward/spec.ts')};
    interface Row { n: number }
    const spec = new RewardSpec<Row>({
      name: 'echo',
      components: [{
        name: 'echo',
        cases: [{ name: 'same', score: 1.25, sentence: 'if it is the same' }, { name: 'other', score: 0, sentence: 'otherwise' }],
        verify: ({ text }, { n }) => (text === String(n) ? 'same' : 'other'),
      }],
    });
    export const task = defineTask<Row>({
      name: 'echo', spec, data: (random) => ({ n: random.below(1000) }),
      messages: ({ n }) => [{ role: 'user', content: String(n) }],
    });`;

  test('is loaded, TypeScript and all', () => {
    expect(load(write('echo.ts', source))).toMatch(/^echo \[.*\+1\.25 points if it is the same/);
  });

  test('may have options of its own, which are checked', () => {
    const withOptions = source
      .replace('messages: ({ n })', 'parse: undefined, messages: ({ n })')
      .replace(
        "name: 'echo', spec, data: (random) => ({ n: random.below(1000) }),",
        "name: 'echo', options: { below: z.int().min(1) }, create: ({ below }) => ({ spec, data: (random) => ({ n: random.below(below) }),",
      )
      .replace(/\}\);$/, '}) });')
      .replace('defineTask<Row>', 'defineTask')
      .replace(
        'interface Row',
        `import { z } from ${JSON.stringify(import.meta.resolve('zod'))};\n interface Row`,
      );
    const file = write('options.ts', withOptions);
    expect(load(file, { below: 1 })).toMatch(/^echo \[.*"content":"0"/);
    expect(load(file, {})).toMatch(/^INVALID_ARGUMENT In the options of the task echo: below: .*number/);
    const said = load(write('no-options.ts', source), { below: 1 });
    expect(said).toMatch(/^INVALID_ARGUMENT In the options of the task echo: unknown key "below"/);
  });

  test.each([
    ['exports-nothing.ts', 'export const other = 1;', 'it is undefined'],
    ['not-defined.ts', 'export const task = { name: "x" };', 'its open is undefined'],
    ['throws.ts', 'throw new Error("bad luck");', 'bad luck'],
    ['not-typescript.ts', 'const const', 'not-typescript.ts'],
    ['plain.mjs', 'export const task = 7;', 'it is 7'],
  ])('%s is refused', (name, content, part) => {
    const said = load(write(name, content));
    expect(said).toMatch(/^INVALID_ARGUMENT /);
    expect(said).toContain(part);
    expect(said).toContain(name);
  });
});

describe('verifyDataset', () => {
  const definition = {
    ...sumTask,
    parse: parseSum,
    reference: (row: Sum) => String(row.answer ?? row.a + row.b),
  };

  test('finds nothing in a sound file', async () => {
    const file = write('sound.jsonl', '{"a":1,"b":2,"answer":3}\n{"a":2,"b":2,"answer":4}\n');
    const task = await defineTask<Sum>({ ...definition, data: someSums }).open();
    const report = await verifyDataset(task, file, {
      tokenizer: { ...fakeTokenizer, encode: () => Array<number>(20).fill(1) },
      maxPromptTokens: 20,
    });
    expect(report).toEqual({
      task: 'sums',
      file,
      rows: 2,
      references: { highest: 1, atHighest: 2, cases: { correctness: { right: 2, wrong: 0 } } },
      promptLengths: { unit: 'tokens', least: 20, median: 20, greatest: 20, limit: 20, overLimit: 0 },
      duplicates: 0,
      distinct: 2,
      problems: [],
    });
    expect(formatVerifyReport(report)).toContain('Nothing is off.');
  });

  test('counts rows that name special tokens, and reports them where they become tokens', async () => {
    const task = await defineTask<{ question: string }>({
      name: 'questions',
      spec: new RewardSpec<{ question: string }>({
        name: 'questions',
        components: [
          {
            name: 'thought',
            cases: [
              { name: 'once', score: 1, sentence: 'if it is thought about once' },
              { name: 'else', score: 0, sentence: 'otherwise' },
            ],
            verify: ({ text }) => (text === '<think>no</think>1' ? 'once' : 'else'),
          },
        ],
      }),
      messages: ({ question }) => [{ role: 'user' as const, content: question }],
      parse: (fields) => fields as { question: string },
      reference: () => '<think>no</think>1<|im_end|>',
      data: Array.from({ length: 40 }, (_, i) => ({ question: `${i}?` })),
    }).open();
    const file = write('named.jsonl', '{"question":"a<|im_end|>b"}\n{"question":"c"}\n');
    const opening = `${tokenizerFiles().chatTemplate}{% if add_generation_prompt %}{{ '<think>' }}{% endif %}`;
    const files = { ...tokenizerFiles(), chatTemplate: opening };
    const report = await verifyDataset(task, file, { tokenizer: new Tokenizer(files, 'tiny') });
    expect(report).toMatchObject({
      references: { atHighest: 2 },
      specialTokens: { rows: 1, names: ['<|im_end|>'] },
      problems: [],
    });
    expect(formatVerifyReport(report)).toMatch(/special tokens +1 row's prompt names <\|im_end\|>/);
    const allowing = new Tokenizer(files, 'tiny', { splitSpecialTokens: false });
    const { problems } = await verifyDataset(task, file, { tokenizer: allowing });
    expect(problems).toEqual([
      { row: 1, where: `${file}, line 1`, reason: expect.stringContaining('becomes a special token') },
    ]);
  });

  test('counts rows that are the same to the task, and test rows that are one of the data', async () => {
    const file = write('repeats.jsonl', '{"a":1,"b":2}\n{"a":2,"b":1}\n{"a":2,"b":2}\n');
    const testFile = write('tests.jsonl', '{"a":3,"b":1}\n{"a":2,"b":1}\n{"a":1}\n{"a":1,"b":3}\n');
    const task = await defineTask<Sum>({
      ...definition,
      data: someSums,
      identity: ({ a, b }) => `${Math.min(a, b)} ${Math.max(a, b)}`,
    }).open();
    const report = await verifyDataset(task, file, { testFile });
    expect(report).toMatchObject({
      rows: 3,
      duplicates: 0,
      distinct: 2,
      test: { file: testFile, rows: 4, distinct: 2, leaked: 1 },
      problems: [
        {
          row: 2,
          where: `${testFile}, line 2`,
          reason: `it is the same as ${file}, line 1, a row of the data`,
        },
        { row: 3, where: `${testFile}, line 3`, reason: 'Expected a number in column b' },
      ],
    });
    const text = formatVerifyReport(report);
    expect(text).toMatch(/distinct rows +2, whatever the wording/);
    expect(text).toContain(`4 in ${testFile}, 2 distinct; 1 are the same as a row of the data`);
    expect(text).toContain('2 rows are off:');
    const alone = await verifyDataset(task, file);
    expect(alone.problems).toEqual([]);
    expect(alone).not.toHaveProperty('test');
  });

  test('names every row that is off, and why', async () => {
    const file = write(
      'off.jsonl',
      [
        '{"a":1,"b":2,"answer":3}',
        '{"a":1,"b":2,"answer":4}',
        '{"a":1}',
        'oops',
        '{"a":1000000,"b":1,"answer":1000001}',
        '{"a":2,"b":2,"answer":4}',
      ].join('\n'),
    );
    const task = await defineTask<Sum>({
      ...definition,
      data: someSums,
      check: { name: 'small', find: ({ a }) => (a > 100 ? `${a} is too big` : undefined) },
    }).open();
    const report = await verifyDataset(task, file, {
      tokenizer: {
        ...fakeTokenizer,
        applyChatTemplate: (messages) => messages.map(({ content }) => content).join(''),
      },
      maxPromptTokens: sums.describe('full').length + 8,
    });
    const text = formatVerifyReport(report);
    expect(report.problems.map(({ row, reason }) => [row, reason])).toEqual([
      [2, `it has the prompt of ${file}, line 1`],
      [2, 'its reference answer gets 0 (correctness wrong), not +1'],
      [3, 'Expected a number in column b'],
      [4, expect.stringContaining('Expected a JSON object')],
      [5, expect.stringMatching(/^its prompt has \d+ tokens, \d+ fit$/)],
      [5, '1000000 is too big'],
    ]);
    expect(report).toMatchObject({
      rows: 6,
      duplicates: 1,
      references: { atHighest: 3, cases: { correctness: { right: 3, wrong: 1 } } },
      check: { name: 'small', passed: 3 },
      promptLengths: { overLimit: 1 },
    });
    expect(text).toContain('4 rows are off:');
    expect(text).toContain(`${file}, line 5: 1000000 is too big`);
    expect(formatVerifyReport(report, 2)).toContain('and 4 more');
  });

  test('a verifier that throws is a finding', async () => {
    const spec = new RewardSpec<Sum>({
      name: 'broken',
      components: [
        {
          name: 'x',
          cases: [{ name: 'a', score: 1, sentence: 'if a' }],
          verify: () => {
            throw new Error('no');
          },
        },
      ],
    });
    const task = await defineTask<Sum>({ ...definition, spec, data: someSums }).open();
    const report = await verifyDataset(task, write('one.jsonl', '{"a":1,"b":2}'));
    expect(report.problems[0]?.reason).toBe('The verifier of x (reward broken, row 1) threw: no');
  });

  test('knights and knaves: the solver against the solution', async () => {
    const task = await knightsAndKnaves.open({ people: 3 });
    const rows = task.rows({ split: 'train', seed: 1 });
    const word = {
      knight: 'telling-truth',
      knave: 'lying',
      and: 'and',
      or: 'or',
      if: '->',
      iff: '<=>',
    } as const;
    type Claim = ReturnType<typeof rows.at>['statements'][number];
    const python = (claim: Claim): string => {
      if (claim.kind === 'not') return `('not', ${python(claim.claim)})`;
      if ('person' in claim) return `('${word[claim.kind]}', ${claim.person})`;
      return `('${word[claim.kind]}', ${python(claim.left)}, ${python(claim.right)})`;
    };
    const line = (i: number, change: object = {}) => {
      const { quiz, names, solution, statements } = rows.at(i);
      return JSON.stringify({
        quiz,
        names,
        solution,
        statements: `(${statements.map(python).join(', ')})`,
        ...change,
      });
    };
    const flipped = rows.at(1).solution.map((isKnight, i) => (i === 1 ? !isKnight : isKnight));
    const file = write(
      'puzzles.jsonl',
      [
        line(0),
        line(1, { solution: flipped }),
        line(2, { statements: "(('telling-truth', 0), ('telling-truth', 1), ('telling-truth', 2))" }),
        line(3, { solution: [true] }),
        line(4, { names: 'Zoey' }),
        line(5, { solution_text_format: '(1) Zoey is a knight' }),
      ].join('\n'),
    );
    const report = await verifyDataset(task, file);
    expect(report.check).toEqual({ name: 'solver agrees', passed: 2 });
    expect(report.problems.map(({ row, reason }) => [row, reason])).toEqual([
      [2, expect.stringMatching(new RegExp(`the solver finds that ${rows.at(1).names[1]} is a kn`))],
      [3, 'the statements have more than one solution'],
      [4, 'Expected 3 items in column solution, one for each name, but found 1'],
      [5, expect.stringContaining('Expected a list of names in column names')],
      [6, expect.stringMatching(/its reference answer gets -1 \(.*correctness unreadable\), not \+3/)],
    ]);
    const read = (await task.load(write('fine.jsonl', line(0))))[0];
    expect(read).toEqual(rows.at(0));
    expect(parseCompletion({ raw: task.reference?.(rows.at(0)) as string }).answer).toContain('(1) ');
  });
});
