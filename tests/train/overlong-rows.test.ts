import { existsSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from '@jest/globals';
import { PromptLengths } from '../../lib/rollout/index.js';
import { defineTask, type Task } from '../../lib/tasks/index.js';
import { readExamples } from '../../lib/train/examples.js';
import type { TrainingEvent } from '../../lib/train/loop.js';
import { findOverlong } from '../../lib/train/overlong-rows.js';
import { SupervisedTrainer, type SupervisedTrainerOptions } from '../../lib/train/sft.js';
import { Trainer, type TrainerOptions } from '../../lib/train/trainer.js';
import { FakePolicy } from './fake-policy.js';
import { fakeTask } from './fake-task.js';

interface TextRow {
  readonly id: number;
  readonly text: string;
}

let folder: string;
let events: TrainingEvent[];
beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), 'merf-overlong-'));
  events = [];
});
afterEach(() => rmSync(folder, { recursive: true, force: true }));

/** Rows of a file whose lines `long` (from 1) are longer than the context of a fake policy. */
async function taskWith(long: readonly number[], lines = 20): Promise<Task<TextRow>> {
  const { spec, demonstrate } = await fakeTask();
  const file = join(folder, 'rows.jsonl');
  const rows = Array.from({ length: lines }, (_, i) => ({
    id: i,
    text: 'x'.repeat(long.includes(i + 1) ? 1200 : 30),
  }));
  writeFileSync(file, rows.map((row) => JSON.stringify(row)).join('\n'));
  return defineTask<TextRow>({
    name: 'texts',
    spec: spec as never,
    data: file,
    testData: [{ id: -1, text: 'x'.repeat(long.includes(0) ? 1200 : 30) }],
    messages: ({ id, text }) => [{ role: 'user', content: `${id} ${text}` }],
    demonstrate: demonstrate as never,
  }).open();
}

function grpo(policy: FakePolicy, options: Partial<TrainerOptions<TextRow>> & { task: Task<TextRow> }) {
  return new Trainer<TextRow>({
    policy: policy.asPolicy,
    out: join(folder, 'run'),
    steps: 3,
    promptsPerStep: 4,
    groupSize: 2,
    maxTokens: 4,
    onEvent: (event) => events.push(event),
    ...options,
  });
}

const notices = () => events.flatMap((event) => (event.type === 'notice' ? [event.message] : []));

describe('Trainer', () => {
  test('refuses rows whose prompt fills the context before its first step, naming their lines', async () => {
    const policy = new FakePolicy();
    const task = await taskWith([7, 12]);
    const file = join(folder, 'rows.jsonl');
    await expect(grpo(policy, { task }).run()).rejects.toMatchObject({
      code: 'CONTEXT_EXCEEDED',
      message: expect.stringMatching(
        new RegExp(
          `${file}, line 7 has 1\\d{3} tokens, ${file}, line 12 has 1\\d{3} tokens: filterOverlongPrompts`,
        ),
      ),
    });
    expect(policy.sampleCalls).toEqual([]);
    expect(existsSync(join(folder, 'run'))).toBe(false);
  });

  test('leaves them out where it is told to, and draws all others', async () => {
    const policy = new FakePolicy();
    const seen = new Set<number>();
    const { messages, ...task } = await taskWith([7, 12]);
    const watched = {
      ...task,
      messages: (row: TextRow, view: never) => {
        if (policy.sampleCalls.length > 0) seen.add(row.id);
        return messages(row, view);
      },
    };
    await grpo(policy, { task: watched, steps: 11, filterOverlongPrompts: true }).run();
    expect(notices()[0]).toMatch(
      /^Left out 2 of 20 prompts, too long for a context of 1000 tokens: .*line 7 has/,
    );
    expect([seen.has(6), seen.has(11)]).toEqual([false, false]);
    expect(seen.size).toBe(18);
  });

  test('is told where no row is left', async () => {
    const task = await taskWith([1, 2], 2);
    await expect(grpo(new FakePolicy(), { task, filterOverlongPrompts: true }).run()).rejects.toMatchObject({
      code: 'EMPTY_DATASET',
    });
  });

  test('measures the rows of evaluations, which an option leaves out too', async () => {
    const task = await taskWith([0]);
    const options = { task, evaluateEvery: 1, evaluateMotivations: ['none'] };
    await expect(grpo(new FakePolicy(), options).run()).rejects.toMatchObject({ code: 'CONTEXT_EXCEEDED' });
  });

  test('leaves generated rows out as they are drawn, up to an end', async () => {
    const { spec } = await fakeTask();
    const generated = (share: number) =>
      defineTask<TextRow>({
        name: 'generated',
        spec: spec as never,
        data: (random) => ({
          id: random.below(1e6),
          text: 'x'.repeat(random.chance(share) ? 1200 : 3),
        }),
        messages: ({ id, text }) => [{ role: 'user', content: `${id} ${text}` }],
      }).open();
    const policy = new FakePolicy();
    await grpo(policy, { task: await generated(0.5), filterOverlongPrompts: true }).run();
    expect(policy.sampleCalls.length).toBe(3);
    const none = grpo(new FakePolicy(), {
      task: await generated(1),
      out: join(folder, 'none'),
      filterOverlongPrompts: true,
    });
    await expect(none.run()).rejects.toMatchObject({ code: 'EMPTY_DATASET' });
  });
});

