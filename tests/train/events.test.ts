import { existsSync } from 'node:fs';
import { join } from 'node:path';
import { setTimeout as wait } from 'node:timers/promises';
import { beforeEach, describe, expect, test } from '@jest/globals';
import { MerfError } from '../../lib/errors.js';
import type { Task } from '../../lib/tasks/index.js';
import { listCheckpoints } from '../../lib/train/checkpoint.js';
import type { TrainingEvent } from '../../lib/train/loop.js';
import { SupervisedTrainer } from '../../lib/train/sft.js';
import { FakePolicy } from './fake-policy.js';
import { FakeRuns } from './fake-run.js';
import { type FakeRow, fakeTask } from './fake-task.js';

const runs = new FakeRuns();
let task: Task<FakeRow>;
beforeEach(async () => {
  task = await fakeTask();
});

const stepsIn = (run = 'run') => runs.metrics(run).map(({ step }) => step);
const savedIn = (run = 'run') =>
  listCheckpoints(join(runs.folder, run, 'checkpoints')).map(({ step }) => step);
const isFree = (run = 'run') => !existsSync(join(runs.folder, run, 'run.lock'));

async function codeOf(run: () => Promise<unknown>): Promise<string> {
  try {
    await run();
  } catch (error) {
    return error instanceof MerfError ? error.code : String(error);
  }
  return 'none';
}

describe('for await (const event of trainer)', () => {
  test('gives the events that a listener hears, to the end of the run', async () => {
    const heard: TrainingEvent[] = [];
    const trainer = runs.trainer(new FakePolicy(), { task, onEvent: (event) => heard.push(event) });
    expect(trainer.result).toBeUndefined();
    const events: TrainingEvent[] = [];
    for await (const event of trainer) events.push(event);
    expect(events).toEqual(heard);
    expect(events.flatMap((event) => (event.type === 'step' ? [event.step] : []))).toEqual([
      1, 2, 3, 4, 5, 6,
    ]);
    expect(trainer.result).toMatchObject({
      step: 6,
      stopped: false,
      model: join(runs.folder, 'run', 'model'),
    });
  });

  test('holds the run back until the events of a step were taken', async () => {
    const policy = new FakePolicy();
    for await (const event of runs.trainer(policy, { task })) {
      if (event.type !== 'step') continue;
      await wait(20);
      expect(policy.sampleCalls).toHaveLength(event.step);
    }
    expect(policy.sampleCalls).toHaveLength(6);
  });

  test('break between two steps saves what is done, and a resumed run goes on bit for bit', async () => {
    const unbroken = new FakePolicy();
    await runs.trainer(unbroken, { task, out: 'unbroken' }).run();
    const first = runs.trainer(new FakePolicy(), { task });
    for await (const event of first) if (event.type === 'step' && event.step === 3) break;
    expect(first.result).toMatchObject({ step: 3, stopped: true });
    expect([stepsIn(), savedIn(), isFree()]).toEqual([[1, 2, 3], [3], true]);
    expect(existsSync(join(runs.folder, 'run', 'model'))).toBe(true);
    const second = new FakePolicy();
    for await (const _ of runs.trainer(second, { task, resume: true }));
    expect(second.logits).toEqual(unbroken.logits);
  });

  test('break within a step brings it to its end', async () => {
    const trainer = runs.trainer(new FakePolicy(), { task });
    for await (const event of trainer) {
      if (event.type === 'phase' && event.phase === 'training' && event.step === 2) break;
    }
    expect([stepsIn(), savedIn(), isFree()]).toEqual([[1, 2], [2], true]);
  });

  test('an error of the loop body stops the run and stays the error', async () => {
    const trainer = runs.trainer(new FakePolicy(), { task });
    const loop = async () => {
      for await (const event of trainer) if (event.type === 'step') throw new Error('enough');
    };
    await expect(loop()).rejects.toThrow('enough');
    expect([stepsIn(), savedIn(), isFree()]).toEqual([[1], [1], true]);
  });

  test('what the run fails with comes after its events', async () => {
    const policy = new FakePolicy();
    policy.onSample = () => {
      if (policy.sampleCalls.length === 3) throw new MerfError('OUT_OF_MEMORY', 'no more');
    };
    const steps: number[] = [];
    const loop = async () => {
      for await (const event of runs.trainer(policy, { task }))
        if (event.type === 'step') steps.push(event.step);
    };
    expect(await codeOf(loop)).toBe('OUT_OF_MEMORY');
    expect([steps, savedIn(), isFree()]).toEqual([[1, 2], [2], true]);
  });

  test('what a run fails with that is left early is the error of leaving', async () => {
    const policy = new FakePolicy();
    policy.onSample = () => {
      if (policy.sampleCalls.length === 2) throw new MerfError('OUT_OF_MEMORY', 'no more');
    };
    const loop = async () => {
      for await (const event of runs.trainer(policy, { task })) {
        if (event.type === 'phase' && event.phase === 'rollout' && event.step === 2) break;
      }
    };
    expect(await codeOf(loop)).toBe('OUT_OF_MEMORY');
    expect(isFree()).toBe(true);
  });

  test('a signal ends a run that is held back, too', async () => {
    const controller = new AbortController();
    const policy = new FakePolicy();
    const loop = async () => {
      for await (const event of runs.trainer(policy, { task }).events({ signal: controller.signal })) {
        if (event.type !== 'step' || event.step !== 2) continue;
        controller.abort();
        for (let i = 0; i < 500 && !isFree(); i++) await wait(10);
        expect(isFree()).toBe(true);
      }
    };
    expect(await codeOf(loop)).toBe('ABORTED');
    expect([policy.sampleCalls.length, stepsIn()]).toEqual([2, [1, 2]]);
  });

  test('a trainer runs once at a time', async () => {
    const trainer = runs.trainer(new FakePolicy(), { task });
    const codes: string[] = [];
    for await (const event of trainer) {
      if (event.type !== 'start') continue;
      codes.push(await codeOf(() => trainer.run()), await codeOf(() => trainer.events().next()));
    }
    expect(codes).toEqual(['BUSY', 'BUSY']);
    expect(trainer.result?.step).toBe(6);
  });

  test('supervised trainers do the same', async () => {
    const options = { policy: new FakePolicy().asPolicy, task, steps: 4, examplesPerStep: 2 };
    const trainer = new SupervisedTrainer<FakeRow>({ ...options, out: join(runs.folder, 'sft') });
    for await (const event of trainer) if (event.type === 'step' && event.step === 2) break;
    expect(trainer.result).toMatchObject({ step: 2, stopped: true });
    expect([savedIn('sft'), isFree('sft')]).toEqual([[2], true]);
  });
});

test('await using stops a run that goes on and waits for its end', async () => {
  const policy = new FakePolicy();
  let running: Promise<unknown> | undefined;
  {
    await using trainer = runs.trainer(policy, { task });
    await new Promise<void>((resolve) => {
      policy.onSample = resolve;
      running = trainer.run();
    });
  }
  expect(isFree()).toBe(true);
  expect(await running).toMatchObject({ step: 1, stopped: true });
  expect(savedIn()).toEqual([1]);
});
