import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, test } from '@jest/globals';
import { native } from '../../lib/native.js';
import { Policy } from '../../lib/policy/index.js';
import {
  expectFailure,
  safetensorsFile,
  temporaryDirectory,
  tinyConfig,
  tinyWeights,
  writeTinyModel,
} from './helpers.js';

let directory: { path: string; remove: () => void };
let count = 0;
beforeAll(() => {
  directory = temporaryDirectory();
});
afterAll(() => directory.remove());

/** A tiny model with the values of one tensor changed. */
function changed(name: string, change: (values: Float32Array) => void): string {
  const weights = tinyWeights();
  const data = weights.find((tensor) => tensor.name === name)?.data as Uint8Array;
  change(new Float32Array(data.buffer));
  const path = join(directory.path, `model-${count++}`);
  return writeTinyModel(path, { 'model.safetensors': safetensorsFile(weights) });
}

const weight = 'model.layers.1.mlp.down_proj.weight';

test.each([
  ['NaN', Number.NaN],
  ['Infinity', Number.POSITIVE_INFINITY],
  ['-Infinity', Number.NEGATIVE_INFINITY],
])('a weight that is %s is named where it is loaded', async (text, value) => {
  const path = changed(weight, (values) => {
    values[2 * tinyConfig.mlpSize + 5] = value;
  });
  for (const trainable of [false, true]) {
    await expectFailure(
      () => Policy.load(path, { device: 'cpu', trainable }),
      'NON_FINITE',
      weight,
      join(path, 'model.safetensors'),
      `received ${text} at [2, 5]`,
    );
  }
});

const devices = ['cpu', 'cuda-emulated'].filter((name) => native().describeDevice(name).available);

// Finite weights whose products are not: those of the last norm make infinities, and the head NaN of them.
describe.each(devices)('logits that overflow on %s', (device) => {
  let policy: Policy;
  beforeAll(async () => {
    const path = changed('model.norm.weight', (values) => values.fill(3e38));
    policy = await Policy.load(path, { device, dtype: 'f32', trainable: true });
  });
  afterAll(() => policy.dispose());

  test.each([
    ['greedily', { temperature: 0 }],
    ['as they are', {}],
    ['with top-k, top-p and min-p', { topK: 5, topP: 0.9, minP: 0.01 }],
  ])('are named where tokens are drawn %s', async (_, options) => {
    const prompts = [
      [40, 41],
      [40, 42, 43],
    ];
    await expectFailure(
      () => policy.sample(prompts, { n: 2, maxTokens: 3, ...options }),
      'NON_FINITE',
      /finite logits.*token 0 of completion \d of prompt \d/,
    );
  });

  test('are named where tokens are scored', async () => {
    await expectFailure(
      () => policy.score([{ tokens: [40, 41, 42], train: {} }]),
      'NON_FINITE',
      /finite logits.*scored token 0, whose id is 41/,
    );
  });

  test('leave the loss not finite and the weights as they are', async () => {
    const stats = await policy.forwardBackward([{ tokens: [40, 41, 42], train: {} }], {
      type: 'cross_entropy',
    });
    expect(stats.finite).toBe(false);
  });
});
