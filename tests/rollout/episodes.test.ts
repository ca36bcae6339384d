import { afterAll, beforeAll, expect, test } from '@jest/globals';
import { defaultModel, forestOf, Policy } from '../../lib/policy/index.js';
import { branchesOf, collect, drawnTurns, type EpisodeGroup, textOf } from '../../lib/rollout/index.js';
import { type Environment, getTask } from '../../lib/tasks/index.js';
import { Trainer } from '../../lib/train/index.js';
import { temporaryDirectory } from '../policy/helpers.js';

let policy: Policy;
beforeAll(async () => {
  policy = await Policy.load(defaultModel(), { device: 'cpu', exact: true });
});
afterAll(() => policy.dispose());

/** Knights and knaves with somebody who falls in with a word whenever one is called a knight. */
async function interruptedTask(wait: () => number = () => 0) {
  const task = await getTask('knights-and-knaves', { people: 2 });
  const environment: Environment<unknown> = {
    stop: [' knight'],
    maxTurns: 3,
    async reply({ finishReason, index }) {
      await new Promise((resolve) => setTimeout(resolve, wait()));
      return finishReason === 'stop_string' ? ` (${'yes, '.repeat(index)}yes)` : undefined;
    },
  };
  return { ...task, environment: environment as Environment<never> };
}

async function draw(wait?: () => number) {
  const task = await interruptedTask(wait);
  const rows = Array.from({ length: 4 }, (_, i) => task.rows({ split: 'train', seed: 3 }).at(i));
  return collect(policy, task, rows, { n: 4, motivation: 'full', maxTokens: 96, seed: 11 });
}

const outline = (groups: readonly EpisodeGroup[]) =>
  groups.map(({ episodes }) =>
    episodes.map((e) => [textOf(e), e.end, drawnTurns(e).map((t) => [...t.logprobs])]),
  );

test('what a policy draws in several turns has the same probability where it is trained on, to the last bit', async () => {
  const groups = await draw();
  const turns = groups.flatMap(({ episodes }) => episodes.flatMap(drawnTurns));
  expect(turns.length).toBeGreaterThan(32);
  const { logprobs } = await policy.score(forestOf(branchesOf(groups)));
  expect(logprobs).toHaveLength(turns.length);
  for (const [i, turn] of turns.entries()) expect([...(logprobs[i] ?? [])]).toEqual([...turn.logprobs]);

  const forest = forestOf(branchesOf(groups, ({ episode }) => ({ advantage: episode - 1.5 })));
  const stats = await policy.forwardBackward(forest, { type: 'gspo' });
  expect(stats.ratio).toEqual({ mean: 1, min: 1, max: 1 });
  expect(stats.tokens).toBe(turns.reduce((sum, { tokens }) => sum + tokens.length, 0));
  await policy.zeroGradients();
});

test('what is drawn does not depend on when the environment answers', async () => {
  let state = 1;
  const waits = () => {
    state = (state * 48271) % 2147483647;
    return state % 40;
  };
  expect(outline(await draw(waits))).toEqual(outline(await draw()));
});

test('a trainer takes steps on episodes of several turns, and keeps their turns', async () => {
  const folder = temporaryDirectory();
  const trained = await Policy.load(defaultModel(), { device: 'cpu', exact: true });
  try {
    const rows: unknown[] = [];
    const trainer = new Trainer({
      policy: trained,
      task: await interruptedTask(),
      out: `${folder.path}/run`,
      steps: 2,
      promptsPerStep: 2,
      groupSize: 4,
      maxTokens: 64,
      maxEpisodeTokens: 100,
      kl: 0.01,
      reference: policy,
      onEvent: (event) => event.type === 'step' && rows.push(event.metrics),
    });
    await trainer.run();
    expect(rows).toHaveLength(2);
    expect(rows[0]).toMatchObject({ failures: 0, ratio: { min: 1, max: 1 }, kl: 0 });
    expect((rows[0] as { turns: number }).turns).toBeGreaterThan(1);
    const { readFileSync } = await import('node:fs');
    const records = readFileSync(`${folder.path}/run/completions/step-000001.jsonl`, 'utf8')
      .trim()
      .split('\n');
    const several = records.map((line) => JSON.parse(line)).find((record) => record.turns);
    expect(several.turns.map(({ role }: { role: string }) => role).slice(0, 3)).toEqual([
      'model',
      'environment',
      'model',
    ]);
    expect(several.text).toBe(several.turns.map(({ text }: { text: string }) => text).join(''));
  } finally {
    trained.dispose();
    folder.remove();
  }
});
