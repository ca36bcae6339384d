import { beforeAll, describe, expect, test } from '@jest/globals';
import { defaultModel, forestOf, openModel, Tokenizer } from '../../lib/policy/index.js';
import { RewardSpec } from '../../lib/reward/index.js';
import {
  branchesOf,
  type CollectOptions,
  collect,
  drawnTurns,
  type Episode,
  type EpisodeGroup,
  type Turn,
  textOf,
} from '../../lib/rollout/index.js';
import { defineTask, type Environment, type ModelTurn, type Task } from '../../lib/tasks/index.js';
import { expectFailure, failure } from '../policy/helpers.js';
import { ScriptedPolicy, type ScriptedTurn } from './scripted-policy.js';

interface Row {
  id: number;
}

type Call = ScriptedPolicy['calls'][number];

/** The tokenizer of the model that ships, with another chat template where one is given. */
async function tokenizerWith(chatTemplate?: string): Promise<Tokenizer> {
  const { tokenizer } = await openModel(defaultModel());
  return new Tokenizer({ ...tokenizer, ...(chatTemplate && { chatTemplate }) }, 'test');
}

let tokenizer: Tokenizer;
beforeAll(async () => {
  tokenizer = await tokenizerWith();
});

async function taskWith(
  environment?: Environment<Row>,
  verify: (text: string, row: Row, signal: AbortSignal) => string | Promise<string> = (text) =>
    text.includes('Zoey') ? 'right' : 'wrong',
): Promise<Task<Row>> {
  return defineTask<Row>({
    name: 'who',
    spec: new RewardSpec<Row>({
      name: 'who',
      components: [
        {
          name: 'name',
          cases: [
            { name: 'right', score: 1, sentence: 'if it is Zoey' },
            { name: 'wrong', score: 0, sentence: 'otherwise' },
          ],
          verify: (completion, row, { signal }) => verify(completion.text, row, signal),
        },
      ],
    }),
    data: Array.from({ length: 40 }, (_, id) => ({ id })),
    messages: ({ id }) => [{ role: 'user', content: `Who is number ${id}?` }],
    ...(environment && { environment: environment as Environment<Row, unknown> }),
  }).open();
}

const rowsOf = (count: number): Row[] => Array.from({ length: count }, (_, id) => ({ id }));

/** Asks once, is told, and answers. */
const asking = (prompt: string): ScriptedTurn =>
  prompt.includes('(told)')
    ? { text: ' So it is Zoey.' }
    : { text: 'I ask. <search>who</search>', finishReason: 'stop_string' };

const telling: Environment<Row> = {
  stop: ['</search>'],
  reply: ({ text }) => (text.endsWith('</search>') ? ' (told)' : undefined),
};

function only<E>(groups: readonly EpisodeGroup<Row, E & Episode>[]): E & Episode {
  return groups[0]?.episodes[0] as E & Episode;
}

