import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, expect, test } from '@jest/globals';
import { type ModelConfig, openModel, Policy } from 'merf';
import { writeRandomGguf } from '../../benchmarks/gguf-writer.js';
import { readGguf } from '../../lib/policy/gguf.js';

const config: ModelConfig = {
  architecture: 'llama',
  hiddenSize: 24,
  layers: 2,
  heads: 3,
  kvHeads: 1,
  headSize: 8,
  mlpSize: 40,
  vocabSize: 301,
  rmsNormEps: 1e-5,
  tiedHead: true,
  attentionBias: false,
  outputBias: false,
  mlpBias: false,
  maxPositions: 64,
  rope: { type: 'default', theta: 10_000 },
};

let folder: string;
beforeAll(() => {
  folder = mkdtempSync(join(tmpdir(), 'merf-gguf-'));
});
afterAll(() => rmSync(folder, { recursive: true, force: true }));

test.each(['f32', 'bf16'] as const)('a file of random %s weights is a model of that shape', async (dtype) => {
  const path = join(folder, `${dtype}.gguf`);
  writeRandomGguf(path, config, dtype);
  const { tensors } = await readGguf(path);
  expect(tensors.get('blk.1.ffn_down.weight')).toMatchObject({ dtype: dtype.toUpperCase(), shape: [24, 40] });
  expect(tensors.get('output_norm.weight')).toMatchObject({ dtype: 'F32', shape: [24] });
  expect((await openModel(path)).config).toEqual(config);
  const policy = await Policy.load(path, { device: 'cpu', dtype: 'f32', trainable: false });
  try {
    const [group] = await policy.sample([[1, 2, 3]], { maxTokens: 8 });
    // Untrained weights this small draw nearly evenly from all tokens.
    for (const logprob of group?.completions[0]?.logprobs ?? [Number.NaN]) {
      expect(Math.abs(logprob + Math.log(301))).toBeLessThan(1);
    }
  } finally {
    policy.dispose();
  }
});

test('a model with biases and a head of its own', async () => {
  const path = join(folder, 'qwen2.gguf');
  const qwen2: ModelConfig = { ...config, architecture: 'qwen2', attentionBias: true, tiedHead: false };
  writeRandomGguf(path, qwen2, 'f32');
  expect((await openModel(path)).config).toEqual(qwen2);
});
