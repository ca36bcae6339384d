import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from '@jest/globals';
import { Tokenizer } from '../../lib/policy/index.js';
import { readExamples } from '../../lib/train/examples.js';
import { readMetrics } from '../../lib/train/metrics.js';
import { SupervisedTrainer, type SupervisedTrainerOptions } from '../../lib/train/sft.js';
import { tokenizerFiles } from '../policy/helpers.js';
import { FakePolicy } from './fake-policy.js';
import { type FakeRow, fakeTask } from './fake-task.js';

let folder: string;
beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), 'merf-sft-'));
});
afterEach(() => rmSync(folder, { recursive: true, force: true }));

function trainer(policy: FakePolicy, options: Partial<SupervisedTrainerOptions<FakeRow>>) {
  return new SupervisedTrainer<FakeRow>({
    policy: policy.asPolicy,
    out: join(folder, 'run'),
    steps: 30,
    examplesPerStep: 4,
    learningRate: 1,
    ...options,
  });
}

describe('SupervisedTrainer', () => {
  test('learns the completions of a task and nothing of its prompts', async () => {
    const policy = new FakePolicy();
    await trainer(policy, { task: await fakeTask() }).run();
    const losses = readMetrics(join(folder, 'run', 'metrics.jsonl')).map((row) => row.loss as number);
    expect(losses[0]).toBeCloseTo(Math.log(4), 10);
    // Two b and the end: at best the entropy of (2/3, 1/3).
    const floor = (2 / 3) * Math.log(3 / 2) + (1 / 3) * Math.log(3);
    expect(losses.at(-1)).toBeGreaterThan(floor);
    expect(losses.at(-1)).toBeLessThan(floor + 0.2);
    const [root] = policy.forests[0] ?? [];
    expect(root?.train).toBeUndefined();
    for (const question of root?.children ?? []) {
      expect(question.train).toBeUndefined();
      expect(question.children?.map((segment) => Array.from(segment.tokens))).toEqual([[1, 1, 3]]);
    }
  });

  test('the views of the motivation take turns', async () => {
    const policy = new FakePolicy();
    await trainer(policy, { task: await fakeTask(), steps: 1, motivation: ['none', 'full'] }).run();
    const prompts: string[] = [];
    for (const root of policy.forests[0] ?? []) {
      const start = String.fromCharCode(...Array.from(root.tokens));
      for (const question of root.children ?? [])
        prompts.push(start + String.fromCharCode(...Array.from(question.tokens)));
    }
    expect(prompts.map((prompt) => prompt.includes('begins with b'))).toEqual([false, true, false, true]);
  });

  test('resumes as the unbroken run goes on', async () => {
    const task = await fakeTask();
    const unbroken = new FakePolicy();
    await trainer(unbroken, { task, steps: 9, out: join(folder, 'unbroken') }).run();
    const first: SupervisedTrainer<FakeRow> = trainer(new FakePolicy(), {
      task,
      steps: 9,
      onEvent: (event) => {
        if (event.type === 'step' && event.step === 4) first.stop();
      },
    });
    expect(await first.run()).toMatchObject({ step: 4, stopped: true });
    const second = new FakePolicy();
    await trainer(second, { task, steps: 9, resume: true }).run();
    expect(second.logits).toEqual(unbroken.logits);
    await expect(
      trainer(new FakePolicy(), { task, steps: 9, examplesPerStep: 5, resume: true }).run(),
    ).rejects.toThrow(/examplesPerStep was 4 and is 5/);
  });

  test('a loss that is not finite skips the update', async () => {
    const policy = new FakePolicy();
    policy.breakLossAt.add(1);
    await trainer(policy, { task: await fakeTask(), steps: 3 }).run();
    const rows = readMetrics(join(folder, 'run', 'metrics.jsonl'));
    expect(rows.map((row) => row.skippedUpdates)).toEqual([0, 1, 0]);
    expect(rows[1]?.loss).toBeNull();
  });

  test('writes prompts and completions as the model sees them, and says what it did', async () => {
    const policy = new FakePolicy();
    const chatTemplate =
      "{% for m in messages %}{% if m.role != 'system' %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}" +
      "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}";
    const tokenizer = new Tokenizer({ ...tokenizerFiles(), chatTemplate }, 'tiny');
    Object.assign(policy, { tokenizer });
    const messages = [
      { role: 'system', content: 'Be brief.' },
      { role: 'user', content: 'a<|im_end|>b' },
    ];
    const notices: string[] = [];
    await trainer(policy, {
      examples: [{ messages, completion: '<think>\nyes</think>no<|im_end|>' }],
      steps: 1,
      examplesPerStep: 1,
      onEvent: (event) => event.type === 'notice' && notices.push(event.message),
    }).run();
    const [root] = policy.forests[0] ?? [];
    const [completion] = root?.children ?? [];
    expect(tokenizer.decode(root?.tokens ?? [])).toBe(
      '<|im_start|>user\nBe brief.\n\na<|im_end|>b<|im_end|>\n<|im_start|>assistant\n<think>\n',
    );
    expect(Array.from(root?.tokens ?? []).filter((id) => id === 2)).toHaveLength(1);
    expect(Array.from(completion?.tokens ?? [])).toEqual([...tokenizer.encode('yes</think>no'), 2]);
    expect(notices.join('\n')).toMatch(/no place for a system message/);
    expect(notices.join('\n')).toMatch(/1 of 1 examples name special tokens.*<\|im_end\|>/);
  });

  test('needs something to learn from, and examples that fit', async () => {
    expect(() => trainer(new FakePolicy(), {})).toThrow(/examples or a task/);
    const { demonstrate: _, ...silent } = await fakeTask();
    expect(() => trainer(new FakePolicy(), { task: silent })).toThrow(/cannot write demonstrations/);
    await expect(trainer(new FakePolicy(), { examples: [] }).run()).rejects.toMatchObject({
      code: 'EMPTY_DATASET',
    });
    const long = { prompt: 'a', completion: 'b'.repeat(1000) };
    await expect(trainer(new FakePolicy(), { examples: [long] }).run()).rejects.toMatchObject({
      code: 'CONTEXT_EXCEEDED',
    });
  });
});

describe('readExamples', () => {
  test('reads both kinds and names the line that is neither', async () => {
    const file = join(folder, 'examples.jsonl');
    writeFileSync(
      file,
      '{"prompt": "1 + 1 =", "completion": "2"}\n' +
        '{"messages": [{"role": "user", "content": "1 + 1?"}], "completion": "2"}\n',
    );
    expect(await readExamples(file)).toEqual([
      { prompt: '1 + 1 =', completion: '2' },
      { messages: [{ role: 'user', content: '1 + 1?' }], completion: '2' },
    ]);
    writeFileSync(file, '{"prompt": "1 + 1 =", "completion": "2"}\n{"prompt": "x"}\n');
    await expect(readExamples(file)).rejects.toMatchObject({
      code: 'MALFORMED_FILE',
      message: expect.stringMatching(/line 2.*completion/),
    });
  });
});