describe('one turn', () => {
  test('gives a group for each row, in their order, judged by the specification', async () => {
    const policy = new ScriptedPolicy(tokenizer, (_, { prompt, completion }) => ({
      text: (prompt + completion) % 2 ? 'It is Zoey.' : 'It is Noah.',
    }));
    const task = await taskWith();
    const groups = await collect(policy, task, rowsOf(3), {
      n: 2,
      motivation: 'full',
      seed: 7,
      maxTokens: 9,
    });
    expect(groups.map(({ row }) => row.id)).toEqual([0, 1, 2]);
    expect(groups.map(({ episodes }) => episodes.map(({ reward }) => reward.total))).toEqual([
      [0, 1],
      [1, 0],
      [0, 1],
    ]);
    const [group] = groups;
    expect(group?.episodes[0]?.prompt.text).toMatch(
      /\+1 point if it is Zoey\.[\s\S]*Who is number 0\?<\|im_end\|>/,
    );
    expect(group?.episodes[0]?.prompt.tokens).toEqual(
      tokenizer.encode(group?.episodes[0]?.prompt.text as string),
    );
    expect(policy.calls).toHaveLength(1);
    expect(policy.calls[0]?.prompts[0]).toEqual(group?.episodes[0]?.prompt.tokens);
    expect(policy.calls[0]?.options).toMatchObject({ n: 2, seed: 7, maxTokens: [9, 9, 9] });
    expect(group?.episodes[0]?.completion).toMatchObject({ text: 'It is Noah.', finishReason: 'stop' });
    expect(group?.episodes[0]?.end).toBe('stop');
  });

  test('without a specification nothing is judged, and text is taken as it stands', async () => {
    const policy = new ScriptedPolicy(tokenizer, () => ({ text: 'persons' }));
    const [group] = await collect(policy, { messages: () => 'Who?' }, [0]);
    expect(group?.episodes[0]?.prompt).toEqual({
      messages: undefined,
      text: 'Who?',
      tokens: tokenizer.encodePrompt('Who?'),
      view: 'none',
    });
    expect(group?.episodes[0]).not.toHaveProperty('reward');
  });

  test('no rows are no episodes, and no call', async () => {
    const policy = new ScriptedPolicy(tokenizer, () => ({ text: '' }));
    expect(await collect(policy, await taskWith(), [])).toEqual([]);
    expect(policy.calls).toEqual([]);
  });

  test('verifiers run while others are still being drawn, at most so many at once', async () => {
    let running = 0;
    let most = 0;
    let judged = 0;
    let seen: () => void;
    const fifteen = new Promise<void>((resolve) => {
      seen = resolve;
    });
    const task = await taskWith(undefined, async () => {
      most = Math.max(most, ++running);
      await new Promise((resolve) => setTimeout(resolve, 2));
      running--;
      if (++judged === 15) seen();
      return 'right';
    });
    // The last one is drawn for as long as fifteen others are not judged.
    const policy = new ScriptedPolicy(tokenizer, (_, { completion }) => ({
      text: 'Zoey',
      ...(completion === 19 && { after: fifteen }),
    }));
    const groups = await collect(policy, task, rowsOf(1), { n: 20, verifiersAtOnce: 3 });
    expect(groups[0]?.episodes).toHaveLength(20);
    expect([most, judged]).toEqual([3, 20]);
  });

  test('a verifier that fails ends the rollout with its error, and the drawing with it', async () => {
    const task = await taskWith(undefined, () => {
      throw new Error('no such judge');
    });
    const policy = new ScriptedPolicy(tokenizer, (_, { prompt }) => ({
      text: 'Zoey',
      ...(prompt === 1 && { after: 50 }),
    }));
    await expectFailure(() => collect(policy, task, rowsOf(2)), 'VERIFIER_FAILED', 'no such judge', 'row');
    expect(policy.calls[0]?.options.signal?.aborted).toBe(true);
  });

  test.each(['n', 'maxTurns', 'maxEpisodeTokens', 'verifiersAtOnce'])('refuses %s of 0', async (key) => {
    const policy = new ScriptedPolicy(tokenizer, () => ({ text: '' }));
    const task = await taskWith(telling);
    await expectFailure(async () => collect(policy, task, rowsOf(1), { [key]: 0 }), 'INVALID_ARGUMENT', key);
  });
});