describe('SupervisedTrainer', () => {
  const train = (options: Partial<SupervisedTrainerOptions<TextRow>>) =>
    new SupervisedTrainer<TextRow>({
      policy: new FakePolicy().asPolicy,
      out: join(folder, 'run'),
      steps: 4,
      examplesPerStep: 2,
      onEvent: (event) => events.push(event),
      ...options,
    }).run();

  test('names the lines of examples that are too long, or leaves them out', async () => {
    const file = join(folder, 'examples.jsonl');
    const lines = ['a', 'b'.repeat(1200), 'ab'].map((completion) =>
      JSON.stringify({ prompt: 'p', completion }),
    );
    writeFileSync(file, `\n${lines.join('\n')}`);
    const examples = await readExamples(file);
    await expect(train({ examples })).rejects.toMatchObject({
      code: 'CONTEXT_EXCEEDED',
      message: expect.stringContaining(`${file}, line 3 has 1202 tokens: filterOverlongExamples leaves`),
    });
    expect(existsSync(join(folder, 'run'))).toBe(false);
    expect(await train({ examples, filterOverlongExamples: true })).toMatchObject({ step: 4 });
    expect(notices()[0]).toContain(
      `Left out 1 of 3 examples, too long for a context of 1000 tokens: ${file}, line 3`,
    );
  });

  test('an example that just fits is one, and one token more is too many', async () => {
    // The prompt's token, the completion's and the end.
    await train({ examples: [{ prompt: 'p', completion: 'a'.repeat(998) }] });
    await expect(
      train({ examples: [{ prompt: 'p', completion: 'a'.repeat(999) }], out: join(folder, 'other') }),
    ).rejects.toMatchObject({
      code: 'CONTEXT_EXCEEDED',
      message: expect.stringContaining('has 1001 tokens'),
    });
  });

  test('measures the demonstrations of a file of rows', async () => {
    const task = await taskWith([3]);
    await expect(train({ task })).rejects.toMatchObject({
      code: 'CONTEXT_EXCEEDED',
      message: expect.stringContaining('rows.jsonl, line 3 has '),
    });
    expect(await train({ task, filterOverlongExamples: true, steps: 11 })).toMatchObject({ step: 11 });
  });
});

test('PromptLengths renders what could be long and lets nothing long pass', async () => {
  const policy = new FakePolicy();
  let rendered = 0;
  const { applyChatTemplate } = policy.tokenizer;
  policy.tokenizer.applyChatTemplate = (messages) => {
    rendered += 1;
    return applyChatTemplate(messages);
  };
  const task = { messages: (text: string) => [{ role: 'user', content: text }] };
  const lengths = new PromptLengths<string>({
    policy: policy.asPolicy,
    task,
    views: ['none', 'full', 'none'],
  });
  // "user:", a line's end and "assistant:" take 16 characters.
  const overlong = Array.from({ length: 1100 }, (_, i) => lengths.overlong('x'.repeat(i)));
  expect(overlong.findIndex((tokens) => tokens !== undefined)).toBe(1000 - 16);
  expect(overlong[1050]).toBe(1066);
  expect(rendered).toBeLessThan(2 * 300);
  // A system message that all prompts share is counted once, however its tokens and bytes differ.
  const shared = 'ä'.repeat(450);
  const withSystem = {
    messages: (text: string) => [
      { role: 'system', content: shared },
      { role: 'user', content: text },
    ],
  };
  rendered = 0;
  const counted = new PromptLengths<string>({ policy: policy.asPolicy, task: withSystem, views: ['none'] });
  const found = Array.from({ length: 600 }, (_, i) => counted.overlong('x'.repeat(i)));
  expect(found.findIndex((tokens) => tokens !== undefined)).toBe(
    1000 - 450 - 'system:\nuser:\nassistant:'.length,
  );
  expect(rendered).toBeLessThan(300);
  // A message that has more than a text is always rendered.
  const calls = { messages: (text: string) => [{ role: 'user', content: '', calls: text }] };
  rendered = 0;
  const always = new PromptLengths<string>({ policy: policy.asPolicy, task: calls, views: ['none'] });
  for (let i = 0; i < 10; i++) always.overlong('x');
  expect(rendered).toBe(10);
});

test('what takes long is told of and can be given up, while the event loop goes on', async () => {
  const controller = new AbortController();
  let turns = 0;
  const timer = setInterval(() => turns++, 1);
  const slow = () => {
    const end = performance.now() + 1;
    while (performance.now() < end);
    return undefined;
  };
  const options = {
    what: 'prompts',
    count: 1e6,
    measure: slow,
    contextLength: 10,
    filter: false,
    setting: 'x',
    onEvent: (event: TrainingEvent) => {
      events.push(event);
      controller.abort();
    },
    signal: controller.signal,
  };
  await expect(findOverlong(new Array(1e6).keys(), options)).rejects.toMatchObject({ code: 'ABORTED' });
  clearInterval(timer);
  expect(notices()[0]).toMatch(/^Measured \d+ of 1000000 prompts$/);
  expect(turns).toBeGreaterThan(20);
});
