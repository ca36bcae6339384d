import { spawn, spawnSync } from 'node:child_process';
import {
  appendFileSync,
  existsSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmSync,
  utimesSync,
  writeFileSync,
} from 'node:fs';
import { hostname } from 'node:os';
import { join } from 'node:path';
import { beforeEach, describe, expect, test } from '@jest/globals';
import type { Task } from '../../lib/tasks/index.js';
import { listCheckpoints } from '../../lib/train/checkpoint.js';
import type { RunResult } from '../../lib/train/loop.js';
import { RunLock } from '../../lib/train/run-lock.js';
import { FakePolicy } from './fake-policy.js';
import { FakeRuns } from './fake-run.js';
import { type FakeRow, fakeTask } from './fake-task.js';

const runs = new FakeRuns();
let task: Task<FakeRow>;
let out: string;
let lock: string;
beforeEach(async () => {
  task = await fakeTask();
  out = join(runs.folder, 'run');
  lock = join(out, 'run.lock');
});

/** Writes a run of six steps with a checkpoint after each second one. */
async function finished(): Promise<FakePolicy> {
  const policy = new FakePolicy();
  await runs.trainer(policy, { task, saveEvery: 2, keepCheckpoints: 5 }).run();
  return policy;
}

const resumed = (options: object = {}): Promise<RunResult> =>
  runs.trainer(new FakePolicy(), { task, resume: true, ...options }).run();

describe("a run's folder is one process's at a time", () => {
  /** What a lock says of this process, changed. */
  function lockedBy(changes: object): void {
    rmSync(lock, { force: true });
    const held = RunLock.take(out);
    const text = readFileSync(lock, 'utf8');
    held.release();
    writeFileSync(lock, JSON.stringify({ ...JSON.parse(text), token: 'another', ...changes }));
  }

  test('a second trainer is refused while the first one runs, with its process and host, and not after it', async () => {
    let refused: Promise<unknown> | undefined;
    const first = runs.trainer(new FakePolicy(), {
      task,
      onEvent: (event) => {
        if (event.type === 'step' && event.step === 2) refused = resumed().catch((error: unknown) => error);
      },
    });
    await first.run();
    expect(await refused).toMatchObject({
      code: 'BUSY',
      message: `${out} is in use by process ${process.pid} on ${hostname()}`,
    });
    expect(runs.metrics().map(({ step }) => step)).toEqual([1, 2, 3, 4, 5, 6]);
    expect(existsSync(lock)).toBe(false);
    await resumed({ steps: 7 });
    expect(runs.metrics()).toHaveLength(7);
  });

  test('that of a living process is refused before anything is written', async () => {
    await finished();
    const child = spawn('sleep', ['60']);
    try {
      const stat = readFileSync(`/proc/${child.pid}/stat`, 'utf8');
      const began = stat.slice(stat.lastIndexOf(')') + 2).split(' ')[19];
      lockedBy({ pid: child.pid, began });
      const before = readFileSync(lock, 'utf8');
      await expect(resumed({ steps: 8 })).rejects.toMatchObject({ code: 'BUSY' });
      expect(() => RunLock.checkFree(out)).toThrow(`in use by process ${child.pid} on ${hostname()}`);
      expect(readFileSync(lock, 'utf8')).toBe(before);
      expect(runs.metrics()).toHaveLength(6);
      // The number has come again: the process that had it when the lock was written began earlier.
      lockedBy({ pid: child.pid, began: '1' });
      await resumed({ steps: 8 });
      expect(runs.metrics()).toHaveLength(8);
    } finally {
      child.kill();
    }
  });

  test('that of a process that has ended is taken over, and so is one that says nothing after five minutes', async () => {
    await finished();
    const { pid } = spawnSync('true');
    lockedBy({ pid });
    await resumed({ steps: 7 });
    writeFileSync(lock, '{"tok');
    await expect(resumed({ steps: 8 })).rejects.toMatchObject({ code: 'BUSY' });
    const past = Date.now() / 1000 - 400;
    utimesSync(lock, past, past);
    await resumed({ steps: 8 });
    expect(runs.metrics()).toHaveLength(8);
    expect(existsSync(lock)).toBe(false);
  });

  test('one of another machine holds as long as it is touched, and the error says what to do', async () => {
    await finished();
    lockedBy({ host: 'elsewhere', pid: 1 });
    await expect(resumed({ steps: 7 })).rejects.toMatchObject({
      code: 'BUSY',
      message: `${out} is in use by process 1 on elsewhere; if it is gone, wait 5 minutes or delete ${lock}`,
    });
    const past = Date.now() / 1000 - 400;
    utimesSync(lock, past, past);
    await resumed({ steps: 7 });
    // Containers of one machine have process numbers of their own.
    lockedBy({ processes: 'another container', pid: spawnSync('true').pid });
    await expect(resumed({ steps: 8 })).rejects.toMatchObject({ code: 'BUSY' });
  });

  test('a run whose folder another one has taken over ends, and leaves the folder to it', async () => {
    const taken = runs.trainer(new FakePolicy(), {
      task,
      saveEvery: 1,
      onEvent: (event) => {
        if (event.type !== 'step' || event.step !== 3) return;
        lockedBy({ host: 'elsewhere', pid: 7 });
      },
    });
    await expect(taken.run()).rejects.toMatchObject({
      code: 'BUSY',
      message: expect.stringContaining('process 7'),
    });
    expect(JSON.parse(readFileSync(lock, 'utf8'))).toMatchObject({ host: 'elsewhere' });
    expect(listCheckpoints(join(out, 'checkpoints')).map(({ step }) => step)).toEqual([1, 2]);
  });

  test('a lock that somebody deleted is put back', async () => {
    let found: string | undefined;
    await runs
      .trainer(new FakePolicy(), {
        task,
        onEvent: (event) => {
          if (event.type === 'step' && event.step === 3) rmSync(lock);
          if (event.type === 'phase' && event.step === 5) found = readFileSync(lock, 'utf8');
        },
      })
      .run();
    expect(JSON.parse(found ?? '')).toMatchObject({ pid: process.pid });
    expect(existsSync(lock)).toBe(false);
  });
});

