import { expect, test } from '@jest/globals';
import { defaultModel, openModel, Policy, Tokenizer } from '../../lib/policy/index.js';
import type { MotivationMix, MotivationView } from '../../lib/prompt/motivation.js';
import { collect, drawnTurns, type EpisodeGroup, type PlainEpisode } from '../../lib/rollout/index.js';
import { getTask } from '../../lib/tasks/index.js';
import { expectFailure } from '../policy/helpers.js';
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
});

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