describe('several turns', () => {
  test('the environment answers inside the turn, and what was drawn stays what it is', async () => {
    const policy = new ScriptedPolicy(tokenizer, asking);
    const episode = only(await collect(policy, await taskWith(telling), rowsOf(1)));
    expect(episode.turns.map(({ role, text }) => [role, text])).toEqual([
      ['model', 'I ask. <search>who</search>'],
      ['environment', ' (told)'],
      ['model', ' So it is Zoey.'],
    ]);
    expect(textOf(episode)).toBe('I ask. <search>who</search> (told) So it is Zoey.');
    expect(episode.end).toBe('stop');
    // The model's own words are judged, without the environment's.
    expect(episode.completion.raw).toBe('I ask. <search>who</search> So it is Zoey.');
    expect(episode.completion.turns).toHaveLength(3);
    expect(episode.completion.tokenCount).toBe(
      drawnTurns(episode).reduce((sum, { tokens }) => sum + tokens.length, 0),
    );
    const [first, second] = policy.calls as [Call, Call];
    expect(second.prompts).toHaveLength(1);
    const [drawn, given] = episode.turns as [Turn, Turn];
    expect(second.prompts[0]).toEqual([...(first.prompts[0] ?? []), ...drawn.tokens, ...given.tokens]);
    expect(first.options.stop).toEqual(['</search>']);
  });

  test('a token sequence that the tokenizer would write otherwise is not written again', async () => {
    const policy = new ScriptedPolicy(tokenizer, asking);
    const sample = policy.sample.bind(policy);
    // Letter by letter, as no encoder would have it.
    const letters = [...'I ask. </search>'].flatMap((letter) => tokenizer.encode(letter));
    policy.sample = async (prompts, options) => {
      const first = policy.calls.length === 0;
      const groups = await sample(prompts, { ...options, onCompletion: undefined });
      for (const { completions } of first ? groups : []) {
        for (const completion of completions) {
          Object.assign(completion, {
            text: 'I ask. </search>',
            tokens: Int32Array.from(letters),
            logprobs: new Float32Array(letters.length).fill(-1),
          });
        }
      }
      return groups;
    };
    const groups = await collect(policy, await taskWith(telling), rowsOf(1));
    expect(tokenizer.encode('I ask. </search>')).not.toEqual(letters);
    const length = groups[0]?.episodes[0]?.prompt.tokens.length ?? 0;
    expect(policy.calls[1]?.prompts[0]?.slice(length, length + letters.length)).toEqual(letters);
    const [branch] = branchesOf(groups);
    expect(Array.from(branch?.completions[0]?.tokens as ArrayLike<number>)).toEqual(letters);
  });

  test('what is trained on: the model’s tokens, one completion a path, the environment’s none', async () => {
    const policy = new ScriptedPolicy(tokenizer, asking);
    const groups = await collect(policy, await taskWith(telling), rowsOf(2), { n: 2 });
    const seen: unknown[] = [];
    const branches = branchesOf(groups, (at) => {
      seen.push(at);
      return { advantage: at.group - at.episode };
    });
    expect(seen).toHaveLength(8);
    expect(seen[3]).toMatchObject({ group: 0, episode: 1, turn: 3 });
    const [root] = forestOf(branches);
    expect(root?.children).toHaveLength(2);
    const paths = branches.flatMap(({ completions }) => completions);
    expect(paths).toHaveLength(4);
    for (const [i, first] of paths.entries()) {
      const given = first.children?.[0];
      const last = given?.children?.[0];
      expect(given?.train).toBeUndefined();
      expect(first.train).toMatchObject({ sequence: i, advantage: (i >> 1) - (i & 1) });
      expect(last?.train).toMatchObject({ sequence: i });
      expect(first.train?.logprobs).toHaveLength(first.tokens.length);
      expect(last?.children).toBeUndefined();
    }
  });

  test('messages are written by the chat template, and thinking that it drops stays in what was drawn', async () => {
    // Qwen3's template does this: an assistant's words keep their thinking only behind the last question of
    // the user's.
    const droppingThoughts = [
      '{%- set ns = namespace(last=0) -%}',
      "{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}",
      '{%- for m in messages -%}',
      "{%- if m.role == 'assistant' and loop.index0 < ns.last -%}",
      "{{ '<|im_start|>assistant\\n' + m.content.split('</think>')[-1].strip() + '<|im_end|>\\n' }}",
      "{%- elif m.role == 'tool' -%}",
      "{{ '<|im_start|>user\\n[' + m.name + '] ' + m.content + '<|im_end|>\\n' }}",
      '{%- else -%}',
      "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}",
      '{%- endif -%}{%- endfor -%}',
      "{%- if tools -%}{{ '(' + tools[0].name + ')' }}{%- endif -%}",
      "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}",
    ].join('\n');
    const other = await tokenizerWith(droppingThoughts);
    const spoken: ModelTurn[] = [];
    const conversing: Environment<Row> = {
      tools: [{ name: 'phone' }],
      reply(turn) {
        spoken.push(turn);
        if (turn.index === 0) return [{ role: 'tool', name: 'phone', content: 'nobody' }];
        if (turn.index === 1) return [{ role: 'user', content: 'And now?' }];
        return undefined;
      },
    };
    const policy = new ScriptedPolicy(other, (prompt) => ({
      text: prompt.includes('And now?') ? 'Zoey.' : '<think>hm</think>Wait.',
    }));
    const groups = await collect(policy, await taskWith(conversing), rowsOf(1));
    const episode = only(groups);
    expect(groups[0]?.episodes[0]?.prompt.text).toContain('(phone)<|im_start|>assistant');
    expect(spoken.map(({ index, finishReason }) => [index, finishReason])).toEqual([
      [0, 'stop'],
      [1, 'stop'],
      [2, 'stop'],
    ]);
    // Each turn brought its end token; what the environment adds begins behind it.
    expect(episode.turns.map(({ text }) => text)).toEqual([
      '<think>hm</think>Wait.',
      '\n<|im_start|>user\n[phone] nobody<|im_end|>\n(phone)<|im_start|>assistant\n',
      '<think>hm</think>Wait.',
      '\n<|im_start|>user\nAnd now?<|im_end|>\n(phone)<|im_start|>assistant\n',
      'Zoey.',
    ]);
    const trained = policy.calls[2]?.texts[0] as string;
    expect(trained.match(/<think>hm<\/think>Wait\.<\|im_end\|>/g)).toHaveLength(2);
    // The template itself would have left both thoughts out, and a policy trained on that would be another one's.
    const rewritten = other.applyChatTemplate([
      { role: 'user', content: 'q' },
      { role: 'assistant', content: '<think>hm</think>Wait.' },
      { role: 'user', content: 'And now?' },
    ]);
    expect(rewritten).not.toContain('hm');
    expect(drawnTurns(episode).map(({ text }) => text.includes('hm'))).toEqual([true, true, false]);
  });

  test('a template that does not know a role, or does not write the assistant’s words, is named', async () => {
    const answering: Environment<Row> = { reply: () => [{ role: 'tool', content: 'x' }] };
    const strict = await tokenizerWith(
      "{%- for m in messages -%}{%- if m.role == 'tool' -%}{{ raise_exception('no tools here') }}{%- endif -%}" +
        '{{ m.content }}{%- endfor -%}',
    );
    const task = await taskWith(answering);
    const policy = new ScriptedPolicy(strict, () => ({ text: 'x' }));
    await expectFailure(() => collect(policy, task, rowsOf(1)), 'INVALID_ARGUMENT', 'no tools here');
    const shouting = await tokenizerWith('{%- for m in messages -%}{{ m.content | upper }}{%- endfor -%}');
    await expectFailure(
      () => collect(new ScriptedPolicy(shouting, () => ({ text: 'x' })), task, rowsOf(1)),
      'UNSUPPORTED',
      'chat template',
    );
  });

  test('replies run side by side, while the engine goes on, and none waits for a slower one', async () => {
    let running = 0;
    let most = 0;
    const slow: Environment<Row> = {
      stop: ['</search>'],
      async reply({ text }, row) {
        if (!text.endsWith('</search>')) return undefined;
        most = Math.max(most, ++running);
        await new Promise((resolve) => setTimeout(resolve, row.id === 0 ? 200 : 10));
        running--;
        return ' (told)';
      },
    };
    const policy = new ScriptedPolicy(tokenizer, (prompt, { prompt: p }) => ({
      ...asking(prompt),
      ...(p === 3 && { after: 60 }),
    }));
    const groups = await collect(policy, await taskWith(slow), rowsOf(4));
    expect(groups.map(({ episodes }) => episodes[0]?.end)).toEqual(['stop', 'stop', 'stop', 'stop']);
    expect(most).toBe(3);
    // Rows 1 and 2 were answered while row 3 was drawn, row 3 soon after it; row 0 came by itself in the end.
    const waves = policy.calls.map(({ prompts }) => prompts.length);
    expect(waves[0]).toBe(4);
    expect(waves[1]).toBe(2);
    expect(waves.at(-1)).toBe(1);
  });

  test('a turn that is answered late is judged once', async () => {
    let answer: () => void = () => undefined;
    const drawn = new Promise<void>((resolve) => {
      answer = resolve;
    });
    const seen: string[] = [];
    const late: Environment<Row> = {
      stop: ['</search>'],
      async reply({ text }) {
        await drawn;
        return text.endsWith('</search>') ? ' (told)' : undefined;
      },
    };
    const policy = new ScriptedPolicy(tokenizer, asking);
    const sample = policy.sample.bind(policy);
    policy.sample = async (...given) => {
      const groups = await sample(...given);
      setTimeout(answer, 20);
      return groups;
    };
    const task = await taskWith(late, (text) => {
      seen.push(text);
      return 'right';
    });
    const long = asking('').text.length + asking('(told)').text.length;
    const episode = only(await collect(policy, task, rowsOf(1), { maxEpisodeTokens: 2 * long }));
    expect(seen).toEqual(['I ask. <search>who</search> So it is Zoey.']);
    expect(episode.completion.turns).toHaveLength(3);
    expect(episode.turns).toHaveLength(3);
  });

  test('streams of random numbers: a turn has its own, whatever wave it falls into', async () => {
    const policy = new ScriptedPolicy(tokenizer, asking);
    await collect(policy, await taskWith(telling), rowsOf(2), { n: 2 });
    const { options } = policy.calls[1] as Call;
    expect(options.keys).toEqual([0, 0, 1, 1]);
    expect(options.firstIndices).toEqual([2 ** 20, 2 ** 20 + 1, 2 ** 20, 2 ** 20 + 1]);
  });

  test('a state of its own for every episode', async () => {
    const counting: Environment<Row, { asked: number }> = {
      stop: ['</search>'],
      maxTurns: 5,
      start: async (row) => ({ asked: 10 * row.id }),
      reply: (_, __, state) => (++state.asked % 10 < 3 ? ` (${state.asked})` : undefined),
    };
    const policy = new ScriptedPolicy(tokenizer, () => ({ text: '</search>', finishReason: 'stop_string' }));
    const task = await taskWith(counting as Environment<Row>);
    const groups = await collect(policy, task, rowsOf(2), { n: 2 });
    expect(groups.flatMap(({ episodes }) => episodes.map(textOf))).toEqual([
      '</search> (1)</search> (2)</search>',
      '</search> (1)</search> (2)</search>',
      '</search> (11)</search> (12)</search>',
      '</search> (11)</search> (12)</search>',
    ]);
  });
});

