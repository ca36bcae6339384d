import { join } from 'node:path';
import { afterAll, beforeAll, expect, test } from '@jest/globals';
import { native } from '../../lib/native.js';
import { type CompletionGroup, type Forest, Policy } from '../../lib/policy/index.js';
import { report } from '../support/report.js';
import { expectFailure, temporaryDirectory, writeTinyModel } from './helpers.js';

let directory: { path: string; remove: () => void };
let model: string;

beforeAll(() => {
  directory = temporaryDirectory();
  model = writeTinyModel(join(directory.path, 'tiny'));
});
afterAll(() => directory.remove());

const prompts = [[40, 41, 42, 43, 44], [40, 41, 42, 50], Array.from({ length: 45 }, (_, i) => 40 + (i % 60))];

/** The groups as a forest to train on; `shared` where completions stand under one prompt. */
function forest(groups: CompletionGroup[], shared: boolean): Forest {
  return groups.flatMap(({ promptTokens, completions }, g) => {
    const children = completions.map(({ tokens, logprobs }, i) => ({
      tokens: Array.from(tokens),
      train: { advantage: (i % 3) - 1 + g / 10, logprobs: Array.from(logprobs) },
    }));
    return shared
      ? [{ tokens: promptTokens, children }]
      : children.map((child) => ({ tokens: promptTokens, children: [child] }));
  });
}

function widestGap(groups: CompletionGroup[], logprobs: Float32Array[]): number {
  const drawn = groups.flatMap(({ completions }) => completions.map((completion) => completion.logprobs));
  expect(logprobs.map(({ length }) => length)).toEqual(drawn.map(({ length }) => length));
  return Math.max(
    ...drawn.flatMap((row, i) => Array.from(row, (x, t) => Math.abs(x - (logprobs[i]?.[t] as number)))),
  );
}

test('what was drawn is scored and trained on with the same bits, whatever the batch', async () => {
  for (const dtype of ['f32', 'bf16'] as const) {
    const policy = await Policy.load(model, { device: 'cpu', dtype, exact: true });
    for (const temperature of [1, 0.7, 1.4, 0]) {
      const groups = await policy.sample(prompts, { n: 3, maxTokens: 12, seed: 3, temperature, topP: 0.95 });
      for (const shared of [true, false]) {
        const { logprobs } = await policy.score(forest(groups, shared), { temperature });
        expect(widestGap(groups, logprobs)).toBe(0);
      }
      for (const maxTokens of [undefined, 90]) {
        const loss = { type: 'grpo', temperature } as const;
        const stats = await policy.forwardBackward(forest(groups, true), loss, { maxTokens });
        expect(stats.ratio).toEqual({ mean: 1, min: 1, max: 1 });
      }
    }
    policy.dispose();
  }
});

test('a device that cannot promise it is refused, and near to it without the promise', async () => {
  const device = native().describeDevice('cuda-emulated');
  if (!device.available) return;
  await expectFailure(
    () => Policy.load(model, { device: 'cuda-emulated', exact: true }),
    'UNSUPPORTED',
    'exact: true',
    'cuda-emulated',
  );
  const policy = await Policy.load(model, { device: 'cuda-emulated', dtype: 'f32' });
  const groups = await policy.sample(prompts.slice(0, 2), { n: 2, maxTokens: 6, seed: 3 });
  const gap = widestGap(groups, (await policy.score(forest(groups, true))).logprobs);
  report('log-probabilities drawn and scored on cuda-emulated, f32', gap);
  expect(gap).toBeLessThan(1e-4);
  policy.dispose();
});
