import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, expect, test } from '@jest/globals';
import { native, type TensorSource, weightEncodings } from '../../lib/native.js';
import { fixturePath, readTensors } from '../support/fixtures.js';

const file = fixturePath('dequantize.safetensors');
const tensors = readTensors(file);
let folder: string;
let zeros: string;

beforeAll(() => {
  folder = mkdtempSync(join(tmpdir(), 'merf-dequantize-'));
  zeros = join(folder, 'zeros');
  writeFileSync(zeros, new Uint8Array(512 * 512 * 4));
});
afterAll(() => rmSync(folder, { recursive: true }));

test.each(weightEncodings.filter((encoding) => encoding !== 'F32'))(
  '%s is read as gguf-py reads it',
  async (encoding) => {
    const blocks = tensors.get(`${encoding}/blocks`);
    const values = tensors.get(`${encoding}/values`);
    if (blocks === undefined || values === undefined) throw new Error(`no ${encoding} in ${file}`);
    const [vocabSize, hiddenSize] = values.shape as [number, number];
    const addon = native();
    const model = addon.createModel(
      {
        hiddenSize,
        layers: 1,
        heads: 8,
        kvHeads: 8,
        headSize: 64,
        mlpSize: 8,
        vocabSize,
        rmsNormEps: 1e-5,
        tiedHead: true,
        attentionBias: false,
        outputBias: false,
        mlpBias: false,
        maxPositions: 64,
        rope: { inverseFrequencies: new Float32Array(32), attentionScale: 1 },
        dtype: 'f32',
      },
      { name: 'cpu', threads: 1 },
      true,
    );
    const embedding = 'model.embed_tokens.weight';
    const sources = model.parameters().map(({ name, shape }): TensorSource => {
      if (name === embedding) {
        return { name, path: file, offset: blocks.offset, byteLength: blocks.byteLength, encoding, shape };
      }
      const byteLength = 4 * shape.reduce((product, size) => product * size, 1);
      return { name, path: zeros, offset: 0, byteLength, encoding: 'F32', shape };
    });
    await model.load(sources, addon.createCancelToken());
    expect(await model.readTensor(embedding, 'value')).toEqual(values.data);
    model.dispose();
  },
);
