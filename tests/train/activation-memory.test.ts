import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from '@jest/globals';
import { defaultKeepActivations } from '../../lib/train/activation-memory.js';
import { Trainer, type TrainerOptions } from '../../lib/train/trainer.js';
import { FakePolicy } from './fake-policy.js';
import { type FakeRow, fakeTask } from './fake-task.js';

const gib = 2 ** 30;

let folder: string;
beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), 'merf-keep-'));
});
afterEach(() => rmSync(folder, { recursive: true, force: true }));

/** Runs a trainer on a device with so many GiB to spare; the bytes that each of its rollouts was given. */
async function keptBy(spare: number, options: Partial<TrainerOptions<FakeRow>> = {}) {
  const policy = new FakePolicy();
  const trainer = new Trainer<FakeRow>({
    policy: Object.assign(policy.asPolicy, { spareMemory: () => spare * gib }),
    task: await fakeTask(),
    out: join(folder, 'run'),
    steps: 2,
    promptsPerStep: 2,
    groupSize: 4,
    maxTokens: 6,
    ...options,
  });
  await trainer.run();
  return (policy.sampleCalls as { keepActivations?: number }[]).map(({ keepActivations }) => keepActivations);
}

test('the default is 512 MiB, or a power of two within a quarter of what the device has to spare', () => {
  const of = (spare: number) => defaultKeepActivations({ spareMemory: () => spare * gib });
  expect([64, 2, 1.99, 1, 0.6, 0.25, 0.24, 0].map(of)).toEqual([0.5, 0.5, 0.25, 0.25, 0.125, 0.0625, 0, 0]);
  expect(defaultKeepActivations({})).toBe(0.5);
});

describe('a trainer', () => {
  test('keeps activations by default, as many as it is told to, or none', async () => {
    expect(await keptBy(64)).toEqual([gib / 2, gib / 2]);
    const { settings } = JSON.parse(readFileSync(join(folder, 'run', 'run.json'), 'utf8'));
    expect(settings.keepActivations).toBe(0.5);
    expect(await keptBy(64, { keepActivations: 3, out: join(folder, 'more') })).toEqual([3 * gib, 3 * gib]);
    expect(await keptBy(64, { keepActivations: 0, out: join(folder, 'none') })).toEqual([0, 0]);
  });

  test('keeps on a resumed run what the run kept before, unless it is told otherwise', async () => {
    await keptBy(1.5);
    expect(await keptBy(64, { resume: true, steps: 3 })).toEqual([gib / 4]);
    expect(await keptBy(64, { resume: true, steps: 4, keepActivations: 1 })).toEqual([gib]);
    expect(await keptBy(64, { resume: true, steps: 5 })).toEqual([gib]);
  });

  test('keeps nothing for steps that learn under another prompt', async () => {
    const schedule = { learnUnder: 'same@0,same/none@1,none@2,same@3', steps: 4 };
    expect(await keptBy(64, schedule)).toEqual([gib / 2, 0, 0, gib / 2]);
    expect(await keptBy(64, { anchor: 0.1, out: join(folder, 'anchored') })).toEqual([0, 0]);
  });
});
