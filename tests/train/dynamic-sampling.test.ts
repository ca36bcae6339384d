import { describe, expect, test } from '@jest/globals';
import type { Task } from '../../lib/tasks/index.js';
import { FakePolicy } from './fake-policy.js';
import { byPrompt, FakeRuns } from './fake-run.js';
import { type FakeRow, fakeTask } from './fake-task.js';

const runs = new FakeRuns();

/** Rows whose completions are all wrong, but for one in `every`. */
function mostlyWrong(every: number): Promise<Task<FakeRow>> {
  return fakeTask({
    rows: 200,
    verify: (text, { id }) => (id % every === 0 && text.startsWith('b') ? 'right' : 'wrong'),
  });
}

describe('dynamic sampling', () => {
  test('draws further rows until the step is full of groups with a signal', async () => {
    const policy = new FakePolicy();
    await runs.trainer(policy, { task: await mostlyWrong(2), dynamicSampling: 40, steps: 3 }).run();
    let calls = 0;
    for (const row of runs.metrics()) {
      const records = runs.records(row.step);
      const groups = byPrompt(records);
      expect(row.rowsDrawn).toBe(groups.length);
      expect(row.filledGroups).toBe(0);
      expect(row.rollouts).toBeGreaterThan(1);
      const learned = groups.filter(([first]) => !first?.dropped);
      expect(learned).toHaveLength(4);
      for (const group of learned) expect(new Set(group.map(({ reward }) => reward)).size).toBe(2);
      // The curve is that of all that was drawn.
      const mean = records.reduce((sum, { reward }) => sum + reward, 0) / records.length;
      expect(row.reward).toBeCloseTo(mean, 12);
      const uniform = groups.filter((group) => group.every((r) => r.reward === group[0]?.reward));
      expect(row.uniformGroups).toBeCloseTo(uniform.length / groups.length, 12);
      expect(policy.losses[row.step - 1]).toMatchObject({ normalizer: { completions: 16 } });
      calls += row.rollouts as number;
    }
    expect(policy.sampleCalls).toHaveLength(calls);
    // Within a step every row has a random stream of its own, and a step begins where the one before ended.
    const ids = runs.metrics().flatMap(({ step }) => rowsOf(step));
    expect(new Set(ids).size).toBe(ids.length);
    const keys = (policy.sampleCalls as { keys: number[]; seed: bigint }[])
      .filter(({ seed }) => seed === 1n)
      .flatMap(({ keys }) => keys);
    expect(keys).toEqual(keys.map((_, i) => i));
  });

  test('asks for as many rows as are missing at the yield so far, and for no more rollouts than allowed', async () => {
    const policy = new FakePolicy();
    await runs.trainer(policy, { task: await mostlyWrong(1000), dynamicSampling: 3, steps: 2 }).run();
    for (const row of runs.metrics()) {
      expect(row).toMatchObject({ rollouts: 3, uniformGroups: 1, filledGroups: 4, rowsDrawn: 12 });
      expect(runs.records(row.step).filter(({ dropped }) => !dropped)).toHaveLength(16);
    }
    expect(policy.logits).toEqual([0, 0, 0, 0]);

    const half = new FakePolicy();
    await runs.trainer(half, { task: await mostlyWrong(2), dynamicSampling: 2, out: 'half', steps: 6 }).run();
    for (const row of runs.metrics('half')) {
      const groups = byPrompt(runs.records(row.step, 'half'));
      const signals = groups
        .slice(0, 4)
        .filter((group) => new Set(group.map((r) => r.reward)).size > 1).length;
      const further =
        signals === 4 ? 0 : signals === 0 ? 4 : Math.min(4, Math.ceil(((4 - signals) * 4) / signals));
      expect(row.rowsDrawn).toBe(4 + further);
    }
  });

  test('off, a step is drawn once and says nothing of it', async () => {
    const policy = new FakePolicy();
    await runs.trainer(policy, { task: await mostlyWrong(2), dynamicSampling: 1, steps: 2 }).run();
    expect(policy.sampleCalls).toHaveLength(2);
    for (const row of runs.metrics()) {
      expect(row).not.toHaveProperty('rollouts');
      expect(row).not.toHaveProperty('rowsDrawn');
    }
    expect(runs.records(1).some(({ dropped }) => dropped)).toBe(false);
  });

  test('resumes exactly', async () => {
    await runs.expectExactResume({ task: await mostlyWrong(3), dynamicSampling: 5 });
  });
});

function rowsOf(step: number): number[] {
  const prompts = new Set(runs.records(step).map(({ prompt }) => Number(/Number (\d+)/.exec(prompt)?.[1])));
  return [...prompts];
}
