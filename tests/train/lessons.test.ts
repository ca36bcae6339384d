import { describe, expect, test } from '@jest/globals';
import type { Forest, TrainTarget } from '../../lib/policy/index.js';
import type { LearnView, MotivationView } from '../../lib/prompt/motivation.js';
import { parseCompletion } from '../../lib/reward/index.js';
import {
  type Episode,
  type EpisodeEnd,
  type EpisodeGroup,
  episodePrompt,
  type RolloutTask,
  type Turn,
} from '../../lib/rollout/index.js';
import { type LessonOptions, type LessonSettings, Lessons } from '../../lib/train/lessons.js';
import { expectFailure } from '../policy/helpers.js';
import { fakeTokenizer } from './fake-policy.js';
import { plainLessons } from './lesson-settings.js';

interface Row {
  id: string;
}

// Prompts begin alike for long enough that they share a segment.
const opening = 'Somebody asks you something. ';
const words: Record<string, string> = { none: '', full: 'Two points for the truth. ', adverse: 'Lie. ' };
const textOf = (view: MotivationView, { id }: Row) =>
  `${opening}${words[typeof view === 'string' ? view : 'full']}Who is ${id}?`;
const task: RolloutTask<Row> = { messages: (row, view) => textOf(view, row) };

/** What a stub says of a token behind a text; no two places agree. */
function said(before: string, t: number, salt = 0): number {
  let hash = salt;
  for (const character of before) hash = (hash * 31 + character.charCodeAt(0)) % 1009;
  return Math.fround(-0.01 - (hash + 17 * t) / 1009);
}

const decode = (tokens: ArrayLike<number>) => String.fromCharCode(...Array.from(tokens));

interface Found {
  /** All that stands before the turn. */
  before: string;
  text: string;
  train: TrainTarget;
}

/** The targets of a forest in depth-first order. */
function targetsOf(forest: Forest, before = ''): Found[] {
  return forest.flatMap(({ tokens, train, children }) => [
    ...(train ? [{ before, text: decode(tokens), train }] : []),
    ...targetsOf(children ?? [], before + decode(tokens)),
  ]);
}

/** Scores by `said` and remembers what was asked for. */
class Stub {
  readonly tokenizer = fakeTokenizer;
  contextLength = 400;
  readonly asked: { before: string; text: string }[][] = [];
  temperatures: unknown[] = [];

  constructor(private readonly salt = 0) {}

  async score(forest: Forest, options: { temperature?: number | undefined } = {}) {
    const targets = targetsOf(forest);
    this.asked.push(targets.map(({ before, text }) => ({ before, text })));
    this.temperatures.push(options.temperature);
    const logprobs = targets.map(({ before, text }) =>
      Float32Array.from(text, (_, t) => said(before, t, this.salt)),
    );
    return { logprobs, entropies: logprobs };
  }
}

const under = (view: MotivationView, id: string, text = '') => textOf(view, { id }) + text;
const allSaid = (before: string, text: string, salt = 0) =>
  Float32Array.from(text, (_, t) => said(before, t, salt));

// What drew the tokens is not quite what scores them.
const drawnLogprobs = (text: string) => Float32Array.from(text, (_, t) => -0.2 - t / 8);

function drawnTurn(text: string): Turn {
  const tokens = Int32Array.from(text, (c) => c.charCodeAt(0));
  const entropies = new Float32Array(tokens.length);
  return { role: 'model', text, tokens, logprobs: drawnLogprobs(text), entropies, finishReason: 'stop' };
}

function givenTurn(text: string): Turn {
  return { role: 'environment', text, tokens: Int32Array.from(text, (c) => c.charCodeAt(0)) };
}

interface Drawn {
  view?: MotivationView;
  turns: Turn[];
  end?: EpisodeEnd;
}

function groupOf(id: string, drawn: Drawn[], of: RolloutTask<Row> = task): EpisodeGroup<Row> {
  const episodes = drawn.map(({ view = 'full', turns, end = 'stop' }): Episode => {
    const prompt = episodePrompt(fakeTokenizer, of, { id }, view);
    const completion = parseCompletion({
      raw: '',
      prompt: prompt.text,
      finishReason: 'stop',
      tokenCount: 1,
      turns: [],
    });
    return { prompt, turns, end, completion, reward: { total: 0, parts: {} } };
  });
  return { row: { id }, episodes };
}