describe('what happens to the folder is noticed', () => {
  test.each(['deleted', 'moved'])('%s in mid-run, it is said and not made again', async (how) => {
    const run = runs.trainer(new FakePolicy(), {
      task,
      saveEvery: 2,
      onEvent: (event) => {
        if (event.type !== 'phase' || event.step !== 4) return;
        if (how === 'deleted') rmSync(out, { recursive: true, force: true });
        else if (existsSync(out)) renameSync(out, `${out}-moved`);
      },
    });
    await expect(run.run()).rejects.toMatchObject({
      code: 'FILE_FAILED',
      message: expect.stringMatching(/run.* gone.*(deleted or moved)/),
    });
    expect(existsSync(out)).toBe(false);
  });

  test('what killed runs left behind goes, what is not theirs stays', async () => {
    await finished();
    const litter = [
      'metrics.jsonl.tmp-123',
      'run.json.tmp-9',
      'completions/step-000002.jsonl.tmp-77',
      'checkpoints/.step-000004.tmp-5-0a1b2c3d/policy',
      'checkpoints/.step-000002.old-5-0a1b2c3d/policy',
      '.model.tmp-12-00000000/weights.json',
    ];
    const others = ['notes.tmp-1', 'completions/mine.txt.tmp-4', '.cache.tmp-12-00000000'];
    for (const name of [...litter, ...others]) {
      mkdirSync(join(out, name, '..'), { recursive: true });
      writeFileSync(join(out, name), 'half');
    }
    // Killed between two renamings, it left the model beside its place.
    renameSync(join(out, 'model'), join(out, '.model.old-12-00000000'));
    await resumed();
    const left = (readdirSync(out, { recursive: true }) as string[]).filter((name) =>
      /\.(tmp|old)-/.test(name),
    );
    expect(left.sort()).toEqual([...others].sort());
    expect(existsSync(join(out, 'model', 'weights.json'))).toBe(true);
  });

  test('the model that a killed run had moved away is back before the run goes on', async () => {
    await finished();
    renameSync(join(out, 'model'), join(out, '.model.old-12-00000000'));
    const policy = new FakePolicy();
    policy.onSample = () => {
      throw new Error('pulled the plug');
    };
    await expect(runs.trainer(policy, { task, resume: true, steps: 7 }).run()).rejects.toThrow('plug');
    expect(existsSync(join(out, 'model', 'weights.json'))).toBe(true);
  });
});

