import { expect, test } from '@jest/globals';
import { defaultModel, openModel, Policy, Tokenizer } from '../../lib/policy/index.js';
import type { LearnView, MotivationMix, MotivationView } from '../../lib/prompt/motivation.js';
import { collect, drawnTurns, type EpisodeGroup, type PlainEpisode } from '../../lib/rollout/index.js';
import { getTask } from '../../lib/tasks/index.js';
import { Lessons } from '../../lib/train/lessons.js';
import { expectFailure } from '../policy/helpers.js';
import { relativeError } from '../support/compare.js';
import { plainLessons } from '../train/lesson-settings.js';
import { ScriptedPolicy } from './scripted-policy.js';

const mix: MotivationMix = ['full', 'none', { partial: ['format'] }];

function drawnOf(group: EpisodeGroup<unknown, PlainEpisode> | undefined, index: number) {
  const episode = group?.episodes[index] as PlainEpisode;
  return drawnTurns(episode).map(({ tokens, logprobs, entropies, finishReason }) => ({
    prompt: episode.prompt.tokens,
    tokens,
    logprobs,
    entropies,
    finishReason,
  }));
}

test('the completions of a mix are those of each view drawn alone, bit for bit', async () => {
  const task = await getTask('knights-and-knaves', { people: 2 });
  const source = task.rows({ split: 'train', seed: 0 });
  const rows = [0, 1, 2].map((i) => source.at(i));
  for (const exact of [false, true]) {
    const policy = await Policy.load(defaultModel(), { device: 'cpu', dtype: 'f32', exact });
    try {
      const draw = (motivation: MotivationView | MotivationMix, keepActivations = 0) =>
        collect(policy, { ...task, messages: task.messages }, rows, {
          n: 6,
          motivation,
          maxTokens: 40,
          seed: 7,
          firstRow: 5,
          keepActivations,
        });
      const mixed = await draw(mix);
      const kept = await draw(mix, 2 ** 28);
      const alone: EpisodeGroup<unknown>[][] = [];
      for (const view of mix) alone.push(await draw(view));
      expect(mixed.map(({ row }) => row)).toEqual(rows);
      const different = new Set<string>();
      mixed.forEach((group, row) => {
        group.episodes.forEach(({ prompt }, index) => {
          const share = Math.floor(index / 2);
          expect(prompt.view).toEqual(mix[share]);
          expect(drawnOf(group, index)).toEqual(drawnOf(alone[share]?.[row], index));
          expect(drawnOf(group, index)).toEqual(drawnOf(kept[row], index));
          different.add(String(drawnOf(group, index)[0]?.tokens));
        });
      });
      // Streams are by row and place: hardly any two completions are alike.
      expect(different.size).toBeGreaterThan(12);
    } finally {
      policy.dispose();
    }
  }
}, 120_000);

test('shares of a mix, whose episodes have one prompt for each view that they see', async () => {
  const { tokenizer } = await openModel(defaultModel());
  const policy = new ScriptedPolicy(new Tokenizer(tokenizer, 'test'), () => ({ text: 'x' }));
  const task = { messages: (row: number, view: MotivationView) => `${JSON.stringify(view)} ${row}` };
  const partial = () => ({ partial: ['format'] });
  const [first, second] = await collect(policy, task, [1, 2], {
    n: 5,
    motivation: [partial(), partial(), 'none'],
    seed: 3,
  });
  const shown = first?.episodes.map(({ prompt }) => prompt.text);
  expect(shown).toEqual([...new Array(4).fill('{"partial":["format"]} 1'), '"none" 1']);
  expect(new Set(first?.episodes.map(({ prompt }) => prompt)).size).toBe(2);
  expect(second?.episodes.map(({ prompt }) => prompt.text.at(-1))).toEqual(['2', '2', '2', '2', '2']);
  expect(policy.calls).toHaveLength(1);
  expect(policy.calls[0]?.options).toMatchObject({
    n: 1,
    keys: [0, 0, 0, 0, 0, 1, 1, 1, 1, 1],
    firstIndices: [0, 1, 2, 3, 4, 0, 1, 2, 3, 4],
  });
  await collect(policy, task, [1, 2], { n: 5, motivation: ['full', 'full'], firstRow: 4 });
  expect(policy.calls[1]?.options).toMatchObject({ n: 5, keys: [4, 5], firstIndices: [0, 0] });
  for (const motivation of [[], ['full', 'none', 'adverse'] as const]) {
    await expectFailure(
      () => collect(policy, task, [1], { n: 2, motivation }),
      'INVALID_ARGUMENT',
      /1 to 2 views/,
    );
  }
});

test('activations that a mix leaves give the gradient of an update, and what it did not draw is computed', async () => {
  const task = await getTask('knights-and-knaves', { people: 2 });
  const source = task.rows({ split: 'train', seed: 0 });
  const rows = [0, 1].map((i) => source.at(i));
  const policy = await Policy.load(defaultModel(), { device: 'cpu', dtype: 'f32', threads: 1 });
  const learnUnder: Record<string, LearnView[]> = {
    drawn: ['same'],
    both: ['same', 'none'],
    other: ['none'],
  };
  try {
    for (const [name, views] of Object.entries(learnUnder)) {
      const gradients = async (keepActivations: number) => {
        const groups = await collect(policy, task, rows, {
          n: 4,
          motivation: ['full', 'none'],
          maxTokens: 24,
          seed: 7,
          keepActivations,
        });
        const advantages = groups.map(({ episodes }, g) => episodes.map((_, e) => ((e + g) % 3) - 1));
        const lessons = await Lessons.prepare(groups, advantages, {
          policy,
          task: task as never,
          settings: { ...plainLessons, learnCorrection: 'truncated', anchor: 0.1 },
          learnUnder: views,
          anchorUnder: 'full',
          anchorTo: 'none',
        });
        const { forest, normalizer } = lessons.slice(0, groups.length);
        await policy.forwardBackward(forest, { type: 'grpo', normalizer });
        const found = new Map<string, Float32Array>();
        for (const { name: parameter } of policy.parameters()) {
          found.set(parameter, await policy.readParameter(parameter, 'gradient'));
        }
        await policy.zeroGradients();
        return found;
      };
      const plain = await gradients(0);
      const kept = await gradients(2 ** 28);
      const worst = Math.max(
        ...[...plain].map(([parameter, gradient]) =>
          relativeError(kept.get(parameter) as Float32Array, gradient),
        ),
      );
      expect({ name, near: worst < 1e-5 }).toEqual({ name, near: true });
    }
  } finally {
    policy.dispose();
  }
});
