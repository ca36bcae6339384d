// Policies end with their block, and calls that wait for others can be taken back.
import { join } from 'node:path';
import { expect, test } from '@jest/globals';
import { Policy } from '../../lib/policy/index.js';
import { root } from '../cli/run.js';
import { expectFailure } from './helpers.js';

const path = join(root, 'tests', 'fixtures', 'llama');
const forest = [{ tokens: [1], children: [{ tokens: [2, 3], train: { advantage: 1 } }] }];

test('using disposes of a policy', async () => {
  let kept: Policy | undefined;
  {
    using policy = await Policy.load(path);
    kept = policy;
    expect((await policy.logits([1, 2])).length).toBe(2 * policy.config.vocabSize);
  }
  await expectFailure(() => kept?.logits([1]), 'DISPOSED');
});

test('await using waits for the call that is running', async () => {
  let ended = false;
  let running: Promise<unknown> | undefined;
  {
    await using policy = await Policy.load(path);
    const begun = new Promise<void>((resolve) => {
      const onToken = () => resolve();
      running = policy.sample([[1, 2, 3]], { n: 4, maxTokens: 20, onToken }).finally(() => {
        ended = true;
      });
    });
    await begun;
  }
  expect(ended).toBe(true);
  await running;
});

test('every call that waits behind another one is taken back by its signal, and leaves the policy as it was', async () => {
  await using policy = await Policy.load(path);
  await policy.forwardBackward(forest, { type: 'grpo' });
  const { signal } = new AbortController();
  const aborted = AbortSignal.abort('enough');
  const before = await policy.readParameter('model.norm.weight', 'value', { signal });
  const calls = [
    () => policy.optimStep({ learningRate: 1, signal: aborted }),
    () => policy.zeroGradients({ signal: aborted }),
    () => policy.readParameter('model.norm.weight', 'value', { signal: aborted }),
    () => policy.logits([1, 2], { signal: aborted }),
    () => policy.cacheStatistics({ signal: aborted }),
    () => policy.score(forest, { signal: aborted }),
    () => policy.sample([[1]], { signal: aborted }),
  ];
  const busy = policy.logits([1, 2, 3]);
  for (const call of calls) await expectFailure(call, 'ABORTED');
  await busy;
  expect(await policy.readParameter('model.norm.weight')).toEqual(before);
  const { gradientNorm, applied } = await policy.optimStep({ learningRate: 1e-3, signal });
  expect([gradientNorm > 0, applied]).toEqual([true, true]);
});