describe('limits', () => {
  const endless = () => ({ text: 'so </search>', finishReason: 'stop_string' as const });
  const always: Environment<Row> = { stop: ['</search>'], reply: () => ' (again)' };
  const run = async (environment: Environment<Row>, options: CollectOptions, write = endless) =>
    only(
      await collect(new ScriptedPolicy(tokenizer, write), await taskWith(environment), rowsOf(1), options),
    );

  test('turns: the environment’s, or the caller’s', async () => {
    const asked: [turn: number, left: number][] = [];
    const counted: Environment<Row> = {
      ...always,
      maxTurns: 3,
      reply: ({ index }, _, __, { turnsLeft }) => {
        asked.push([index, turnsLeft]);
        return ' (again)';
      },
    };
    const episode = await run(counted, {});
    expect(drawnTurns(episode)).toHaveLength(3);
    expect(episode.end).toBe('turns');
    // The last turn is not answered.
    expect(asked).toEqual([
      [0, 2],
      [1, 1],
    ]);
    asked.length = 0;
    expect(drawnTurns(await run(counted, { maxTurns: 2 }))).toHaveLength(2);
    expect(asked).toEqual([[0, 1]]);
    const unanswered = await run(counted, { maxTurns: 1 });
    expect([unanswered.turns.length, unanswered.end]).toEqual([1, 'turns']);
  });

  test('tokens of a turn', async () => {
    const episode = await run(always, { maxTokens: 2 });
    expect([episode.turns.length, episode.end]).toEqual([1, 'length']);
    expect(episode.turns[0]?.tokens).toHaveLength(2);
  });

  test('tokens in all, of the environment too', async () => {
    const one = tokenizer.encode('so </search>').length;
    const given = tokenizer.encode(' (again)').length;
    for (let most = one; most < 3 * (one + given); most++) {
      const episode = await run(always, { maxEpisodeTokens: most });
      const tokens = episode.turns.reduce((sum, turn) => sum + turn.tokens.length, 0);
      expect(tokens).toBeLessThanOrEqual(most);
      expect(episode.end).toBe('length');
      // A reply is there whole, and only where the model can go on behind it.
      expect(episode.turns.at(-1)?.role).toBe('model');
    }
  });

  test('the context', async () => {
    const policy = new ScriptedPolicy(tokenizer, endless);
    const task = await taskWith({ ...always, maxTurns: 1000 });
    policy.contextLength = 120;
    const [group] = await collect(policy, task, rowsOf(1));
    const tokens = (group as EpisodeGroup<Row>).episodes[0]?.turns.reduce((n, t) => n + t.tokens.length, 0);
    expect((tokens as number) + (group?.episodes[0]?.prompt.tokens.length as number)).toBeLessThanOrEqual(
      120,
    );
    expect(group?.episodes[0]?.end).toBe('length');
  });

  test.each([
    ['never answers', () => new Promise<string>(() => undefined)],
    [
      'never yields',
      () => {
        for (;;);
      },
    ],
  ])('time: an environment that %s', async (_, reply) => {
    const stuck: Environment<Row> = { ...always, timeoutSeconds: 0.05, reply };
    await expectFailure(() => run(stuck, {}), 'ENVIRONMENT_TIMEOUT', '0.05 s', 'turn 1');
    await expectFailure(
      () => run({ ...stuck, timeoutSeconds: 60 }, { replySeconds: 0.02 }),
      'ENVIRONMENT_TIMEOUT',
    );
    expect((await run(stuck, { onEnvironmentError: 'end' })).end).toBe('failed');
  });

  test('a caller that gives up is heard in every phase, and so is the environment', async () => {
    const abort = new AbortController();
    let heard = false;
    const waiting: Environment<Row> = {
      ...always,
      reply: (_, __, ___, { signal }) =>
        new Promise<string>(() => {
          signal.addEventListener('abort', () => {
            heard = true;
          });
          setTimeout(() => abort.abort(), 10);
        }),
    };
    await expectFailure(() => run(waiting, { signal: abort.signal }), 'ABORTED');
    expect(heard).toBe(true);
    const before = AbortSignal.abort();
    await expectFailure(() => run(always, { signal: before }), 'ABORTED');
    const judging = new AbortController();
    const task = await taskWith(undefined, () => {
      setTimeout(() => judging.abort(), 10);
      return new Promise<string>(() => undefined);
    });
    const policy = new ScriptedPolicy(tokenizer, () => ({ text: 'x' }));
    await expectFailure(() => collect(policy, task, rowsOf(1), { signal: judging.signal }), 'ABORTED');
  });
});