describe('a checkpoint that is not whole', () => {
  const progressOf = (step: number) => join(out, 'checkpoints', `step-00000${step}`, 'progress.json');

  test.each([
    ['is cut', () => writeFileSync(progressOf(6), '{"step": 6, "pos')],
    ['lacks a file', () => rmSync(progressOf(6))],
    ['is of another step', () => writeFileSync(progressOf(6), '{"step": 5, "position": 20}')],
    ['is no object', () => writeFileSync(progressOf(6), 'null')],
  ])('and %s names the newest that is whole, which an option uses', async (_, breakIt) => {
    const unbroken = await finished();
    breakIt();
    writeFileSync(progressOf(4), '');
    await expect(resumed()).rejects.toMatchObject({
      message: expect.stringMatching(
        /^The newest checkpoint, after step 6, is not whole: .*progress\.json.*; the one after step 2 is: .*--checkpoint 2/,
      ),
    });
    expect(runs.metrics()).toHaveLength(6);
    const policy = new FakePolicy();
    await runs.trainer(policy, { task, resume: true, checkpoint: 2, saveEvery: 2, keepCheckpoints: 5 }).run();
    expect(policy.logits).toEqual(unbroken.logits);
    expect(listCheckpoints(join(out, 'checkpoints')).map(({ step }) => step)).toEqual([2, 4, 6]);
  });

  test('is told from one of other settings, and a step without a checkpoint is refused', async () => {
    await finished();
    await expect(resumed({ checkpoint: 3 })).rejects.toThrow(/\(2, 4, 6\) for checkpoint but received 3/);
    for (const step of [2, 4, 6]) writeFileSync(progressOf(step), '');
    await expect(resumed()).rejects.toThrow(/after step 6, is not whole: .*; there is no older one that is/);
  });

  test('does no harm to a run that goes on from another one', async () => {
    await finished();
    writeFileSync(progressOf(2), '');
    await resumed({ steps: 8, saveEvery: 1 });
    expect(runs.metrics()).toHaveLength(8);
  });
});

describe('the file system refuses', () => {
  test.each([
    ['a folder below a file', 'INVALID_ARGUMENT', (): void => writeFileSync(out, ''), 'run/deeper'],
    ['a name that is too long', 'INVALID_ARGUMENT', (): void => undefined, 'x'.repeat(300)],
    [
      'a file in the place of completions/',
      'FILE_NOT_FOUND',
      () => {
        mkdirSync(out);
        writeFileSync(join(out, 'completions'), '');
      },
      'run',
    ],
    [
      'a file in the place of checkpoints/',
      'INVALID_ARGUMENT',
      () => {
        mkdirSync(join(out, '..', 'run-2'), { recursive: true });
      },
      'run-2',
    ],
    [
      'a folder in the place of motivation.jsonl',
      'INVALID_ARGUMENT',
      () => {
        mkdirSync(join(out, 'motivation.jsonl'), { recursive: true });
      },
      'run',
    ],
  ] as const)('%s', async (what, code, prepare, name) => {
    prepare();
    const adaptive = what.includes('motivation') ? { motivation: 'adaptive', groupSize: 8 } : {};
    const run = runs.trainer(new FakePolicy(), {
      task,
      out: name,
      saveEvery: 1,
      ...adaptive,
      onEvent: (event) => {
        if (what.includes('checkpoints') && event.type === 'start') {
          writeFileSync(join(runs.folder, name, 'checkpoints'), '');
        }
      },
    });
    await expect(run.run()).rejects.toMatchObject({
      name: 'MerfError',
      code: what.includes('motivation') ? expect.stringMatching(/INVALID_ARGUMENT|FILE_FAILED/) : code,
      message: expect.stringMatching(new RegExp(`${name.slice(0, 20)}.* cannot be (read|written): E[A-Z]+`)),
    });
  });

  test('to read metrics.jsonl or run.json, and the error names them', async () => {
    await finished();
    for (const name of ['metrics.jsonl', 'run.json']) {
      const path = join(out, name);
      renameSync(path, `${path}-away`);
      mkdirSync(path);
      await expect(resumed()).rejects.toMatchObject({
        code: 'FILE_FAILED',
        message: expect.stringContaining(`${path} cannot be read: EISDIR`),
      });
      rmSync(path, { recursive: true });
      renameSync(`${path}-away`, path);
    }
    for (const text of [
      'null',
      '{"settings": null, "identity": {}, "kind": "grpo"}',
      '[]',
      '{"settings": {}}',
    ]) {
      writeFileSync(join(out, 'run.json'), text);
      await expect(resumed()).rejects.toMatchObject({ code: 'MALFORMED_FILE' });
    }
    appendFileSync(join(out, 'run.json'), '{');
    await expect(resumed()).rejects.toThrow(/run\.json/);
  });
});
