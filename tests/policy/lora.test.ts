import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterAll, beforeAll, expect, test } from '@jest/globals';
import { forestOf, Policy } from '../../lib/index.js';
import { readTensors } from '../support/fixtures.js';
import { expectFailure, temporaryDirectory, tinyConfig, writeTinyModel } from './helpers.js';

const directory = temporaryDirectory();
const base = join(directory.path, 'base');
const options = { device: 'cpu', dtype: 'f32', threads: 1 } as const;
const tokens = [5, 17, 30, 44, 91, 12];

beforeAll(() => void writeTinyModel(base));
afterAll(() => directory.remove());

const lesson = forestOf([
  { promptTokens: [5, 17], completions: [{ tokens: [30, 44, 91, 12], train: {} }] },
  { promptTokens: [60, 61, 62], completions: [{ tokens: [7, 8], train: {} }] },
]);

async function step(policy: Policy): Promise<number> {
  const { loss } = await policy.forwardBackward(lesson, { type: 'cross_entropy' });
  await policy.optimStep({ learningRate: 1e-2 });
  return loss;
}

test('adapters start as nothing, are trained alone and merge into what is saved', async () => {
  const plain = await Policy.load(base, { ...options, trainable: false });
  const policy = await Policy.load(base, { ...options, lora: { rank: 4, seed: 3 } });
  expect(policy.loraRank).toBe(4);
  expect(await policy.logits(tokens)).toEqual(await plain.logits(tokens));

  const losses: number[] = [];
  for (let i = 0; i < 30; ++i) losses.push(await step(policy));
  expect(losses.at(-1)).toBeLessThan(0.5 * (losses[0] as number));
  const name = 'model.layers.1.self_attn.v_proj.weight';
  expect(await policy.readParameter(name)).toEqual(await plain.readParameter(name));
  expect(await policy.readParameter(name, 'merged')).not.toEqual(await plain.readParameter(name));

  const merged = join(directory.path, 'merged');
  await policy.save(merged);
  const reloaded = await Policy.load(merged, { ...options, trainable: false });
  const [expected, actual] = [await policy.logits(tokens), await reloaded.logits(tokens)];
  expect(Math.max(...actual.map((x, i) => Math.abs(x - (expected[i] as number))))).toBeLessThan(1e-4);
  for (const each of [plain, policy, reloaded]) each.dispose();
});

test('the state of adapters goes on bit for bit, and belongs to their rank', async () => {
  const lora = { rank: 4, seed: 3 };
  const first = await Policy.load(base, { ...options, lora });
  await step(first);
  const state = join(directory.path, 'state');
  await first.saveState(state);
  const stored = [...readTensors(join(state, 'state.safetensors')).keys()];
  expect(stored.length).toBe(3 * 2 * 4 * tinyConfig.layers);
  expect(stored.every((name) => /lora_[AB]\.weight$/.test(name))).toBe(true);
  const second = await Policy.load(base, { ...options, lora: { rank: 4, seed: 99 } });
  await second.loadState(state);
  for (const policy of [first, second]) await step(policy);
  expect(await second.logits(tokens)).toEqual(await first.logits(tokens));

  const other = await Policy.load(base, { ...options, lora: { rank: 8 } });
  const whole = await Policy.load(base, options);
  await expectFailure(() => other.loadState(state), 'RESUME_MISMATCH', 'loraRank', '8', '4');
  await expectFailure(() => whole.loadState(state), 'RESUME_MISMATCH', 'loraRank', '4');
  await expectFailure(() => other.loadState(join(directory.path, 'nowhere')), 'FILE_NOT_FOUND');
  await expectFailure(() => whole.saveAdapter(join(directory.path, 'none')), 'UNSUPPORTED', 'lora');
  for (const policy of [first, second, other, whole]) policy.dispose();
});

test('saveAdapter writes what PEFT adds to the weights of each module', async () => {
  const rank = 3;
  const policy = await Policy.load(base, { ...options, lora: { rank } });
  for (let i = 0; i < 3; ++i) await step(policy);
  const out = join(directory.path, 'adapter');
  await policy.saveAdapter(out);
  const config = JSON.parse(readFileSync(join(out, 'adapter_config.json'), 'utf8'));
  expect(config).toMatchObject({
    peft_type: 'LORA',
    r: rank,
    lora_alpha: rank,
    base_model_name_or_path: base,
  });
  const tensors = readTensors(join(out, 'adapter_model.safetensors'));
  let modules = 0;
  for (const { name, shape } of policy.parameters()) {
    const module = /^(model\.layers\.\d+\.(?:self_attn|mlp)\.\w+)\.weight$/.exec(name)?.[1];
    if (module === undefined) continue;
    ++modules;
    const [rows, columns] = shape as [number, number];
    const a = tensors.get(`base_model.model.${module}.lora_A.weight`);
    const b = tensors.get(`base_model.model.${module}.lora_B.weight`);
    if (a === undefined || b === undefined) throw new Error(`${module} has no adapter`);
    expect([a.shape, b.shape]).toEqual([
      [rank, columns],
      [rows, rank],
    ]);
    const weight = await policy.readParameter(name);
    const merged = await policy.readParameter(name, 'merged');
    let gap = 0;
    for (let i = 0; i < merged.length; ++i) {
      let expected = weight[i] as number;
      for (let k = 0; k < rank; ++k) {
        const row = Math.floor(i / columns);
        expected += (b.data[row * rank + k] as number) * (a.data[k * columns + (i % columns)] as number);
      }
      gap = Math.max(gap, Math.abs(expected - (merged[i] as number)));
    }
    expect(gap).toBeLessThan(1e-6);
  }
  expect(modules).toBe(7 * tinyConfig.layers);
  expect(config.target_modules).toHaveLength(7);
  policy.dispose();
});

test('a rank that cannot be is refused', async () => {
  for (const rank of [0, -1, 1.5, 33, Number.NaN]) {
    await expectFailure(
      () => Policy.load(base, { ...options, lora: { rank } }),
      'INVALID_ARGUMENT',
      'lora.rank',
      'from 1 to 32',
    );
  }
  await expectFailure(
    () => Policy.load(base, { ...options, trainable: false, lora: { rank: 2 } }),
    'INVALID_ARGUMENT',
    'trainable',
  );
});