describe('an environment that fails', () => {
  const failing: Environment<Row> = {
    stop: ['</search>'],
    reply({ index, text }) {
      if (!text.endsWith('</search>')) return undefined;
      if (index === 0) throw new Error('no network');
      return ' (told)';
    },
  };
  const write = (prompt: string): ScriptedTurn =>
    prompt.includes('no network')
      ? { text: ' Zoey then.' }
      : { text: 'so </search>', finishReason: 'stop_string' };
  const run = async (options: CollectOptions, environment = failing) =>
    only(
      await collect(new ScriptedPolicy(tokenizer, write), await taskWith(environment), rowsOf(1), options),
    );

  test('ends the run by default', async () => {
    await expectFailure(() => run({}), 'ENVIRONMENT_FAILED', 'turn 1', 'no network');
  });

  test('or ends the episode, which is judged by what there is', async () => {
    const episode = await run({ onEnvironmentError: 'end' });
    expect([episode.end, episode.turns.length, episode.reward.total]).toEqual(['failed', 1, 0]);
  });

  test('or is reported to the model, in words of its own where it has them', async () => {
    const episode = await run({ onEnvironmentError: 'report' });
    expect(episode.turns[1]).toMatchObject({
      role: 'environment',
      text: '\n[The environment failed at turn 1: no network]\n',
      failure: 'The environment failed at turn 1: no network',
    });
    expect([episode.end, episode.reward.total]).toEqual(['stop', 1]);
    const own = { ...failing, failed: (failure: string) => ` <error>${failure}</error>` };
    expect(textOf(await run({ onEnvironmentError: 'report' }, own))).toContain(
      '<error>The environment failed',
    );
  });

  test.each([
    ['', 'empty text'],
    [[], 'not text, messages'],
    [7, '7'],
    [null, 'null'],
  ])('a reply of %j is none', async (reply, named) => {
    const odd = { ...failing, reply: () => reply as unknown as string };
    const error = await failure(() => run({ onEnvironmentError: 'report' }, odd));
    expect(error.code).toBe('ENVIRONMENT_FAILED');
    expect(error.message).toContain(named);
  });

  test('a start that fails ends the run', async () => {
    const odd: Environment<Row> = { ...failing, start: () => Promise.reject(new Error('no room')) };
    await expectFailure(() => run({ onEnvironmentError: 'report' }, odd), 'ENVIRONMENT_FAILED', 'no room');
  });
});
