import { describe, expect, test } from '@jest/globals';
import { MerfError } from '../../lib/errors.js';
import { parseCompletion } from '../../lib/reward/completion.js';
import { type Component, RewardSpec } from '../../lib/reward/index.js';
import { Random } from '../../lib/tasks/random.js';
import { readRules, sorted, totalsInText } from './totals-in-text.js';

const completion = parseCompletion({ raw: 'x' });

/** A specification of one component with the cases yes (1) and no (0). */
function yesOrNo(verify: (row: unknown, signal: AbortSignal) => unknown, timeoutSeconds?: number) {
  return new RewardSpec<unknown>({
    name: 'test',
    components: [
      {
        name: 'agreement',
        cases: [
          { name: 'yes', score: 1, sentence: 'if so' },
          { name: 'no', score: 0, sentence: 'if not' },
        ],
        verify: (_, row, { signal }) => verify(row, signal) as string,
      },
    ],
    ...(timeoutSeconds === undefined ? {} : { timeoutSeconds }),
  });
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

describe('words and function agree', () => {
  type Row = Readonly<Record<string, string>>;

  /** A random specification whose verifiers do what the row says. */
  function randomSpec(random: Random): RewardSpec<Row> {
    const names = random
      .shuffle(['format', 'correctness', 'brevity', 'use_of_tools'])
      .slice(0, 1 + random.below(4));
    const cases = names.map((_, i) =>
      Array.from({ length: 1 + random.below(4) }, (_, j) => ({
        name: `c${i}${j}`,
        score: Math.round((random.uniform() * 6 - 3) * 10) / 10,
        sentence: `if it is so (${'i'.repeat(j + 1)}).`,
        implies: {} as Record<string, string>,
      })),
    );
    // Each component may follow from one earlier one, never from that one's first case.
    for (let target = 1; target < names.length; target++) {
      if (random.chance(0.5)) continue;
      const from = (cases[random.below(target)] as (typeof cases)[number]).slice(1);
      for (const option of from) {
        if (random.chance(0.5)) {
          option.implies[names[target] as string] = random.pick(cases[target] as (typeof cases)[number]).name;
        }
      }
    }
    return new RewardSpec<Row>({
      name: 'random',
      components: names.map((name, i) => ({
        name,
        cases: cases[i] as (typeof cases)[number],
        verify: (_, row) => row[name] as string,
      })),
    });
  }

  function rowsOf(spec: RewardSpec<Row>): Row[] {
    return spec.components.reduce<Row[]>(
      (rows, component) =>
        'cases' in component
          ? rows.flatMap((row) =>
              component.cases.map((option) => ({ ...row, [component.name]: option.name })),
            )
          : rows,
      [{}],
    );
  }

  test('for random specifications and every view', async () => {
    const random = new Random(7);
    for (let trial = 0; trial < 60; trial++) {
      const spec = randomSpec(random);
      const names = spec.components.map((component) => component.name);
      const scores = await Promise.all(rowsOf(spec).map((row) => spec.judge(completion, row)));
      const totals = sorted(scores.map((score) => score.total));
      expect(sorted(spec.totals() ?? [])).toEqual(totals);
      expect(spec.bounds()).toEqual({ least: totals[0], greatest: totals.at(-1) });

      const chosen = names.filter(() => random.chance(0.6));
      const partial = chosen.length > 0 ? chosen : [names[0] as string];
      const partTotals = scores.map(({ parts }) =>
        partial.reduce((sum, name) => sum + (parts[name]?.score ?? Number.NaN), 0),
      );
      for (const [view, expected] of [
        ['full', totals],
        ['adverse', sorted(totals.map((total) => -total))],
        [{ partial }, sorted(partTotals)],
        [{ template: 'These hold.\n{{rules}}' }, totals],
      ] as const) {
        const text = spec.describe(view);
        const rules = readRules(text);
        expect(totalsInText(rules)).toEqual(expected);
        if (rules.listed) expect(sorted(rules.listed)).toEqual(expected);
        const shown = typeof view === 'object' && 'partial' in view ? view.partial : names;
        expect([...rules.components.keys()].sort()).toEqual(
          shown.map((name) => name.replaceAll('_', ' ')).sort(),
        );
        for (const hidden of names.filter((name) => !shown.includes(name))) {
          expect(text.toLowerCase()).not.toContain(hidden.replaceAll('_', ' '));
        }
      }
      expect(spec.describe('none')).toBe('');
    }
  });
});

describe('score', () => {
  test('gives total, parts and cases; verifiers may be asynchronous', async () => {
    const seen: unknown[] = [];
    const spec = new RewardSpec<{ key: string }>({
      name: 'two',
      components: [
        {
          name: 'first',
          cases: [
            { name: 'a', score: 0.1, sentence: 'if a' },
            { name: 'b', score: -1, sentence: 'if b' },
          ],
          verify: async (_, row) => {
            await new Promise((resolve) => setTimeout(resolve, 2));
            return row.key;
          },
        },
        {
          name: 'second',
          cases: [{ name: 'only', score: 0.2, sentence: 'in any case' }],
          verify: (parsed, row, { cases }) => {
            seen.push(parsed.raw, row.key, cases);
            return 'only';
          },
        },
      ],
    });
    expect(await spec.judge(completion, { key: 'a' })).toEqual({
      total: 0.3,
      parts: { first: { case: 'a', score: 0.1 }, second: { case: 'only', score: 0.2 } },
    });
    expect(seen).toEqual(['x', 'a', { first: 'a' }]);
  });

  test('an implied case is not verified', async () => {
    let asked = 0;
    const spec = new RewardSpec<string>({
      name: 'implied',
      components: [
        {
          name: 'gate',
          cases: [
            { name: 'open', score: 1, sentence: 'if open' },
            { name: 'shut', score: -1, sentence: 'otherwise', implies: { rest: 'bad' } },
          ],
          verify: (_, row) => row,
        },
        {
          name: 'rest',
          cases: [
            { name: 'good', score: 2, sentence: 'if good' },
            { name: 'bad', score: -2, sentence: 'otherwise' },
          ],
          verify: () => {
            asked++;
            return 'good';
          },
        },
      ],
    });
    expect((await spec.judge(completion, 'shut')).total).toBe(-3);
    expect(asked).toBe(0);
    expect((await spec.judge(completion, 'open')).total).toBe(3);
    expect(asked).toBe(1);
    expect(spec.totals()).toEqual([3, -1, -3]);
    expect(spec.describe('full')).toContain('-1 point otherwise; the rest score is then -2 points.');
    expect(spec.describe({ partial: ['gate'] })).not.toContain('rest');
  });

  test('a numeric component adds what it measures', async () => {
    const spec = new RewardSpec<number>({
      name: 'measured',
      components: [
        {
          name: 'brevity',
          range: [0, 0.5],
          sentence: 'the shorter the answer, the more',
          verify: (_, row) => row,
        },
      ],
    });
    expect(await spec.judge(completion, 0.25)).toEqual({
      total: 0.25,
      parts: { brevity: { case: 'measured', score: 0.25 } },
    });
    expect(spec.totals()).toBeUndefined();
    expect(spec.bounds()).toEqual({ least: 0, greatest: 0.5 });
    expect(spec.describe('full')).toContain('from 0 to +0.5 points: the shorter the answer, the more.');
    expect(spec.describe('adverse')).toContain('from 0 to -0.5 points');
    expect(spec.highest).toBe(0.5);
    expect(spec.isHighest(await spec.judge(completion, 0.5))).toBe(true);
    expect(spec.isHighest(await spec.judge(completion, 0.4))).toBe(false);
    for (const wrong of [Number.NaN, 0.6, -0.1, Number.POSITIVE_INFINITY]) {
      const error = await failureOf(() => spec.judge(completion, wrong));
      expect(error.code).toBe('VERIFIER_FAILED');
      expect(error.message).toContain(`from 0 to 0.5 from the verifier of brevity`);
      expect(error.message).toContain(String(wrong));
    }
  });
});

test('the highest score is a matter of cases where there are any', async () => {
  const spec = new RewardSpec<{ key: string; share: number }>({
    name: 'mixed',
    components: [
      { name: 'share', range: [-1, 1], sentence: 'the share', verify: (_, row) => row.share },
      {
        name: 'verdict',
        cases: [
          { name: 'low', score: -2, sentence: 'if low' },
          { name: 'high', score: 0.5, sentence: 'if high' },
        ],
        verify: (_, row) => row.key,
      },
    ],
  });
  expect(spec.highest).toBe(0.5);
  expect(spec.bounds()).toEqual({ least: -3, greatest: 1.5 });
  expect(spec.isHighest(await spec.judge(completion, { key: 'high', share: -1 }))).toBe(true);
  expect(spec.isHighest(await spec.judge(completion, { key: 'low', share: 1 }))).toBe(false);
});

test('many verifiers at once leave the event loop its turns', async () => {
  const spec = yesOrNo(() => {
    const until = performance.now() + 2;
    while (performance.now() < until);
    return 'yes';
  });
  let longest = 0;
  let last = performance.now();
  const timer = setInterval(() => {
    longest = Math.max(longest, performance.now() - last);
    last = performance.now();
  }, 1);
  await Promise.all(Array.from({ length: 200 }, () => spec.judge(completion, {})));
  clearInterval(timer);
  expect(longest).toBeGreaterThan(0);
  expect(longest).toBeLessThan(200);
});

describe('verifiers that fail', () => {
  test('by throwing, at once or later', async () => {
    const thrown = new TypeError('no such field');
    for (const verify of [
      () => {
        throw thrown;
      },
      async () => {
        throw thrown;
      },
    ]) {
      const error = await failureOf(() => yesOrNo(verify).judge(completion, { id: 'q17' }));
      expect(error.code).toBe('VERIFIER_FAILED');
      expect(error.message).toBe('The verifier of agreement (reward test, row q17) threw: no such field');
      expect(error.cause).toBe(thrown);
    }
    const bare = await failureOf(() =>
      yesOrNo(() => {
        throw 'a string';
      }).judge(completion, { a: 1 }, { label: 'row 5' }),
    );
    expect(bare.message).toContain('row row 5) threw: a string');
  });

  test('by returning what is no case', async () => {
    for (const value of [Number.NaN, undefined, null, 'maybe', 1, true, {}]) {
      const error = await failureOf(() => yesOrNo(() => value).judge(completion, { q: 'Why?' }));
      expect(error.code).toBe('VERIFIER_FAILED');
      expect(error.message).toContain('one of the cases yes, no from the verifier of agreement');
      expect(error.message).toContain('{"q":"Why?"}');
    }
  });

  test.each([
    ['a promise that never settles', () => new Promise(() => {})],
    [
      'a loop without an end',
      () => {
        for (;;);
      },
    ],
    ['a regular expression that backtracks', () => /^(a+)+$/.test(`${'a'.repeat(40)}b`)],
  ])('by hanging in %s', async (_, verify) => {
    const started = performance.now();
    const error = await failureOf(() => yesOrNo(verify, 0.05).judge(completion, { index: 3 }));
    expect(error.code).toBe('VERIFIER_TIMEOUT');
    expect(error.message).toBe('The verifier of agreement (reward test, row 3) took longer than 0.05 s');
    expect(performance.now() - started).toBeLessThan(5000);
    expect(await yesOrNo(() => 'yes').judge(completion, {})).toMatchObject({ total: 1 });
  });

  test('are told by their signal when the time is up', async () => {
    let told = false;
    const spec = yesOrNo((_, signal) => {
      signal.addEventListener('abort', () => {
        told = true;
      });
      return new Promise(() => {});
    }, 0.02);
    await failureOf(() => spec.judge(completion, {}));
    expect(told).toBe(true);
  });

  test('abort ends the wait', async () => {
    const controller = new AbortController();
    const waiting = failureOf(() =>
      yesOrNo(() => new Promise(() => {})).judge(completion, {}, { signal: controller.signal }),
    );
    controller.abort();
    expect((await waiting).code).toBe('ABORTED');
    const early = await failureOf(() =>
      yesOrNo(() => 'yes').judge(completion, {}, { signal: controller.signal }),
    );
    expect(early.code).toBe('ABORTED');
  });

  test('a verifier may score with another specification', async () => {
    const inner = yesOrNo(() => 'yes');
    const outer = yesOrNo(async () => ((await inner.judge(completion, {})).total === 1 ? 'yes' : 'no'));
    expect((await outer.judge(completion, {})).total).toBe(1);
  });
});

describe('templates', () => {
  const spec = yesOrNo(() => 'yes');

  test('fill their variables in', () => {
    const template =
      'Agree: {{ scores.agreement.yes }}, else {{scores.agreement.no}}.\n{{components.agreement}}\n{x} {{totals}}\n';
    expect(spec.describe({ template })).toBe(
      'Agree: +1, else 0.\nAgreement:\n+1 point if so.\n0 points if not.\n{x} +1 or 0 points',
    );
    expect(spec.describe({ template: '{{rules}}' })).toBe(spec.describe('full'));
  });

  test('name what they do not know', async () => {
    for (const unknown of ['{{rule}}', '{{components.format}}', '{{scores.agreement.maybe}}', '{{}}']) {
      const error = await failureOf(() => spec.describe({ template: `a ${unknown} b` }));
      expect(error.code).toBe('INVALID_ARGUMENT');
      expect(error.message).toContain(unknown);
      expect(error.message).toContain(
        '{{rules}}, {{totals}}, {{components.agreement}}, {{scores.agreement.yes}}',
      );
    }
  });

  test('a partial view names what it does not know', async () => {
    const error = await failureOf(() => spec.describe({ partial: ['agreement', 'style'] }));
    expect(error.code).toBe('INVALID_ARGUMENT');
    expect(error.message).toBe(
      'Expected one or more of agreement for partial motivation but received "style" of type string',
    );
  });
});

describe('specifications that cannot be', () => {
  const option = { name: 'a', score: 1, sentence: 'if a' };
  const component = (more: object): Component =>
    ({ name: 'x', cases: [option], verify: () => 'a', ...more }) as Component;

  test.each<[string, Component[], string]>([
    ['no component', [], 'at least one component'],
    ['no list of components', undefined as never, 'at least one component but received undefined'],
    ['no verifier', [component({ verify: undefined })], 'verifier of x but received undefined'],
    ['a sentence of two lines', [component({ cases: [{ ...option, sentence: 'a\nb' }] })], 'sentence of x.a'],
    [
      'no sentence',
      [component({ cases: [{ name: 'a', score: 1 }] })],
      'sentence of x.a but received undefined',
    ],
    ['no case', [component({ cases: [] })], 'at least one case for x'],
    ['two components of one name', [component({}), component({})], 'x twice'],
    ['two cases of one name', [component({ cases: [option, option] })], 'x.a twice'],
    [
      'a score that is no number',
      [component({ cases: [{ ...option, score: Number.NaN }] })],
      'score of x.a but received NaN',
    ],
    ['a name with spaces', [component({ name: 'x y' })], '"x y"'],
    ['an empty range', [{ name: 'x', range: [1, 1], sentence: 'x', verify: () => 1 }], 'range of x'],
    [
      'an implied case that does not exist',
      [component({ cases: [{ ...option, implies: { y: 'b' } }] }), component({ name: 'y' })],
      'x.a implies but received y.b',
    ],
    [
      'an implied case of an earlier component',
      [component({ name: 'y' }), component({ cases: [{ ...option, implies: { y: 'a' } }] })],
      'x.a implies but received y.a',
    ],
    [
      'contradictory implications',
      [
        component({ name: 'p', cases: [{ ...option, implies: { r: 'a' } }] }),
        component({ name: 'q', cases: [{ ...option, implies: { r: 'b' } }] }),
        component({ name: 'r', cases: [option, { ...option, name: 'b' }] }),
      ],
      'p.a and q.a imply different ones',
    ],
  ])('%s', async (_, components, part) => {
    const error = await failureOf(() => new RewardSpec({ name: 'broken', components }));
    expect(error.code).toBe('INVALID_ARGUMENT');
    expect(error.message).toContain(part);
    expect(error.message).toContain('reward broken');
  });

  test('a time limit that is none', async () => {
    for (const timeoutSeconds of [0, -1, Number.NaN, Number.POSITIVE_INFINITY]) {
      expect((await failureOf(() => yesOrNo(() => 'yes', timeoutSeconds))).message).toContain(
        'timeoutSeconds',
      );
    }
  });
});