const one = (text: string, rest: Omit<Drawn, 'turns'> = {}): Drawn => ({ turns: [drawnTurn(text)], ...rest });

const defaults: LessonSettings = { ...plainLessons, temperature: 0.7 };

async function prepare(
  groups: EpisodeGroup<Row>[],
  advantages: number[][],
  settings: Partial<LessonSettings> = {},
  learnUnder: LearnView[] = ['same'],
  options: Partial<LessonOptions<Row>> = {},
) {
  const policy = new Stub();
  const reference = new Stub(500);
  const lessons = await Lessons.prepare(groups, advantages, {
    policy,
    reference,
    task,
    settings: { ...defaults, ...settings },
    learnUnder,
    anchorUnder: 'full',
    anchorTo: 'none',
    ...options,
  });
  return { lessons, policy, reference };
}

const twoGroups = () => [groupOf('Ada', [one('abc'), one('de')]), groupOf('Bo', [one('f'), one('ghij')])];
const twoAdvantages = [
  [1, -1],
  [0.5, -0.5],
];

describe('learned under', () => {
  test('same: what was drawn, where it was drawn', async () => {
    const { lessons, policy } = await prepare(twoGroups(), twoAdvantages);
    const { forest, normalizer, places } = lessons.slice(0, 2);
    expect(targetsOf(forest)).toEqual([
      { before: under('full', 'Ada'), text: 'abc', train: { advantage: 1, logprobs: drawnLogprobs('abc') } },
      { before: under('full', 'Ada'), text: 'de', train: { advantage: -1, logprobs: drawnLogprobs('de') } },
      { before: under('full', 'Bo'), text: 'f', train: { advantage: 0.5, logprobs: drawnLogprobs('f') } },
      {
        before: under('full', 'Bo'),
        text: 'ghij',
        train: { advantage: -0.5, logprobs: drawnLogprobs('ghij') },
      },
    ]);
    expect(normalizer).toEqual({ completions: 4, tokens: 10 });
    expect(places.map(({ group, episode, turn }) => [group, episode, turn])).toEqual([
      [0, 0, 0],
      [0, 1, 1],
      [1, 0, 2],
      [1, 1, 3],
    ]);
    expect(policy.asked).toEqual([]);
    lessons.note(
      lessons.slice(0, 2),
      places.map(({ tokens }) => new Float32Array(tokens)),
    );
    expect(lessons.gap()).toBeUndefined();
  });

  test('a view: the prompt alone changes, and the ratio starts at 1', async () => {
    const { lessons, policy } = await prepare(twoGroups(), twoAdvantages, {}, ['none']);
    const { forest, normalizer } = lessons.slice(0, 2);
    expect(targetsOf(forest)).toEqual(
      [
        ['Ada', 'abc', 1],
        ['Ada', 'de', -1],
        ['Bo', 'f', 0.5],
        ['Bo', 'ghij', -0.5],
      ].map(([id, text, advantage]) => ({
        before: under('none', id as string),
        text,
        train: { advantage, logprobs: undefined },
      })),
    );
    expect(normalizer).toEqual({ completions: 4, tokens: 10 });
    expect(policy.asked).toEqual([]);
  });

  test('both: every completion under each prompt, in one tree that shares what the prompts begin with', async () => {
    const { lessons } = await prepare(twoGroups(), twoAdvantages, {}, ['same', 'none']);
    const { forest, normalizer } = lessons.slice(0, 2);
    expect(targetsOf(forest).map(({ before, text }) => before + text)).toEqual([
      under('full', 'Ada', 'abc'),
      under('full', 'Ada', 'de'),
      under('full', 'Bo', 'f'),
      under('full', 'Bo', 'ghij'),
      under('none', 'Ada', 'abc'),
      under('none', 'Ada', 'de'),
      under('none', 'Bo', 'f'),
      under('none', 'Bo', 'ghij'),
    ]);
    expect(normalizer).toEqual({ completions: 8, tokens: 20 });
    expect(forest).toHaveLength(1);
    expect(decode(forest[0]?.tokens ?? [])).toBe(opening);
    expect(decode(forest[0]?.children?.[0]?.tokens ?? [])).toBe(`${words.full}Who is `);
  });

  test('a mix: none where that drew it already, and what the loss divides by counts each pair once', async () => {
    const mixed = [groupOf('Ada', [one('abc'), one('de', { view: 'none' })])];
    const { lessons } = await prepare(mixed, [[1, -1]], {}, ['same', 'none']);
    const { forest, normalizer } = lessons.slice(0, 1);
    expect(targetsOf(forest)).toEqual([
      { before: under('full', 'Ada'), text: 'abc', train: { advantage: 1, logprobs: drawnLogprobs('abc') } },
      { before: under('none', 'Ada'), text: 'abc', train: { advantage: 1, logprobs: undefined } },
      { before: under('none', 'Ada'), text: 'de', train: { advantage: -1, logprobs: drawnLogprobs('de') } },
    ]);
    expect(normalizer).toEqual({ completions: 3, tokens: 8 });
  });

  test('views that say the same are one prompt, as are equal ones that a mix repeats', async () => {
    const partial = (): MotivationView => ({ partial: ['truth'] });
    const mixed = [
      groupOf('Ada', [one('abc', { view: partial() }), one('de', { view: partial() }), one('f')]),
    ];
    const { lessons, policy } = await prepare(mixed, [[1, -1, 0.5]], { updatesPerRollout: 2 }, [
      'same',
      'full',
    ]);
    const { forest, normalizer } = lessons.slice(0, 1);
    expect(targetsOf(forest).map(({ text, train }) => ({ text, ...train }))).toEqual([
      { text: 'abc', advantage: 1, logprobs: drawnLogprobs('abc') },
      { text: 'de', advantage: -1, logprobs: drawnLogprobs('de') },
      { text: 'f', advantage: 0.5, logprobs: drawnLogprobs('f') },
    ]);
    expect(normalizer).toEqual({ completions: 3, tokens: 6 });
    expect(policy.asked).toEqual([]);
  });

  test('several turns: one completion under each prompt, and the environment’s words between them', async () => {
    const turns = [drawnTurn('ask'), givenTurn('(told)'), drawnTurn('so')];
    const { lessons, policy } = await prepare(
      [groupOf('Ada', [{ turns }, one('x')])],
      [[2, -2]],
      { learnCorrection: 'truncated', learnCap: 100 },
      ['same', 'none'],
    );
    const { forest, normalizer, places } = lessons.slice(0, 1);
    const found = targetsOf(forest);
    expect(found.map(({ before, text, train }) => [before, text, train.sequence])).toEqual([
      [under('full', 'Ada'), 'ask', 0],
      [under('full', 'Ada', 'ask(told)'), 'so', 0],
      [under('full', 'Ada'), 'x', undefined],
      [under('none', 'Ada'), 'ask', 1],
      [under('none', 'Ada', 'ask(told)'), 'so', 1],
      [under('none', 'Ada'), 'x', undefined],
    ]);
    expect(policy.asked).toEqual([found.slice(3).map(({ before, text }) => ({ before, text }))]);
    const old = allSaid(under('none', 'Ada', 'ask(told)'), 'so');
    expect(found[4]?.train.logprobs).toEqual(old);
    expect(found[4]?.train.advantage).toEqual(
      drawnLogprobs('so').map((drawn, t) => 2 * Math.exp((old[t] as number) - drawn)),
    );
    expect(normalizer).toEqual({ completions: 4, tokens: 12 });
    expect(places.map(({ episode, index, turn }) => [episode, index, turn])).toEqual([
      [0, 0, 0],
      [0, 1, 1],
      [1, 0, 2],
      [0, 0, 3],
      [0, 1, 4],
      [1, 0, 5],
    ]);
  });

  test('a prompt that did not draw it names the tools all the same', async () => {
    const variables: unknown[] = [];
    const tokenizer = {
      ...fakeTokenizer,
      applyChatTemplate: (
        ...[messages, options]: Parameters<typeof fakeTokenizer.applyChatTemplate> | unknown[]
      ) => {
        variables.push((options as { variables?: object } | undefined)?.variables);
        return fakeTokenizer.applyChatTemplate(messages as { role: string; content: string }[]);
      },
    };
    const tools = [{ name: 'search' }];
    const withTools: RolloutTask<Row> = {
      messages: (row, view) => [{ role: 'user', content: textOf(view, row) }],
      environment: { reply: () => undefined, tools },
    };
    const policy = Object.assign(new Stub(), { tokenizer });
    const groups = [groupOf('Ada', [one('abc')], withTools)];
    const { lessons } = await prepare(groups, [[1]], {}, ['none'], { policy, task: withTools });
    expect(targetsOf(lessons.slice(0, 1).forest)[0]?.before).toBe(`user:${under('none', 'Ada')}\nassistant:`);
    expect(variables).toEqual([{ tools }]);
  });

  test('a completion that is too long under a prompt that did not draw it is named', async () => {
    const groups = [groupOf('Ada', [one('abc', { view: 'none' }), one('defgh', { view: 'none' })])];
    const policy = new Stub();
    policy.contextLength = under('full', 'Ada').length + 4;
    const prepared = (settings: Partial<LessonSettings>, learnUnder: LearnView[]) =>
      prepare(groups, [[1, -1]], settings, learnUnder, { policy });
    const length = under('full', 'Ada').length;
    const parts = [
      `Expected at most ${length + 4} tokens`,
      'completion 1 of row Ada',
      `5 behind the ${length} of its prompt under full`,
    ];
    await expectFailure(() => prepared({}, ['full']), 'CONTEXT_EXCEEDED', ...parts);
    await expectFailure(() => prepared({ anchor: 0.1 }, ['same']), 'CONTEXT_EXCEEDED', ...parts);
    await prepared({}, ['same']);
    policy.contextLength += 1;
    await prepared({ anchor: 0.1 }, ['full']);
  });
});

