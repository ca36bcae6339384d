import { existsSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from '@jest/globals';
import { MerfError } from '../../lib/errors.js';
import type { Task } from '../../lib/tasks/index.js';
import { listCheckpoints } from '../../lib/train/checkpoint.js';
import type { CompletionRecord } from '../../lib/train/completions.js';
import type { TrainingEvent } from '../../lib/train/loop.js';
import { readMetrics } from '../../lib/train/metrics.js';
import { type GrpoMetrics, Trainer, type TrainerOptions } from '../../lib/train/trainer.js';
import { FakePolicy } from './fake-policy.js';
import { type FakeRow, fakeTask } from './fake-task.js';

let folder: string;
let task: Task<FakeRow>;

beforeEach(async () => {
  folder = mkdtempSync(join(tmpdir(), 'merf-trainer-'));
  task = await fakeTask();
});
afterEach(() => rmSync(folder, { recursive: true, force: true }));

function trainer(policy: FakePolicy, options: Partial<TrainerOptions<FakeRow>> = {}) {
  return new Trainer<FakeRow>({
    policy: policy.asPolicy,
    task,
    out: join(folder, 'run'),
    steps: 6,
    promptsPerStep: 4,
    groupSize: 8,
    maxTokens: 6,
    learningRate: 0.5,
    ...options,
  });
}

function metricsOf(run = 'run'): GrpoMetrics[] {
  return readMetrics(join(folder, run, 'metrics.jsonl')) as unknown as GrpoMetrics[];
}

function withoutTimes(rows: GrpoMetrics[]) {
  return rows.map((row) =>
    Object.fromEntries(
      Object.entries(row).filter(([key]) => !/[sS]econds?$/.test(key) && key !== 'evaluation'),
    ),
  );
}

describe('Trainer', () => {
  test('learns: the share of correct completions rises, by the gradient alone', async () => {
    const policy = new FakePolicy();
    await trainer(policy, { steps: 60, learningRate: 1 }).run();
    const rows = metricsOf();
    const mean = (some: GrpoMetrics[]) => some.reduce((sum, row) => sum + row.correct, 0) / some.length;
    expect(mean(rows.slice(0, 5))).toBeLessThan(0.45);
    expect(mean(rows.slice(-5))).toBeGreaterThan(0.8);
  });

  test('a GPU that is lost ends the run without a try to save, and the error names what is left', async () => {
    const losing = (step: number) => {
      const policy = new FakePolicy();
      policy.onSample = () => {
        if (policy.sampleCalls.length === step)
          throw new MerfError('DEVICE_LOST', 'The GPU was lost: so it goes');
      };
      policy.saveState = ((save) => async (path: string) => {
        if (policy.sampleCalls.length >= step) throw new Error('saved what is lost');
        return save(path);
      })(policy.saveState.bind(policy));
      return policy;
    };
    const run = join(folder, 'run');
    await expect(trainer(losing(1), { saveEvery: 2 }).run()).rejects.toMatchObject({
      code: 'DEVICE_LOST',
      message: `The GPU was lost: so it goes; ${run} has no checkpoint yet, so the run has to be started again`,
    });
    const other = join(folder, 'other');
    await expect(trainer(losing(4), { saveEvery: 2, out: other }).run()).rejects.toMatchObject({
      code: 'DEVICE_LOST',
      message:
        `The GPU was lost: so it goes; resume ${other}, which goes on after step 2 from ` +
        join(other, 'checkpoints', 'step-000002'),
    });
  });

  test('memory retries are counted by step where the policy counts them', async () => {
    const policy = new FakePolicy();
    let retries = 5;
    policy.onSample = () => {
      retries += policy.sampleCalls.length;
    };
    const counting = Object.assign(policy.asPolicy, { memory: () => ({ used: 0, peak: 0, retries }) });
    await trainer(policy, { policy: counting, steps: 2 }).run();
    expect(metricsOf().map((row) => row.memoryRetries)).toEqual([1, 2]);
    await trainer(new FakePolicy(), { steps: 1, out: join(folder, 'none') }).run();
    expect(metricsOf('none')[0]).not.toHaveProperty('memoryRetries');
  });

  test('metrics follow from the completions that were kept', async () => {
    await trainer(new FakePolicy(), { steps: 3 }).run();
    const rows = metricsOf();
    expect(rows.map((row) => row.step)).toEqual([1, 2, 3]);
    for (const row of rows) {
      const file = join(folder, 'run', 'completions', `step-00000${row.step}.jsonl`);
      const records = readFileSync(file, 'utf8')
        .trim()
        .split('\n')
        .map((line) => JSON.parse(line) as CompletionRecord);
      expect(records).toHaveLength(32);
      const mean = (value: (record: CompletionRecord) => number) =>
        records.reduce((sum, record) => sum + value(record), 0) / records.length;
      expect(row.reward).toBeCloseTo(
        mean((r) => r.reward),
        10,
      );
      expect(row.parts.start).toBeCloseTo(
        mean((r) => r.parts.start?.score as number),
        10,
      );
      expect(row.correct).toBeCloseTo(
        mean((r) => (r.text.startsWith('b') ? 1 : 0)),
        10,
      );
      expect(row.length).toBeCloseTo(
        mean((r) => r.tokens),
        10,
      );
      expect(row.truncated).toBeCloseTo(
        mean((r) => (r.finishReason === 'length' ? 1 : 0)),
        10,
      );
      for (let p = 0; p < 4; p++) {
        const group = records.filter((r) => r.promptIndex === p);
        expect(group.map((r) => r.completionIndex)).toEqual([0, 1, 2, 3, 4, 5, 6, 7]);
        const groupMean = group.reduce((sum, r) => sum + r.reward, 0) / 8;
        const deviation = Math.sqrt(group.reduce((sum, r) => sum + (r.reward - groupMean) ** 2, 0) / 7);
        for (const r of group)
          expect(r.advantage).toBeCloseTo((r.reward - groupMean) / (deviation + 1e-4), 6);
      }
      expect(readFileSync(file.replace('.jsonl', '.txt'), 'utf8')).toContain('begins with b');
      // The first update of a rollout is at the policy that drew it.
      expect(row.ratio?.mean).toBeCloseTo(1, 5);
      expect(row.ratio?.min).toBeCloseTo(1, 5);
      expect(row.ratio?.max).toBeCloseTo(1, 5);
      expect(row.updates).toBe(1);
      expect(row.rolloutTokensPerSecond).toBeGreaterThan(0);
    }
  });

  test('mini-batches and several updates use the rollout of before', async () => {
    const policy = new FakePolicy();
    await trainer(policy, { steps: 1, miniBatches: 2, updatesPerRollout: 3 }).run();
    expect(policy.updates).toBe(6);
    expect(policy.sampleCalls).toHaveLength(1);
    const [row] = metricsOf();
    expect(row?.updates).toBe(6);
    expect(row?.ratio?.max).toBeGreaterThan(1.0001);
  });

  test('the prompts of a batch share what they begin with, and nothing else', async () => {
    const policy = new FakePolicy();
    await trainer(policy, { steps: 1 }).run();
    const [root, ...others] = policy.forests[0] ?? [];
    expect(others).toEqual([]);
    expect(root?.children).toHaveLength(4);
    const text = String.fromCharCode(...Array.from(root?.tokens ?? []));
    expect(text).toContain('Write letters.');
    expect(text).toContain('begins with b');
    expect(text.endsWith('Number ')).toBe(true);
    for (const question of root?.children ?? []) {
      expect(question.tokens.length).toBeGreaterThan(0);
      expect(question.children).toHaveLength(8);
    }
  });

  test('the motivation follows its schedule', async () => {
    await trainer(new FakePolicy(), { steps: 4, motivation: 'full@0,none@2' }).run();
    expect(metricsOf().map((row) => row.motivation)).toEqual(['full', 'full', 'none', 'none']);
    const transcript = (step: number) =>
      readFileSync(join(folder, 'run', 'completions', `step-00000${step}.txt`), 'utf8');
    expect(transcript(2)).toContain('begins with b');
    expect(transcript(3)).not.toContain('begins with b');
  });

  test('truncated completions are left out on request alone, and count in what the loss divides by', async () => {
    for (const maskTruncated of [true, false]) {
      const policy = new FakePolicy();
      await trainer(policy, {
        out: join(folder, String(maskTruncated)),
        steps: 1,
        maxTokens: 2,
        maskTruncated,
      }).run();
      const completions = (policy.forests[0]?.[0]?.children ?? []).flatMap(
        (question) => question.children ?? [],
      );
      const truncated = completions.filter((segment) => segment.tokens[segment.tokens.length - 1] !== 3);
      expect(truncated.length > 0).toBe(!maskTruncated);
      const [loss] = policy.losses as { normalizer?: { completions: number; tokens: number } }[];
      expect(loss?.normalizer?.completions).toBe(32);
      const drawn = readFileSync(
        join(folder, String(maskTruncated), 'completions', 'step-000001.jsonl'),
        'utf8',
      )
        .trim()
        .split('\n')
        .map((line) => JSON.parse(line) as CompletionRecord);
      const counted = drawn.filter(({ finishReason }) => !maskTruncated || finishReason !== 'length');
      expect(loss?.normalizer?.tokens).toBe(counted.reduce((sum, { tokens }) => sum + tokens, 0));
    }
  });

  test('a KL penalty takes its reference from the second policy', async () => {
    const policy = new FakePolicy();
    expect(() => trainer(policy, { kl: 0.1 })).toThrow(/reference/);
    const reference = new FakePolicy();
    reference.logits = [0, 3, 0, 0];
    await trainer(policy, { steps: 1, kl: 0.1, reference: reference.asPolicy as never }).run();
    const [first] = policy.forests[0]?.[0]?.children?.[0]?.children ?? [];
    const expected = 3 * ((first?.tokens[0] ?? 0) === 1 ? 1 : 0) - Math.log(3 + Math.exp(3));
    expect(first?.train?.referenceLogprobs?.[0]).toBeCloseTo(expected, 5);
    expect(policy.losses[0]).toMatchObject({ type: 'dapo', kl: 0.1, klRatio: true });
    const settings = { steps: 1, kl: 0.1, klRatio: false, reference: reference.asPolicy as never };
    await trainer(policy, { ...settings, out: join(folder, 'without') }).run();
    await trainer(policy, { steps: 1, out: join(folder, 'none') }).run();
    expect(policy.losses.slice(1).map(({ type: _, ...loss }) => 'klRatio' in loss && loss.klRatio)).toEqual([
      false,
      false,
    ]);
  });

  test('evaluates before, during and after, under each view', async () => {
    await trainer(new FakePolicy(), {
      steps: 5,
      evaluateEvery: 2,
      evaluatePrompts: 3,
      evaluateSamples: 4,
    }).run();
    const rows = metricsOf();
    expect(rows.map((row) => [row.step, row.evaluation !== undefined])).toEqual([
      [0, true],
      [1, false],
      [2, true],
      [3, false],
      [4, true],
      [5, true],
    ]);
    const evaluation = rows[2]?.evaluation;
    expect(Object.keys(evaluation ?? {})).toEqual(['none', 'full']);
    expect(Object.keys(evaluation?.none?.passAt ?? {})).toEqual(['1', '2', '4']);
    expect(evaluation?.none?.passAt['1']).toBeCloseTo(evaluation?.none?.accuracy as number, 10);
  });

  test('a non-finite loss or gradient skips the update, says so and is counted', async () => {
    const policy = new FakePolicy();
    policy.breakLossAt.add(1);
    policy.breakGradientAt.add(2);
    const notices: string[] = [];
    const onEvent = (event: TrainingEvent) => {
      if (event.type === 'notice') notices.push(event.message);
    };
    await trainer(policy, { steps: 4, onEvent }).run();
    expect(metricsOf().map((row) => [row.updates, row.skippedUpdates])).toEqual([
      [1, 0],
      [0, 1],
      [0, 1],
      [1, 0],
    ]);
    expect(notices).toEqual([
      expect.stringContaining('Step 2: the loss was not finite'),
      expect.stringContaining('Step 3: the gradient was not finite'),
    ]);
    expect(policy.logits.every(Number.isFinite)).toBe(true);
  });

  test('says so where there is nothing to learn from', async () => {
    task = await fakeTask({ verify: () => 'wrong' });
    const notices: string[] = [];
    const policy = new FakePolicy();
    await trainer(policy, {
      onEvent: (event) => {
        if (event.type === 'notice') notices.push(event.message);
      },
    }).run();
    expect(metricsOf().map((row) => row.uniformGroups)).toEqual([1, 1, 1, 1, 1, 1]);
    expect(notices).toEqual([expect.stringMatching(/For 3 steps .* with merf sft/)]);
    expect(policy.logits).toEqual([0, 0, 0, 0]);
  });

  test('gives up where no update is finite any more', async () => {
    const policy = new FakePolicy();
    for (let call = 2; call < 40; call++) policy.breakLossAt.add(call);
    await expect(trainer(policy, { steps: 40 }).run()).rejects.toMatchObject({ code: 'NON_FINITE' });
    expect(metricsOf()).toHaveLength(12);
  });

  test.each([
    [
      'throws',
      () => {
        throw new Error('no such judge');
      },
      'VERIFIER_FAILED',
      /no such judge/,
    ],
    ['hangs', () => new Promise<string>(() => {}), 'VERIFIER_TIMEOUT', /longer than/],
    ['returns NaN', () => Number.NaN as unknown as string, 'VERIFIER_FAILED', /NaN/],
  ])(
    'a verifier that %s ends the run with the row, and the steps before are saved',
    async (_, misbehave, code, message) => {
      let calls = 0;
      task = await fakeTask({
        timeoutSeconds: 0.2,
        verify: (text) => (++calls > 64 ? misbehave() : text.startsWith('b') ? 'right' : 'wrong'),
      });
      const policy = new FakePolicy();
      const failure = trainer(policy, { saveEvery: 0 }).run();
      await expect(failure).rejects.toMatchObject({ code, message: expect.stringMatching(message) });
      await expect(failure).rejects.toThrow(/row \d+/);
      expect(listCheckpoints(join(folder, 'run', 'checkpoints')).map((c) => c.step)).toEqual([2]);
      expect(policy.updates).toBe(2);
    },
  );
});

describe('stopping and resuming', () => {
  test('a resumed run goes on as the unbroken one does', async () => {
    const unbroken = new FakePolicy();
    await trainer(unbroken, { out: join(folder, 'unbroken'), steps: 8 }).run();

    const first = new FakePolicy();
    const early: Trainer<FakeRow> = trainer(first, {
      steps: 8,
      saveEvery: 2,
      onEvent: (event) => {
        if (event.type === 'step' && event.step === 5) early.stop();
      },
    });
    const stopped = await early.run();
    expect(stopped).toMatchObject({ step: 5, stopped: true });

    const second = new FakePolicy();
    const result = await trainer(second, { steps: 8, saveEvery: 2, resume: true }).run();
    expect(result).toMatchObject({ step: 8, stopped: false });
    expect(second.logits).toEqual(unbroken.logits);
    expect(withoutTimes(metricsOf())).toEqual(withoutTimes(metricsOf('unbroken')));
    expect(
      readdirSync(join(folder, 'run', 'completions')).filter((name) => name.endsWith('.jsonl')),
    ).toHaveLength(8);
  });

  test('what came after the checkpoint is dropped and done again', async () => {
    const policy = new FakePolicy();
    policy.onSample = () => {
      if (policy.sampleCalls.length === 6) throw new Error('pulled the plug');
    };
    const out = join(folder, 'run');
    await expect(trainer(policy, { steps: 8, saveEvery: 3, keepCheckpoints: 5 }).run()).rejects.toThrow(
      'plug',
    );
    // The failed step 6 had not updated anything, so step 5 was saved.
    expect(listCheckpoints(join(out, 'checkpoints')).map((c) => c.step)).toEqual([3, 5]);
    rmSync(join(out, 'checkpoints', 'step-000005'), { recursive: true });
    expect(metricsOf()).toHaveLength(5);
    await trainer(new FakePolicy(), { steps: 8, saveEvery: 3, resume: true }).run();
    expect(metricsOf().map((row) => row.step)).toEqual([1, 2, 3, 4, 5, 6, 7, 8]);
  });

  test('abort in mid-sample and in mid-step loses the step in progress and nothing before it', async () => {
    for (const where of ['onSample', 'onForwardBackward'] as const) {
      const out = join(folder, where);
      const policy = new FakePolicy();
      const abort = new AbortController();
      let calls = 0;
      policy[where] = () => {
        if (++calls === 3) abort.abort();
      };
      await expect(
        trainer(policy, { out, saveEvery: 2 }).run({ signal: abort.signal }),
      ).rejects.toMatchObject({
        code: 'ABORTED',
      });
      expect(policy.updates).toBe(2);
      expect(listCheckpoints(join(out, 'checkpoints')).map((c) => c.step)).toEqual([2]);
      const again = new FakePolicy();
      await trainer(again, { out, resume: true }).run();
      const unbroken = new FakePolicy();
      await trainer(unbroken, { out: `${out}-unbroken` }).run();
      expect(again.logits).toEqual(unbroken.logits);
    }
  });

  test('keeps the newest checkpoints', async () => {
    await trainer(new FakePolicy(), { steps: 7, saveEvery: 2, keepCheckpoints: 2 }).run();
    expect(listCheckpoints(join(folder, 'run', 'checkpoints')).map((c) => c.step)).toEqual([6, 7]);
    expect(existsSync(join(folder, 'run', 'model', 'weights.json'))).toBe(true);
  });

  test('refuses by name to resume with other settings or another data set', async () => {
    await trainer(new FakePolicy(), { steps: 2 }).run();
    const resumed = (options: Partial<TrainerOptions<FakeRow>>) =>
      trainer(new FakePolicy(), { steps: 4, resume: true, ...options }).run();
    await expect(resumed({ learningRate: 0.1 })).rejects.toMatchObject({
      code: 'RESUME_MISMATCH',
      message: expect.stringMatching(/learningRate was 0\.5 and is 0\.1/),
    });
    await expect(resumed({ groupSize: 4, motivation: 'none' })).rejects.toThrow(
      /groupSize was 8 and is 4.*motivation was "full" and is "none"/,
    );
    await expect(resumed({ rows: [{ id: 7 }] })).rejects.toThrow(/data was .* and is /);
    await resumed({});
    expect(metricsOf()).toHaveLength(4);
  });

  test('a setting that a run of before did not have was off in it', async () => {
    await trainer(new FakePolicy(), { steps: 2 }).run();
    const file = join(folder, 'run', 'run.json');
    const saved = JSON.parse(readFileSync(file, 'utf8')) as { settings: Record<string, unknown> };
    delete saved.settings.overlongBuffer;
    delete saved.settings.topP;
    writeFileSync(file, JSON.stringify(saved));
    const resumed = (options: Partial<TrainerOptions<FakeRow>>) =>
      trainer(new FakePolicy(), { steps: 4, resume: true, ...options }).run();
    await expect(resumed({ overlongBuffer: 2 })).rejects.toMatchObject({
      code: 'RESUME_MISMATCH',
      message: expect.stringMatching(/: overlongBuffer was 0 and is 2$/),
    });
    await resumed({});
    expect(metricsOf()).toHaveLength(4);
  });

  test('a later end leaves the schedule where it was', async () => {
    await trainer(new FakePolicy(), { steps: 4, schedule: 'linear' }).run();
    await expect(
      trainer(new FakePolicy(), { steps: 6, schedule: 'linear', resume: true }).run(),
    ).rejects.toThrow(/decaySteps was 4 and is 6/);
    await trainer(new FakePolicy(), { steps: 6, schedule: 'linear', decaySteps: 4, resume: true }).run();
    expect(metricsOf().map((row) => row.learningRate)).toEqual([0.5, 0.375, 0.25, 0.125, 0, 0]);
  });

  test('a folder that holds a run is not written over', async () => {
    await trainer(new FakePolicy(), { steps: 1 }).run();
    await expect(trainer(new FakePolicy(), { steps: 1 }).run()).rejects.toThrow(/holds a run already/);
    await expect(
      trainer(new FakePolicy(), { out: join(folder, 'none'), resume: true }).run(),
    ).rejects.toMatchObject({
      code: 'FILE_NOT_FOUND',
    });
  });
});

describe('settings', () => {
  test('what is wrong is named', () => {
    const make = (options: object) => () => trainer(new FakePolicy(), options);
    expect(make({ lerningRate: 1 })).toThrow(/unknown key "lerningRate"; did you mean "learningRate"\?/);
    expect(make({ groupSize: 1 })).toThrow(/groupSize/);
    expect(make({ loss: 'ppo' })).toThrow(/loss/);
    expect(make({ miniBatches: 3 })).toThrow(/miniBatches to divide promptsPerStep = 4/);
    expect(make({ motivation: 'partial:style' })).toThrow(/style/);
    expect(make({ motivation: 'loud' })).toThrow(/motivation/);
    expect(make({ evaluateMotivations: ['none', 'partial:style'] })).toThrow(/style/);
  });
});
