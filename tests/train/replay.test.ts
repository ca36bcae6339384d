import { existsSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, test } from '@jest/globals';
import type { Segment } from '../../lib/policy/index.js';
import type { Task } from '../../lib/tasks/index.js';
import { listCheckpoints } from '../../lib/train/checkpoint.js';
import { FakePolicy } from './fake-policy.js';
import { byPrompt, FakeRuns } from './fake-run.js';
import { type FakeRow, fakeTask } from './fake-task.js';

const runs = new FakeRuns();

/** Every fourth row can be got right. */
function seldomRight(): Promise<Task<FakeRow>> {
  return fakeTask({
    rows: 100,
    verify: (text, { id }) => (id % 4 === 0 && text.startsWith('b') ? 'right' : 'wrong'),
  });
}

function trained(segments: readonly Segment[]): Segment[] {
  return segments.flatMap((one) => [...(one.train ? [one] : []), ...trained(one.children ?? [])]);
}

describe('replay', () => {
  test('groups in which few were right take the place of those without a signal', async () => {
    const policy = new FakePolicy();
    await runs.trainer(policy, { task: await seldomRight(), replay: 5, steps: 12, learningRate: 1 }).run();
    const kept = new Map<string, number[]>();
    let replays = 0;
    for (const row of runs.metrics()) {
      const groups = byPrompt(runs.records(row.step));
      const fresh = groups.filter(([first]) => first?.replayed === undefined);
      const again = groups.filter(([first]) => first?.replayed !== undefined);
      expect(fresh).toHaveLength(4);
      expect(again).toHaveLength(row.replayedGroups as number);
      // A group without a signal makes room for a replayed one, as far as there are any.
      const silent = fresh.filter((group) => group.every(({ advantage }) => advantage === 0));
      expect(again.length).toBe(Math.min(silent.length, kept.size));
      expect(silent.filter(([first]) => first?.dropped)).toHaveLength(again.length);
      for (const group of again) {
        const first = group[0] as (typeof group)[0];
        expect(kept.has(`${first.replayed} ${first.prompt}`)).toBe(true);
        expect(kept.get(`${first.replayed} ${first.prompt}`)).toEqual(group.map(({ reward }) => reward));
        expect(group.some(({ advantage }) => advantage !== 0)).toBe(true);
      }
      const keys = again.map(([first]) => `${first?.replayed} ${first?.prompt}`);
      expect(new Set(keys).size).toBe(keys.length);
      // The curve is that of what was drawn.
      const drawn = fresh.flat();
      expect(row.reward).toBeCloseTo(drawn.reduce((sum, { reward }) => sum + reward, 0) / drawn.length, 12);
      expect(row.uniformGroups).toBe(silent.length / 4);
      for (const group of fresh) {
        const right = group.filter(({ reward }) => reward === 1).length;
        if (right > 0 && right <= 2) {
          kept.set(
            `${row.step} ${group[0]?.prompt}`,
            group.map(({ reward }) => reward),
          );
        }
      }
      while (kept.size > 5) kept.delete(kept.keys().next().value as string);
      replays += again.length;
    }
    expect(replays).toBeGreaterThan(5);
  });

  test('tokens keep the log-probabilities that they were drawn with', async () => {
    const policy = new FakePolicy();
    const before: number[][] = [];
    policy.onSample = () => {
      const total = Math.log(policy.logits.reduce((sum, logit) => sum + Math.exp(logit), 0));
      before.push(policy.logits.map((logit) => logit - total));
    };
    // A step in which nothing has a signal has no forest.
    const stepsOfForests: number[] = [];
    policy.onForwardBackward = () => stepsOfForests.push(before.length);
    await runs.trainer(policy, { task: await seldomRight(), replay: 5, steps: 8, learningRate: 1 }).run();
    let replays = 0;
    for (const [i, forest] of policy.forests.entries()) {
      const now = stepsOfForests[i] as number;
      const steps = new Set(
        runs.records(now).flatMap(({ replayed, dropped }) => (dropped ? [] : [replayed ?? now])),
      );
      for (const { tokens, train } of trained(forest)) {
        const drawnAt = [...steps].filter((step) =>
          Array.from(tokens).every(
            (token, t) =>
              Math.abs((train?.logprobs?.[t] as number) - (before[step - 1]?.[token] as number)) < 1e-5,
          ),
        );
        expect(drawnAt.length).toBeGreaterThan(0);
        if (!drawnAt.includes(now)) replays++;
      }
    }
    expect(replays).toBeGreaterThan(0);
  });

  test('resumes exactly, from a checkpoint that holds no more groups than are kept', async () => {
    const task = await seldomRight();
    await runs.expectExactResume({ task, replay: 3, learningRate: 1, miniBatches: 2 });
    expect(
      runs
        .metrics('broken')
        .slice(3)
        .some((row) => (row.replayedGroups as number) > 0),
    ).toBe(true);
    for (const { path } of listCheckpoints(join(runs.folder, 'unbroken', 'checkpoints'))) {
      const state = JSON.parse(readFileSync(join(path, 'trainer.json'), 'utf8')) as { replay: unknown[] };
      expect(state.replay.length).toBeLessThanOrEqual(3);
    }
    await runs.trainer(new FakePolicy(), { task, out: 'off', steps: 1 }).run();
    const [last] = listCheckpoints(join(runs.folder, 'off', 'checkpoints'));
    expect(existsSync(join(last?.path as string, 'trainer.json'))).toBe(false);
    expect(runs.metrics('off')[0]).not.toHaveProperty('replayedGroups');
  });

  test('together with views of its own and dynamic sampling it resumes exactly too', async () => {
    await runs.expectExactResume({
      task: await seldomRight(),
      replay: 8,
      replayCorrect: 1,
      dynamicSampling: 2,
      motivation: 'full@0,none@2',
      learnUnder: 'same/none',
      learnCorrection: 'truncated',
    });
    expect(runs.metrics('unbroken').some((row) => (row.replayedGroups as number) > 0)).toBe(true);
  });

  test('together with an adaptive motivation, hints and difficulty it resumes exactly too', async () => {
    await runs.expectExactResume({
      task: await seldomRight(),
      replay: 8,
      groupSize: 6,
      dynamicSampling: 2,
      motivation: 'adaptive',
      adaptiveWindow: 2,
      hintFailed: 'full',
      difficulty: 'weight',
      multiObjectiveAggregation: 'normalize_then_sum',
      clipAdvantages: 2,
    });
    expect(runs.metrics('unbroken').some((row) => (row.replayedGroups as number) > 0)).toBe(true);
  });
});