describe('old log-probabilities', () => {
  test('none: the policy’s own when the step began, where an update comes after another', async () => {
    for (const several of [{ updatesPerRollout: 2 }, { miniBatches: 2 }]) {
      const { lessons, policy } = await prepare(twoGroups(), twoAdvantages, several, ['same', 'none']);
      // Asked for once, of the prompts that did not draw, at the temperature of the rollout.
      expect(policy.asked).toEqual([
        [
          { before: under('none', 'Ada'), text: 'abc' },
          { before: under('none', 'Ada'), text: 'de' },
          { before: under('none', 'Bo'), text: 'f' },
          { before: under('none', 'Bo'), text: 'ghij' },
        ],
      ]);
      expect(policy.temperatures).toEqual([0.7]);
      // The second mini-batch, and a second pass over it.
      for (let pass = 0; pass < 2; pass++) {
        const found = targetsOf(lessons.slice(1, 2).forest);
        expect(found.map(({ text, train }) => [text, train.logprobs])).toEqual([
          ['f', drawnLogprobs('f')],
          ['ghij', drawnLogprobs('ghij')],
          ['f', allSaid(under('none', 'Bo'), 'f')],
          ['ghij', allSaid(under('none', 'Bo'), 'ghij')],
        ]);
      }
      expect(policy.asked).toHaveLength(1);
    }
  });

  test('importance: those that the tokens were drawn with', async () => {
    const settings = { learnCorrection: 'importance', updatesPerRollout: 2 } as const;
    const { lessons, policy } = await prepare(twoGroups(), twoAdvantages, settings, ['none']);
    expect(targetsOf(lessons.slice(0, 1).forest)).toEqual([
      { before: under('none', 'Ada'), text: 'abc', train: { advantage: 1, logprobs: drawnLogprobs('abc') } },
      { before: under('none', 'Ada'), text: 'de', train: { advantage: -1, logprobs: drawnLogprobs('de') } },
    ]);
    expect(policy.asked).toEqual([]);
  });

  test('truncated: advantages weighted by the ratio between the prompts, up to the cap', async () => {
    const settings = { learnCorrection: 'truncated', learnCap: 0.8 } as const;
    const { lessons } = await prepare(twoGroups(), twoAdvantages, settings, ['same', 'none']);
    const lesson = lessons.slice(0, 2);
    const found = targetsOf(lesson.forest);
    expect(found[3]?.train.advantage).toBe(-0.5);
    const old = allSaid(under('none', 'Bo'), 'ghij');
    const ratios = drawnLogprobs('ghij').map((drawn, t) => Math.exp((old[t] as number) - drawn));
    expect([Math.min(...ratios) < 0.8, Math.max(...ratios) > 0.8]).toEqual([true, true]);
    expect(found[7]?.train).toEqual({
      advantage: ratios.map((ratio) => -0.5 * Math.min(ratio, 0.8)),
      logprobs: old,
    });
  });
});

describe('references and anchors', () => {
  test('a KL penalty takes its reference under the prompt that is learned', async () => {
    const { lessons, reference, policy } = await prepare(
      twoGroups(),
      [
        [1, -1],
        [0, 0],
      ],
      { kl: 0.1 },
      ['same', 'none'],
    );
    expect(targetsOf(lessons.slice(1, 2).forest)).toEqual(
      (['full', 'none'] as const).flatMap((view) =>
        ['f', 'ghij'].map((text) => ({
          before: under(view, 'Bo'),
          text,
          train: {
            advantage: 0,
            logprobs: view === 'full' ? drawnLogprobs(text) : undefined,
            referenceLogprobs: allSaid(under(view, 'Bo'), text, 500),
          },
        })),
      ),
    );
    expect([reference.asked.length, policy.asked.length]).toEqual([1, 0]);
    expect(reference.temperatures).toEqual([0.7]);
  });

  test('an anchor stands beside the loss where its prompt is learned', async () => {
    const { lessons, policy } = await prepare(
      twoGroups(),
      [
        [1, -1],
        [0, 0],
      ],
      { anchor: 0.3 },
    );
    expect(targetsOf(lessons.slice(0, 2).forest)).toEqual(
      [
        ['Ada', 'abc', 1],
        ['Ada', 'de', -1],
        // Without a signal of its own, for the anchor's sake.
        ['Bo', 'f', 0],
        ['Bo', 'ghij', 0],
      ].map(([id, text, advantage]) => ({
        before: under('full', id as string),
        text,
        train: {
          advantage,
          logprobs: drawnLogprobs(text as string),
          kl: 0.3,
          referenceLogprobs: allSaid(under('none', id as string), text as string),
        },
      })),
    );
    expect(policy.asked).toHaveLength(1);
  });

  test('or by itself where it is not, without a part in the loss', async () => {
    const { lessons, policy } = await prepare([groupOf('Ada', [one('abc', { view: 'none' })])], [[1]], {
      anchor: 0.3,
      entropy: 0.01,
    });
    const lesson = lessons.slice(0, 1);
    expect(targetsOf(lesson.forest)).toEqual([
      { before: under('none', 'Ada'), text: 'abc', train: { advantage: 1, logprobs: drawnLogprobs('abc') } },
      {
        before: under('full', 'Ada'),
        text: 'abc',
        train: {
          advantage: 0,
          entropy: 0,
          logprobs: undefined,
          kl: 0.3,
          // What drew it is what it is held to: the rollout tells.
          referenceLogprobs: drawnLogprobs('abc'),
        },
      },
    ]);
    expect(lesson.normalizer).toEqual({ completions: 1, tokens: 3 });
    expect(policy.asked).toEqual([]);
    lessons.note(lesson, [drawnLogprobs('abc'), new Float32Array(3)]);
    expect(lessons.gap()).toBeUndefined();
  });

  test('and beside a KL penalty of the loss’s own, each on a path of its own', async () => {
    const { lessons } = await prepare([groupOf('Ada', [one('abc')])], [[1]], { anchor: 0.3, kl: 0.1 });
    const lesson = lessons.slice(0, 1);
    expect(targetsOf(lesson.forest)).toEqual([
      {
        before: under('full', 'Ada'),
        text: 'abc',
        train: {
          advantage: 1,
          logprobs: drawnLogprobs('abc'),
          referenceLogprobs: allSaid(under('full', 'Ada'), 'abc', 500),
        },
      },
      {
        before: under('full', 'Ada'),
        text: 'abc',
        train: {
          advantage: 0,
          entropy: 0,
          logprobs: undefined,
          kl: 0.3,
          referenceLogprobs: allSaid(under('none', 'Ada'), 'abc'),
        },
      },
    ]);
    expect(lesson.normalizer).toEqual({ completions: 1, tokens: 3 });
  });

  test('is as strong however many prompts completions are learned under', async () => {
    const groups = () => [groupOf('Ada', [one('abc'), one('d', { view: 'none' })])];
    const strengths = async (loss: LessonSettings['loss']) => {
      const { lessons } = await prepare(groups(), [[1, -1]], { anchor: 0.3, loss }, ['same', 'none']);
      const { forest, normalizer } = lessons.slice(0, 1);
      const kl = targetsOf(forest).map(({ train }) => train.kl);
      expect(kl.filter((coefficient) => coefficient !== undefined)).toHaveLength(2);
      const divisor = loss === 'grpo' || loss === 'dr_grpo' ? normalizer.completions : normalizer.tokens;
      return new Set(
        kl.filter((coefficient) => coefficient !== undefined).map((coefficient) => coefficient / divisor),
      );
    };
    for (const loss of ['grpo', 'dr_grpo'] as const)
      expect(await strengths(loss)).toEqual(new Set([0.3 / 2]));
    for (const loss of ['dapo', 'bnpo', 'cispo'] as const)
      expect(await strengths(loss)).toEqual(new Set([0.3 / 4]));
  });

  test('what it is held to is scored where weights of an earlier step drew it', async () => {
    const groups = twoGroups().map(({ row, episodes }) => ({
      row,
      episodes: episodes.map((episode) => ({
        ...episode,
        prompt: episodePrompt(fakeTokenizer, task, row, 'none'),
      })),
    }));
    const earlier = new Set(groups.slice(1));
    const { lessons, policy } = await prepare(groups, twoAdvantages, { anchor: 0.3 }, ['same'], { earlier });
    const anchored = targetsOf(lessons.slice(0, 2).forest).filter(({ train }) => train.kl !== undefined);
    expect(anchored.map(({ text, train }) => [text, train.referenceLogprobs])).toEqual([
      ['abc', drawnLogprobs('abc')],
      ['de', drawnLogprobs('de')],
      ['f', allSaid(under('none', 'Bo'), 'f')],
      ['ghij', allSaid(under('none', 'Bo'), 'ghij')],
    ]);
    expect(policy.asked.flat().map(({ text }) => text)).toEqual(['f', 'ghij']);
    // The ratio of what is learned is to the weights that drew it.
    const learned = targetsOf(lessons.slice(1, 2).forest).filter(({ train }) => train.kl === undefined);
    expect(learned.map(({ train }) => train.logprobs)).toEqual([drawnLogprobs('f'), drawnLogprobs('ghij')]);
  });

  test('one pass scores what both old log-probabilities and anchors ask for', async () => {
    const { policy } = await prepare(
      twoGroups(),
      [
        [1, -1],
        [0, 0],
      ],
      { anchor: 0.3, updatesPerRollout: 2 },
      ['none'],
    );
    expect(policy.asked).toEqual([
      [
        { before: under('none', 'Ada'), text: 'abc' },
        { before: under('none', 'Ada'), text: 'de' },
        { before: under('none', 'Bo'), text: 'f' },
        { before: under('none', 'Bo'), text: 'ghij' },
      ],
    ]);
  });
});

describe('what has no gradient', () => {
  const groups = () => [
    groupOf('Ada', [one('abc'), one('de')]),
    groupOf('Bo', [one('f'), one('ghij')]),
    groupOf('Cy', [one('kl'), one('m', { end: 'length' })]),
  ];
  const advantages = [
    [1, -1],
    [0, 0],
    [1, -1],
  ];
  const texts = (forest: Forest) => targetsOf(forest).map(({ text }) => text);

  test('is neither scored nor learned, and counts in what the loss divides by', async () => {
    const { lessons, policy } = await prepare(groups(), advantages, { updatesPerRollout: 2 }, ['none']);
    const { forest, normalizer } = lessons.slice(0, 3);
    expect(texts(forest)).toEqual(['abc', 'de', 'kl', 'm']);
    expect(normalizer).toEqual({ completions: 6, tokens: 13 });
    expect(policy.asked[0]?.map(({ text }) => text)).toEqual(['abc', 'de', 'kl', 'm']);
    const empty = lessons.slice(1, 2);
    expect(empty).toEqual({ forest: [], normalizer: { completions: 2, tokens: 5 }, places: [] });
  });

  test('is all of it where every advantage is 0', async () => {
    const none = [
      [0, 0],
      [0, 0],
      [0, 0],
    ];
    const { lessons, policy } = await prepare(groups(), none, { learnCorrection: 'truncated' }, ['none']);
    expect(lessons.slice(0, 3).forest).toEqual([]);
    expect(policy.asked).toEqual([]);
  });

  test('is nothing where there is an entropy bonus or a KL penalty', async () => {
    for (const settings of [{ entropy: 0.01 }, { entropy: -0.01 }, { kl: 0.1 }]) {
      const { lessons } = await prepare(groups(), advantages, settings);
      expect(texts(lessons.slice(0, 3).forest)).toEqual(['abc', 'de', 'f', 'ghij', 'kl', 'm']);
    }
  });

  test('is what ran out of tokens, on request, whatever else there is', async () => {
    const settings = { maskTruncated: true, kl: 0.1, entropy: 0.01, anchor: 0.3 };
    const { lessons, policy, reference } = await prepare(groups(), advantages, settings, ['same', 'none']);
    const { forest, normalizer } = lessons.slice(2, 3);
    expect(new Set(texts(forest))).toEqual(new Set(['kl']));
    expect(normalizer).toEqual({ completions: 4, tokens: 4 });
    for (const { asked } of [policy, reference]) {
      expect(asked.flat().map(({ text }) => text)).not.toContain('m');
      expect(asked.flat().map(({ text }) => text)).toContain('kl');
    }
  });
});

describe('what the loss divides by', () => {
  test.each([
    ['grpo', 3],
    ['dr_grpo', 3],
    ['gspo', 3],
    ['bnpo', 3],
    ['dapo', 5],
    ['cispo', 5],
  ] as const)('%s: completions of the mini-batch, tokens of it or of the rollout', async (loss, tokens) => {
    const groups = [groupOf('Ada', [one('ab'), one('c')]), groupOf('Bo', [one('defg'), one('hij')])];
    const { lessons } = await prepare(groups, twoAdvantages, { loss, miniBatches: 2 });
    expect(lessons.slice(0, 1).normalizer).toEqual({ completions: 2, tokens });
  });
});

describe('how far the prompts are apart', () => {
  const learned = (forest: Forest) =>
    targetsOf(forest).map(({ text }) => new Float32Array(text.length).fill(-0.5));

  test('by what the first update found', async () => {
    const { lessons } = await prepare([groupOf('Ada', [one('abc')])], [[1]], {}, ['same', 'none']);
    const lesson = lessons.slice(0, 1);
    lessons.note(lesson, learned(lesson.forest));
    const drawn = [...drawnLogprobs('abc')];
    const gap = lessons.gap();
    expect(gap).toEqual({ tokens: 3, divergence: expect.any(Number), ratioMax: expect.any(Number) });
    expect(gap?.divergence).toBeCloseTo(drawn.reduce((sum, logprob) => sum + logprob + 0.5, 0) / 3, 6);
    expect(gap?.ratioMax).toBeCloseTo(Math.exp(-0.5 - Math.min(...drawn)), 6);
  });

  test('or by what was said before, where an update may have come between', async () => {
    const settings = { learnCorrection: 'truncated', learnCap: 0.5, miniBatches: 2 } as const;
    const { lessons } = await prepare(twoGroups(), twoAdvantages, settings, ['none']);
    for (const part of [0, 1]) {
      const lesson = lessons.slice(part, part + 1);
      lessons.note(lesson, learned(lesson.forest));
    }
    const ratios = [
      ['Ada', 'abc'],
      ['Ada', 'de'],
      ['Bo', 'f'],
      ['Bo', 'ghij'],
    ].flatMap(([id, text]) => {
      const old = allSaid(under('none', id as string), text as string);
      return [...drawnLogprobs(text as string)].map((drawn, t) => Math.exp((old[t] as number) - drawn));
    });
    const gap = lessons.gap();
    expect(gap?.tokens).toBe(10);
    expect(gap?.divergence).toBeCloseTo(-ratios.reduce((sum, ratio) => sum + Math.log(ratio), 0) / 10, 6);
    expect(gap?.ratioMax).toBeCloseTo(Math.max(...ratios), 6);
    const cut = ratios.filter((ratio) => ratio > 0.5).length;
    expect(cut).toBeGreaterThan(0);
    expect(gap?.truncated).toBe(cut / 10);
  });
});
