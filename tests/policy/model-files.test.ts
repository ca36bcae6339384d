import { existsSync, readFileSync, symlinkSync, truncateSync, writeFileSync } from 'node:fs';
import { join, relative } from 'node:path';
import { afterAll, beforeAll, describe, expect, test } from '@jest/globals';
import { MerfError } from '../../lib/errors.js';
import { configToJson } from '../../lib/policy/config.js';
import { readGguf } from '../../lib/policy/gguf.js';
import { openModel } from '../../lib/policy/model-files.js';
import { Policy } from '../../lib/policy/policy.js';
import { inverseFrequencies } from '../../lib/policy/rope.js';
import { readSafetensorsHeader } from '../../lib/policy/safetensors.js';
import { Tokenizer } from '../../lib/policy/tokenizer.js';
import {
  configJson,
  expectFailure,
  failure,
  type GgufField,
  type GgufTensor,
  ggufFields,
  ggufFile,
  ggufTensors,
  random,
  safetensorsFile,
  smollm,
  type TestTensor,
  temporaryDirectory,
  tinyConfig,
  tinyWeights,
  tokenizerFiles,
  writeTinyModel,
} from './helpers.js';

let directory: { path: string; remove: () => void };
let count = 0;
beforeAll(() => {
  directory = temporaryDirectory();
});
afterAll(() => directory.remove());

function file(bytes: Uint8Array, extension: string): string {
  const path = join(directory.path, `file-${count++}.${extension}`);
  writeFileSync(path, bytes);
  return path;
}

const model = (files: Record<string, string | Uint8Array | null> = {}) =>
  writeTinyModel(join(directory.path, `model-${count++}`), files);
const withConfig = (change: Record<string, unknown>) =>
  model({ 'config.json': JSON.stringify({ ...configJson(), ...change }) });

describe('a Hugging Face directory', () => {
  test('gives its configuration, a source for every parameter and a tokenizer', async () => {
    const path = model();
    const files = await openModel(path);
    expect(files.config).toEqual(tinyConfig);
    expect(files.sources.map(({ name }) => name)).toEqual(tinyWeights().map(({ name }) => name));
    const q = files.sources.find(({ name }) => name === 'model.layers.1.self_attn.q_proj.weight');
    expect(q).toMatchObject({
      encoding: 'F32',
      shape: [32, 32],
      byteLength: 4096,
      path: join(path, 'model.safetensors'),
    });
    expect(new Tokenizer(files.tokenizer, path).encode('hello')).toHaveLength(2);
  });

  test('may be sharded', async () => {
    const weights = tinyWeights();
    const halves = [weights.slice(0, 7), weights.slice(7)];
    const names = ['model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors'];
    const index = {
      metadata: { total_size: 1 },
      weight_map: Object.fromEntries(
        halves.flatMap((half, i) => half.map(({ name }) => [name, names[i] as string])),
      ),
    };
    const shards = Object.fromEntries(halves.map((half, i) => [names[i] as string, safetensorsFile(half)]));
    const path = model({
      'model.safetensors': null,
      'model.safetensors.index.json': JSON.stringify(index),
      ...shards,
    });
    const { sources } = await openModel(path);
    expect(new Set(sources.map((source) => source.path)).size).toBe(2);

    const missing = model({
      'model.safetensors': null,
      'model.safetensors.index.json': JSON.stringify(index),
    });
    await expectFailure(() => openModel(missing), 'FILE_NOT_FOUND', 'model-00001-of-00002.safetensors');
    const outside = { weight_map: { x: '../elsewhere.safetensors' } };
    const escaping = model({
      'model.safetensors': null,
      'model.safetensors.index.json': JSON.stringify(outside),
    });
    await expectFailure(() => openModel(escaping), 'MALFORMED_FILE', 'index.json', '../elsewhere');
    const wrongShard = { weight_map: { ...index.weight_map, 'model.norm.weight': names[0] } };
    const lying = model({
      'model.safetensors': null,
      'model.safetensors.index.json': JSON.stringify(wrongShard),
      ...shards,
    });
    await expectFailure(() => openModel(lying), 'MALFORMED_FILE', 'model.norm.weight', '00001');
  });

  test('reads the rope settings of transformers 4 and 5', async () => {
    const llama3 = {
      rope_type: 'llama3',
      factor: 8,
      low_freq_factor: 1,
      high_freq_factor: 4,
      original_max_position_embeddings: 8192,
    };
    const expected = {
      type: 'llama3',
      theta: 500_000,
      factor: 8,
      lowFrequencyFactor: 1,
      highFrequencyFactor: 4,
      originalMaxPositions: 8192,
    };
    const four = await openModel(withConfig({ rope_theta: 500_000, rope_scaling: llama3 }));
    expect(four.config.rope).toEqual(expected);
    const five = await openModel(
      withConfig({ rope_theta: undefined, rope_parameters: { ...llama3, rope_theta: 500_000 } }),
    );
    expect(five.config.rope).toEqual(expected);
    const linear = await openModel(withConfig({ rope_scaling: { type: 'linear', factor: 4 } }));
    expect(linear.config.rope).toEqual({ type: 'linear', theta: 10_000, factor: 4 });
  });

  // Inverse frequencies that LlamaConfig.from_dict and LlamaRotaryEmbedding of transformers 5.24 give.
  const linear5 = { rope_type: 'linear', factor: 4, rope_theta: 500_000 };
  const llama3 = { rope_type: 'llama3', factor: 8, low_freq_factor: 1, high_freq_factor: 4 };
  test.each([
    [
      'rope_scaling beside rope_parameters',
      { rope_scaling: { rope_type: 'linear', factor: 2 }, rope_parameters: linear5 },
      [0.5, 0.05000000074505806, 0.004999999888241291, 0.0005000000237487257],
    ],
    [
      'rope_scaling and rope_theta beside rope_parameters',
      {
        rope_theta: 20_000,
        rope_scaling: { rope_type: 'linear', factor: 2 },
        rope_parameters: linear5,
      },
      [0.5, 0.04204482212662697, 0.0035355340223759413, 0.00029730176902376115],
    ],
    [
      'a default rope_scaling beside rope_parameters',
      { rope_scaling: { rope_type: 'default' }, rope_parameters: linear5 },
      [1, 0.10000000149011612, 0.009999999776482582, 0.0010000000474974513],
    ],
    [
      'an empty rope_scaling beside rope_parameters',
      { rope_scaling: {}, rope_parameters: linear5 },
      [0.25, 0.009401507675647736, 0.0003535533614922315, 1.3295739336172119e-5],
    ],
    [
      'null for rope_scaling beside rope_parameters',
      { rope_scaling: null, rope_parameters: linear5 },
      [0.25, 0.009401507675647736, 0.0003535533614922315, 1.3295739336172119e-5],
    ],
    [
      'rope_parameters without rope_theta',
      { rope_theta: 20_000, rope_parameters: { rope_type: 'linear', factor: 4 } },
      [0.25, 0.021022411063313484, 0.0017677670111879706, 0.00014865088451188058],
    ],
    [
      'null for rope_parameters',
      { rope_parameters: null, rope_scaling: { type: 'linear', factor: 4 } },
      [0.25, 0.02500000037252903, 0.0024999999441206455, 0.0002500000118743628],
    ],
    [
      'a rope_type beside a type',
      { rope_scaling: { type: 'linear', rope_type: 'default', factor: 4 } },
      [1, 0.10000000149011612, 0.009999999776482582, 0.0010000000474974513],
    ],
    [
      'llama3 without the positions it was made from',
      { max_position_embeddings: 64, rope_scaling: llama3 },
      [1, 0.013042256236076355, 0.0012499999720603228, 0.0001250000059371814],
    ],
    [
      'llama3 with the positions it was made from outside',
      {
        original_max_position_embeddings: 32,
        rope_scaling: { ...llama3, original_max_position_embeddings: 64 },
      },
      [1, 0.012500000186264515, 0.0012499999720603228, 0.0001250000059371814],
    ],
  ])('reads %s as transformers does', async (_, change, expected) => {
    const { config } = await openModel(withConfig({ rope_theta: undefined, ...change }));
    const frequencies = inverseFrequencies(config.rope, config.headSize);
    for (const [i, value] of expected.entries()) expect(frequencies[i]).toBeCloseTo(value, 8);
  });

  describe('where config.json ties the head', () => {
    const untied = tinyWeights({ ...tinyConfig, tiedHead: false });
    const head = untied.at(-1) as TestTensor;
    const embedding = untied[0] as TestTensor;
    const logits = async (weights: TestTensor[], tied: boolean, save?: string) => {
      const path = model({
        'config.json': JSON.stringify({ ...configJson(), tie_word_embeddings: tied }),
        'model.safetensors': safetensorsFile(weights),
      });
      const policy = await Policy.load(path, { device: 'cpu', dtype: 'f32' });
      try {
        if (save !== undefined) await policy.save(save);
        const { tiedHead } = policy.config;
        return { values: await policy.logits([3, 40, 50]), tiedHead, notices: policy.tokenizer.notices };
      } finally {
        policy.dispose();
      }
    };

    test('keeps a head that differs from the embedding, says so, and saves it as such', async () => {
      expect(head.name).toBe('lm_head.weight');
      const saved = join(directory.path, `saved-${count++}`);
      const found = await logits(untied, true, saved);
      expect(found.tiedHead).toBe(false);
      expect(found.notices).toEqual([expect.stringMatching(/lm_head\.weight differs.*tie_word_embeddings/)]);
      const right = await logits(untied, false);
      expect(right.notices).toEqual([]);
      expect(found.values).toEqual(right.values);
      expect(JSON.parse(readFileSync(join(saved, 'config.json'), 'utf8'))).toMatchObject({
        tie_word_embeddings: false,
      });
      expect((await openModel(saved)).tokenizer.notices ?? []).toEqual([]);
    });

    test('ties a head that equals the embedding, and takes one of the two for both', async () => {
      const plain = await logits(untied.slice(0, -1), true);
      const both = await logits([...untied.slice(0, -1), { ...head, data: embedding.data }], true);
      expect(both).toEqual({ ...plain, tiedHead: true, notices: [] });
      const alone = await logits([...untied.slice(1, -1), { ...head, data: embedding.data }], true);
      expect(alone).toEqual(plain);
    });
  });

  test.each([
    ['_orig_mod.', (name: string) => `_orig_mod.${name}`],
    ['module._orig_mod.', (name: string) => `module._orig_mod.${name}`],
    ['a wrapper in the middle', (name: string) => name.replace('.mlp.', '._checkpoint_wrapped_module.mlp.')],
    ['base_model.model.', (name: string) => `base_model.model.${name}`],
    ['no prefix', (name: string) => name.replace(/^model\./, '')],
  ])('may have names with %s', async (_, renamed) => {
    const weights = tinyWeights().map((tensor) => ({ ...tensor, name: renamed(tensor.name) }));
    const plain = await openModel(model());
    const found = await openModel(model({ 'model.safetensors': safetensorsFile(weights) }));
    const named = ({ name, shape }: (typeof plain.sources)[number]) => [name, shape];
    expect(found.sources.map(named)).toEqual(plain.sources.map(named));
  });

  test('is refused where two tensors have one name, or names are unknown, which are named', async () => {
    const weights = tinyWeights();
    const norm = weights.find(({ name }) => name === 'model.norm.weight') as TestTensor;
    const twice = safetensorsFile([...weights, { ...norm, name: '_orig_mod.model.norm.weight' }]);
    await expectFailure(
      () => openModel(model({ 'model.safetensors': twice })),
      'MALFORMED_FILE',
      /model\.norm\.weight and _orig_mod\.model\.norm\.weight are both model\.norm\.weight/,
    );
    const foreign = safetensorsFile(weights.map((tensor) => ({ ...tensor, name: `gpt.${tensor.name}` })));
    await expectFailure(
      () => openModel(model({ 'model.safetensors': foreign })),
      'MALFORMED_FILE',
      /expected a tensor model\.embed_tokens\.weight.*only tensors such as gpt\.model\.embed_tokens/,
    );
  });

  test('names the files that it reads, and no others', async () => {
    const path = model({ '.DS_Store': 'x', 'README.md': 'x', 'optimizer.json': '{' });
    symlinkSync(join(path, 'nowhere'), join(path, 'dangling.safetensors'));
    const { files } = await openModel(path);
    expect(files.map((file) => relative(path, file)).sort()).toEqual([
      'config.json',
      'generation_config.json',
      'model.safetensors',
      'tokenizer.json',
      'tokenizer_config.json',
    ]);
  });

  const pointer =
    'version https://git-lfs.github.com/spec/v1\n' +
    'oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n';
  test.each(['model.safetensors', 'tokenizer.json', 'config.json'])(
    'is refused where %s is a Git LFS pointer, which is named',
    async (name) => {
      const path = model({ [name]: pointer });
      await expectFailure(() => openModel(path), 'MALFORMED_FILE', join(path, name), /of 12345 bytes.*LFS/);
    },
  );

  test('is refused as a file that is a Git LFS pointer', async () => {
    for (const extension of ['gguf', 'bin']) {
      const path = file(Buffer.from(pointer), extension);
      await expectFailure(() => openModel(path), 'MALFORMED_FILE', path, /of 12345 bytes.*LFS/);
    }
  });

  test('with any value for any key of config.json is read or refused, never more', async () => {
    const deep = (depth: number) => `${'['.repeat(depth)}${']'.repeat(depth)}`;
    const odd = ['null', '[]', '{}', '""', '"x"', '-1', '0.5', '1e999', 'true', deep(200), deep(100_000)];
    odd.push('{"__proto__":{"type":1}}', '{"constructor":{"name":{"toString":1}}}', '[{"toString":1}]');
    const keys = [...Object.keys(configJson()), 'rope_scaling', 'rope_parameters', 'pad_token_id'];
    keys.push('quantization_config', 'layer_types', 'eos_token_id', '__proto__', 'attention_bias');
    const path = model();
    for (const key of keys) {
      const others = JSON.stringify({ ...configJson(), [key]: undefined }).slice(1);
      for (const value of odd) {
        writeFileSync(join(path, 'config.json'), `{${JSON.stringify(key)}:${value},${others}`);
        try {
          await openModel(path);
        } catch (error) {
          expect(error).toBeInstanceOf(MerfError);
          expect((error as MerfError).message).toContain(directory.path);
        }
      }
    }
  });

  test.each([[[null]], [[]], [['x']], [[{ name: 'default' }]], [7], [{}]])(
    'without a chat template, where tokenizer_config.json has %j for it',
    async (value) => {
      const config = JSON.stringify({ ...tokenizerFiles().config, chat_template: value });
      const { tokenizer } = await openModel(model({ 'tokenizer_config.json': config }));
      expect(tokenizer.chatTemplate).toBeUndefined();
    },
  );

  test('may have an index and a header with keys of every object, or is refused', async () => {
    for (const name of ['__proto__', 'constructor', 'toString']) {
      // As bytes, since such keys are not set by assignment.
      const filler = 'x'.repeat(name.length);
      const strange = { name: filler, dtype: 'F32', shape: [1], data: new Uint8Array(4) };
      const named = safetensorsFile([...tinyWeights(), strange]);
      const typed = safetensorsFile([...tinyWeights(), { ...strange, name: 'extra', dtype: filler }]);
      for (const filled of [named, typed]) {
        const bytes = Buffer.from(filled.toString('latin1').replace(filler, name), 'latin1');
        const error = await failure(() => openModel(model({ 'model.safetensors': bytes })));
        expect(error.message).toContain(name);
      }
    }
  });

  test.each([
    [7, 7],
    [-1, tinyConfig.vocabSize - 1],
    [null, undefined],
    [tinyConfig.vocabSize, undefined],
  ])('with pad_token_id %d leaves the embedding of %d untrained', async (pad, expected) => {
    const { config } = await openModel(withConfig({ pad_token_id: pad }));
    expect(config.paddingId).toBe(expected);
    expect(configToJson(config, 'float32', { eos: [0] })).toMatchObject({ pad_token_id: expected ?? null });
  });

  test.each([
    ['mistral', { model_type: 'mistral' }, 'UNSUPPORTED', 'mistral'],
    ['an activation', { hidden_act: 'gelu' }, 'UNSUPPORTED', 'hidden_act gelu'],
    ['quantised weights', { quantization_config: { quant_method: 'gptq' } }, 'UNSUPPORTED', 'gptq'],
    ['yarn', { rope_scaling: { rope_type: 'yarn', factor: 4 } }, 'UNSUPPORTED', 'yarn'],
    ['dynamic rope', { rope_scaling: { type: 'dynamic', factor: 4 } }, 'UNSUPPORTED', 'dynamic'],
    ['sliding windows', { use_sliding_window: true }, 'UNSUPPORTED', 'use_sliding_window'],
    [
      'layer types',
      { layer_types: ['full_attention', 'sliding_attention'] },
      'UNSUPPORTED',
      'sliding_attention',
    ],
    ['experts', { num_local_experts: 8 }, 'UNSUPPORTED', 'num_local_experts'],
    ['a partial rotation', { partial_rotary_factor: 0.5 }, 'UNSUPPORTED', 'partial_rotary_factor'],
    ['an odd head size', { head_dim: 12 }, 'UNSUPPORTED', 'head size 12'],
    [
      'heads that do not divide',
      { num_key_value_heads: 3 },
      'MALFORMED_FILE',
      'multiple of the key/value heads',
    ],
    ['no hidden size', { hidden_size: undefined }, 'MALFORMED_FILE', 'hidden_size but it is missing'],
    ['a huge count', { num_hidden_layers: 1e15 }, 'MALFORMED_FILE', 'num_hidden_layers'],
    ['a negative size', { intermediate_size: -1 }, 'MALFORMED_FILE', 'intermediate_size'],
    ['text for a number', { vocab_size: '272' }, 'MALFORMED_FILE', '"272" of type string'],
    [
      'another shape',
      { intermediate_size: 64 },
      'MALFORMED_FILE',
      /mlp.*expected shape \[64,32\] but found \[48,32\]/,
    ],
    ['more layers', { num_hidden_layers: 3 }, 'MALFORMED_FILE', 'model.layers.2'],
    ['fewer layers', { num_hidden_layers: 1 }, 'UNSUPPORTED', 'model.layers.1'],
    ['an untied head', { tie_word_embeddings: false }, 'MALFORMED_FILE', 'lm_head.weight'],
    ['biases that are not there', { attention_bias: true }, 'MALFORMED_FILE', 'q_proj.bias'],
  ] as const)('is refused for %s', async (_, change, code, part) => {
    await expectFailure(() => openModel(withConfig(change)), code, part);
  });

  test.each([
    ['config.json', null, 'FILE_NOT_FOUND'],
    ['config.json', '{"model_type": ', 'MALFORMED_FILE'],
    ['config.json', '[]', 'MALFORMED_FILE'],
    ['tokenizer.json', null, 'FILE_NOT_FOUND'],
    ['tokenizer.json', '{', 'MALFORMED_FILE'],
    ['tokenizer_config.json', 'nonsense', 'MALFORMED_FILE'],
    ['model.safetensors', null, 'FILE_NOT_FOUND'],
    ['model.safetensors', '', 'MALFORMED_FILE'],
  ] as const)('is refused where %s is %j', async (name, content, code) => {
    await expectFailure(() => openModel(model({ [name]: content })), code, name);
  });

  test('is refused where there is nothing, or something else', async () => {
    const nothing = join(directory.path, 'none');
    await expectFailure(() => openModel(nothing), 'FILE_NOT_FOUND', nothing);
    await expectFailure(() => openModel(file(Buffer.from('text'), 'txt')), 'UNSUPPORTED', '.txt');
    await expectFailure(() => openModel('/dev/null'), 'UNSUPPORTED', '/dev/null');
  });

  test('is refused for types of weights that are not supported', async () => {
    const weights = tinyWeights();
    const norm = weights.find(({ name }) => name === 'model.norm.weight');
    if (norm) Object.assign(norm, { dtype: 'I8', data: new Uint8Array(32) });
    await expectFailure(
      () => openModel(model({ 'model.safetensors': safetensorsFile(weights) })),
      'UNSUPPORTED',
      'I8',
    );
  });
});

describe('a safetensors file', () => {
  const tensors = [
    { name: 'a', dtype: 'F32', shape: [2, 3], data: new Uint8Array(24) },
    { name: 'b', dtype: 'BF16', shape: [5], data: new Uint8Array(10) },
    { name: 'scalar', dtype: 'F32', shape: [], data: new Uint8Array(4) },
  ];
  const good = safetensorsFile(tensors);

  test('gives dtype, shape and place of its tensors', async () => {
    const header = await readSafetensorsHeader(file(good, 'safetensors'));
    const start = good.length - 38;
    expect(header.get('b')).toEqual({ dtype: 'BF16', shape: [5], offset: start + 24, byteLength: 10 });
    expect(header.get('scalar')).toEqual({ dtype: 'F32', shape: [], offset: start + 34, byteLength: 4 });
  });

  test('is refused wherever it is cut', async () => {
    for (let length = 0; length < good.length; ++length) {
      const path = file(good.subarray(0, length), 'safetensors');
      await expectFailure(() => readSafetensorsHeader(path), 'MALFORMED_FILE', path);
    }
  });

  test('is refused with bytes after its tensors', async () => {
    const path = file(Buffer.concat([good, Buffer.alloc(1)]), 'safetensors');
    await expectFailure(
      () => readSafetensorsHeader(path),
      'MALFORMED_FILE',
      '38 bytes of tensors but the file holds 39',
    );
  });

  test.each([
    ['a huge header', Buffer.concat([Buffer.alloc(8, 0xff), good.subarray(8)]), 'header of at most'],
    [
      'an unknown dtype',
      safetensorsFile(tensors, (h) => Object.assign(h.a as object, { dtype: 'F31' })),
      'F31',
    ],
    [
      'a lying shape',
      safetensorsFile(tensors, (h) => Object.assign(h.a as object, { shape: [2, 4] })),
      'takes 32 bytes',
    ],
    [
      'a huge shape',
      safetensorsFile(tensors, (h) => Object.assign(h.a as object, { shape: [1e15, 1e15] })),
      'takes',
    ],
    [
      'a negative shape',
      safetensorsFile(tensors, (h) => Object.assign(h.a as object, { shape: [-2, -3] })),
      'shape',
    ],
    [
      'offsets beyond the end',
      safetensorsFile(tensors, (h) => Object.assign(h.b as object, { data_offsets: [24, 1e9] })),
      'data_offsets',
    ],
    [
      'offsets in reverse',
      safetensorsFile(tensors, (h) => Object.assign(h.b as object, { data_offsets: [34, 24] })),
      'data_offsets',
    ],
    [
      'fractional offsets',
      safetensorsFile(tensors, (h) => Object.assign(h.b as object, { data_offsets: [24.5, 34.5] })),
      'data_offsets',
    ],
    [
      'an overlap',
      safetensorsFile(tensors, (h) => Object.assign(h.b as object, { data_offsets: [14, 24] })),
      'overlaps|hole',
    ],
    [
      'a missing shape',
      safetensorsFile(tensors, (h) => Object.assign(h.a as object, { shape: undefined })),
      'shape',
    ],
    ['a tensor that is null', safetensorsFile(tensors, (h) => Object.assign(h, { a: null })), 'object'],
  ])('is refused for %s', async (_, bytes, part) => {
    await expectFailure(
      () => readSafetensorsHeader(file(bytes, 'safetensors')),
      'MALFORMED_FILE',
      new RegExp(part),
    );
  });
});

describe('a GGUF file', () => {
  const good = ggufFile(ggufFields(), ggufTensors());

  test('gives configuration, sources and tokenizer', async () => {
    const files = await openModel(file(good, 'gguf'));
    expect(files.config).toEqual(tinyConfig);
    expect(files.sources.map(({ name }) => name)).toEqual(tinyWeights().map(({ name }) => name));
    const byName = new Map(files.sources.map((source) => [source.name, source]));
    expect(byName.get('model.layers.0.self_attn.q_proj.weight')?.permutedHeads).toBe(4);
    expect(byName.get('model.layers.0.self_attn.k_proj.weight')?.permutedHeads).toBe(2);
    expect(byName.get('model.layers.0.self_attn.v_proj.weight')?.permutedHeads).toBeUndefined();
    const embedding = byName.get('model.embed_tokens.weight');
    const weights = tinyWeights()[0]?.data as Uint8Array;
    expect(good.subarray(embedding?.offset, (embedding?.offset ?? 0) + weights.length).equals(weights)).toBe(
      true,
    );
    const tokenizer = new Tokenizer(files.tokenizer, 'tiny');
    const plain = new Tokenizer(tokenizerFiles(), 'tiny');
    const text = 'hello world<|im_end|> né 12';
    expect(tokenizer.encode(text)).toEqual(plain.encode(text));
    expect(tokenizer.eosIds).toEqual([0, 2]);
  });

  test('may name a padding token', async () => {
    const padding = { key: 'tokenizer.ggml.padding_token_id', type: 'u32', value: 2 } as const;
    const files = await openModel(file(ggufFile([...ggufFields(), padding], ggufTensors()), 'gguf'));
    expect(files.config).toEqual({ ...tinyConfig, paddingId: 2 });
  });

  test.each([
    ['qwen2', { architecture: 'qwen2', attentionBias: true, tiedHead: false }],
    ['llama with all biases', { attentionBias: true, outputBias: true, mlpBias: true }],
  ] as const)('may be %s', async (_, change) => {
    const config = { ...tinyConfig, ...change };
    const files = await openModel(file(ggufFile(ggufFields(config), ggufTensors(config)), 'gguf'));
    expect(files.config).toEqual(config);
    expect(files.sources.map(({ name }) => name)).toEqual(tinyWeights(config).map(({ name }) => name));
    const q = files.sources.find(({ name }) => name === 'model.layers.0.self_attn.q_proj.bias');
    expect(q?.permutedHeads).toBe(config.architecture === 'llama' ? 4 : undefined);
  });

  test('holds the scaling of Llama 3 as divisors', async () => {
    const rope = {
      type: 'llama3',
      theta: 500_000,
      factor: 32,
      lowFrequencyFactor: 1,
      highFrequencyFactor: 4,
      originalMaxPositions: 8192,
    } as const;
    const config = { ...tinyConfig, rope };
    const plain = inverseFrequencies({ type: 'default', theta: rope.theta }, 8);
    const divisors = inverseFrequencies(rope, 8).map((value, i) => (plain[i] as number) / value);
    const tensor = (values: Float32Array) => ({
      name: 'rope_freqs.weight',
      type: 0,
      dimensions: [values.length],
      data: new Uint8Array(values.buffer),
    });
    const open = (values: Float32Array) =>
      openModel(file(ggufFile(ggufFields(config), [...ggufTensors(config), tensor(values)]), 'gguf'));
    expect((await open(divisors)).config.rope).toMatchObject({ ...rope, factor: expect.closeTo(32, 3) });
    expect((await open(new Float32Array(4).fill(1))).config.rope).toEqual({
      type: 'default',
      theta: 500_000,
    });
    await expectFailure(() => open(Float32Array.of(1, 2, 3, 4)), 'UNSUPPORTED', 'rope_freqs');
    await expectFailure(() => open(new Float32Array(8).fill(2)), 'MALFORMED_FILE', 'expected 4 values');
  });

  test.each([
    ['a factor without a type', [['rope.scaling.factor', 4]], 4],
    ['the key of old files', [['rope.scale_linear', 4]], 4],
    [
      'both keys',
      [
        ['rope.scaling.factor', 2],
        ['rope.scale_linear', 4],
      ],
      2,
    ],
    ['a factor of 0', [['rope.scaling.factor', 0]], 1],
    ['a factor of 1', [['rope.scale_linear', 1]], 1],
    ['a type and no factor', [['rope.scaling.type', 'linear']], 1],
    [
      'the type none beside a factor',
      [
        ['rope.scaling.type', 'none'],
        ['rope.scaling.factor', 4],
      ],
      1,
    ],
    [
      'a linear factor',
      [
        ['rope.scaling.type', 'linear'],
        ['rope.scaling.factor', 4],
      ],
      4,
    ],
  ] as const)('scales positions by %s as llama.cpp does', async (_, given, factor) => {
    const more = given.map(
      ([key, value]): GgufField =>
        typeof value === 'string'
          ? { key: `llama.${key}`, type: 'string', value }
          : { key: `llama.${key}`, type: 'f32', value },
    );
    const { config } = await openModel(file(ggufFile([...ggufFields(), ...more], ggufTensors()), 'gguf'));
    expect(config.rope).toEqual(
      factor === 1 ? { type: 'default', theta: 10_000 } : { type: 'linear', theta: 10_000, factor },
    );
  });

  describe('in parts', () => {
    const splitFields = (no: number, of: number, tensorCount: number): GgufField[] => [
      { key: 'split.no', type: 'u32', value: no },
      { key: 'split.count', type: 'u32', value: of },
      { key: 'split.tensors.count', type: 'i32', value: tensorCount },
    ];
    // As gguf-split writes them: the first part has the metadata, and no tensors where it was asked for that.
    const write = (edit: (parts: Buffer[]) => (Buffer | undefined)[] = (parts) => parts) => {
      const all = ggufTensors();
      const shares = [[], all.slice(0, 7), all.slice(7)];
      const parts = shares.map((tensors, i) =>
        ggufFile([...(i === 0 ? ggufFields() : []), ...splitFields(i, 3, all.length)], tensors),
      );
      const stem = join(directory.path, `split-${count++}`);
      return edit(parts).map((bytes, i) => {
        const path = `${stem}-0000${i + 1}-of-00003.gguf`;
        if (bytes !== undefined) writeFileSync(path, bytes);
        return path;
      });
    };

    test('is one model, whichever part is named', async () => {
      const paths = write();
      const whole = await openModel(file(good, 'gguf'));
      for (const path of paths) {
        const found = await openModel(path);
        expect(found.config).toEqual(whole.config);
        expect(found.files).toEqual(paths);
        expect(found.sources.map(({ name }) => name)).toEqual(whole.sources.map(({ name }) => name));
        expect(new Set(found.sources.map((source) => source.path))).toEqual(new Set(paths.slice(1)));
      }
      const policies = await Promise.all(
        [whole.path, paths[0] as string].map((path) => Policy.load(path, { device: 'cpu', dtype: 'f32' })),
      );
      const [right, found] = await Promise.all(policies.map((policy) => policy.logits([3, 40, 50])));
      expect(found).toEqual(right);
      for (const policy of policies) policy.dispose();
    });

    test('is refused where a part is missing, another, twice or misnamed', async () => {
      const missing = write(([first, second]) => [first, second, undefined]);
      await expectFailure(() => openModel(missing[0] as string), 'FILE_NOT_FOUND', missing[2] as string);
      const swapped = write(([first, second, third]) => [first, third, second]);
      await expectFailure(
        () => openModel(swapped[0] as string),
        'MALFORMED_FILE',
        swapped[1] as string,
        'expected 1 for split.no, as its name says, but found 2',
      );
      const all = ggufTensors();
      const twice = write(([first, second]) => [
        first,
        second,
        ggufFile(splitFields(2, 3, all.length), [all[6] as GgufTensor, ...all.slice(8)]),
      ]);
      await expectFailure(() => openModel(twice[0] as string), 'MALFORMED_FILE', 'is in another part too');
      const fewer = write(([first, second]) => [
        first,
        second,
        ggufFile(splitFields(2, 3, all.length), all.slice(8)),
      ]);
      await expectFailure(() => openModel(fewer[0] as string), 'MALFORMED_FILE', 'split.tensors.count');
      const named = file(ggufFile([...ggufFields(), ...splitFields(0, 3, all.length)], all), 'gguf');
      await expectFailure(() => openModel(named), 'MALFORMED_FILE', 'model-00001-of-00003.gguf');
    });
  });

  test('skips what is large and unasked for, and no list stops the event loop', async () => {
    const strings = Array.from({ length: 200_000 }, (_, i) => `word ${i}`);
    const large: GgufField[] = [
      { key: 'general.words', type: 'strings', value: strings },
      { key: 'general.numbers', type: 'f32s', value: strings.map((_, i) => i) },
      { key: 'general.text', type: 'string', value: 'x'.repeat(6 << 20) },
      { key: 'general.tags', type: 'strings', value: ['a', 'b'] },
    ];
    const path = file(ggufFile([...large, ...ggufFields()], ggufTensors()), 'gguf');
    const whole = await openModel(file(good, 'gguf'));
    let turns = 0;
    const timer = setInterval(() => ++turns, 0);
    const { metadata, tensors: found } = await readGguf(path);
    clearInterval(timer);
    expect(turns).toBeGreaterThan(2);
    expect([...metadata.keys()].filter((key) => key.startsWith('general.')).sort()).toEqual([
      'general.architecture',
      'general.tags',
    ]);
    expect(metadata.get('general.tags')).toEqual(['a', 'b']);
    expect(found.size).toBe(whole.sources.length);
    expect((await openModel(path)).config).toEqual(whole.config);
  });

  test('that says it has billions of elements is refused or skipped at once', async () => {
    const liar = (elementType: number, elements: number, room: number) => {
      const field = Buffer.alloc(8 + 1 + 4 + 4 + 8);
      field.writeBigUInt64LE(1n, 0);
      field.write('x', 8);
      field.writeUInt32LE(9, 9);
      field.writeUInt32LE(elementType, 13);
      field.writeBigUInt64LE(BigInt(elements), 17);
      const header = Buffer.alloc(24);
      header.write('GGUF', 0);
      header.writeUInt32LE(3, 4);
      header.writeBigUInt64LE(1n, 16);
      const path = file(Buffer.concat([header, field]), 'gguf');
      truncateSync(path, 49 + room);
      return path;
    };
    const begin = performance.now();
    // A sparse file has room for all that it says; no memory is taken for it.
    expect((await readGguf(liar(0, 1e10, 1e10))).metadata.size).toBe(0);
    await expectFailure(() => readGguf(liar(8, 1e9, 1e10)), 'MALFORMED_FILE', 'bytes to keep');
    await expectFailure(() => readGguf(liar(9, 1e8, 1e10)), 'MALFORMED_FILE', 'bytes to keep');
    await expectFailure(() => readGguf(liar(0, 1e10, 1e9)), 'MALFORMED_FILE', 'fit in the file');
    expect(performance.now() - begin).toBeLessThan(60_000);
  });

  test('is refused wherever it is cut, at every byte of its header and at the ends of its tensors', async () => {
    const small = ggufFile(
      ggufFields().map((field) =>
        field.type === 'strings' || field.type === 'i32s'
          ? ({ ...field, value: field.value.slice(0, 3) } as GgufField)
          : field,
      ),
      ggufTensors().slice(0, 3),
    );
    const { tensors } = await readGguf(file(small, 'gguf'));
    const dataStart = Math.min(...[...tensors.values()].map(({ offset }) => offset));
    const cuts = new Set(Array.from({ length: dataStart }, (_, i) => i));
    for (const { offset, byteLength } of tensors.values())
      for (const cut of [offset, offset + byteLength - 1]) cuts.add(cut);
    for (const cut of cuts) {
      const path = join(directory.path, 'cut.gguf');
      writeFileSync(path, small.subarray(0, cut));
      await expectFailure(() => readGguf(path), 'MALFORMED_FILE', path);
    }
  });

  test('with any byte changed is read or refused, never more', async () => {
    const draw = random(7);
    const headerBytes = 3000;
    for (let round = 0; round < 400; ++round) {
      const bytes = Buffer.from(good);
      const changes = 1 + Math.floor(draw() * 3);
      for (let i = 0; i < changes; ++i) bytes[Math.floor(draw() * headerBytes)] = Math.floor(draw() * 256);
      const path = join(directory.path, 'fuzzed.gguf');
      writeFileSync(path, bytes);
      try {
        const files = await openModel(path);
        new Tokenizer(files.tokenizer, path).encode('hello <|im_end|>');
      } catch (error) {
        expect(error).toBeInstanceOf(MerfError);
        expect((error as MerfError).message).toContain('fuzzed.gguf');
      }
    }
  });

  const fields = ggufFields();
  const tensors = ggufTensors();
  const changed = (key: string, value: Partial<GgufField> | null) =>
    fields.flatMap((field) =>
      field.key !== key ? [field] : value === null ? [] : [{ ...field, ...value } as GgufField],
    );
  const changedTensor = (name: string, change: Partial<GgufTensor>) =>
    tensors.map((tensor) => (tensor.name === name ? { ...tensor, ...change } : tensor));
  const norm = 'output_norm.weight';

  test.each([
    ['another magic number', ggufFile(fields, tensors, { magic: 'GGML' }), 'MALFORMED_FILE', 'GGUF'],
    ['version 1', ggufFile(fields, tensors, { version: 1 }), 'UNSUPPORTED', 'version'],
    ['a big-endian file', ggufFile(fields, tensors, { version: 0x03000000 }), 'UNSUPPORTED', 'big-endian'],
    [
      'a huge tensor count',
      ggufFile(fields, tensors, { tensorCount: 2n ** 63n }),
      'MALFORMED_FILE',
      'number of tensors',
    ],
    [
      'a lying tensor count',
      ggufFile(fields, tensors, { tensorCount: 900_000 }),
      'MALFORMED_FILE',
      'number of tensors',
    ],
    [
      'a huge key count',
      ggufFile(fields, tensors, { keyCount: 2n ** 40n }),
      'MALFORMED_FILE',
      'metadata keys',
    ],
    ['a key twice', ggufFile([...fields, fields[0] as GgufField], tensors), 'MALFORMED_FILE', 'occurs twice'],
    [
      'another architecture',
      ggufFile(changed('general.architecture', { value: 'gemma3' }), tensors),
      'UNSUPPORTED',
      'gemma3',
    ],
    [
      'no architecture',
      ggufFile(changed('general.architecture', null), tensors),
      'MALFORMED_FILE',
      'general.architecture',
    ],
    [
      'no head count',
      ggufFile(changed('llama.attention.head_count', null), tensors),
      'MALFORMED_FILE',
      'head_count',
    ],
    [
      'text for a number',
      ggufFile(changed('llama.block_count', { type: 'string', value: 'two' }), tensors),
      'MALFORMED_FILE',
      'block_count',
    ],
    [
      'experts',
      ggufFile([...fields, { key: 'llama.expert_count', type: 'u32', value: 8 }], tensors),
      'UNSUPPORTED',
      'expert',
    ],
    [
      'a sliding window',
      ggufFile([...fields, { key: 'llama.attention.sliding_window', type: 'u32', value: 64 }], tensors),
      'UNSUPPORTED',
      'sliding_window',
    ],
    [
      'yarn',
      ggufFile([...fields, { key: 'llama.rope.scaling.type', type: 'string', value: 'yarn' }], tensors),
      'UNSUPPORTED',
      'yarn',
    ],
    [
      'a partial rotation',
      ggufFile([...fields, { key: 'llama.rope.dimension_count', type: 'u32', value: 4 }], tensors),
      'UNSUPPORTED',
      'rope over 4 of 8',
    ],
    [
      'an alignment of 7',
      ggufFile([...fields, { key: 'general.alignment', type: 'u32', value: 7 }], tensors),
      'MALFORMED_FILE',
      'alignment',
    ],
    [
      'a tensor twice',
      ggufFile(fields, [...tensors, tensors[0] as GgufTensor]),
      'MALFORMED_FILE',
      'occurs twice',
    ],
    ['an unknown type', ggufFile(fields, changedTensor(norm, { type: 99 })), 'UNSUPPORTED', 'ggml type 99'],
    [
      'a type not supported',
      ggufFile(fields, changedTensor(norm, { type: 24, data: new Uint8Array(32) })),
      'UNSUPPORTED',
      'I8',
    ],
    [
      'rows that are no blocks',
      ggufFile(fields, changedTensor('blk.0.attn_norm.weight', { type: 12 })),
      'MALFORMED_FILE',
      'multiple of 256',
    ],
    [
      'five dimensions',
      ggufFile(fields, changedTensor(norm, { dimensions: [2, 2, 2, 2, 2] })),
      'MALFORMED_FILE',
      'dimensions',
    ],
    [
      'no dimensions',
      ggufFile(fields, changedTensor(norm, { dimensions: [] })),
      'MALFORMED_FILE',
      'dimensions',
    ],
    [
      'a dimension of 0',
      ggufFile(fields, changedTensor(norm, { dimensions: [0] })),
      'MALFORMED_FILE',
      'impossible',
    ],
    [
      'huge dimensions',
      ggufFile(fields, changedTensor(norm, { dimensions: [2 ** 50, 2 ** 50] })),
      'MALFORMED_FILE',
      'impossible',
    ],
    [
      'an offset beyond the end',
      ggufFile(fields, changedTensor(norm, { offset: 2 ** 40 })),
      'MALFORMED_FILE',
      'truncated',
    ],
    [
      'an offset that is not aligned',
      ggufFile(fields, changedTensor(norm, { offset: 4 })),
      'MALFORMED_FILE',
      'multiple of 32',
    ],
    ['an overlap', ggufFile(fields, changedTensor(norm, { offset: 0 })), 'MALFORMED_FILE', 'overlaps'],
    [
      'another shape',
      ggufFile(fields, changedTensor(norm, { dimensions: [16], data: new Uint8Array(64) })),
      'MALFORMED_FILE',
      'expected shape',
    ],
    [
      'a missing tensor',
      ggufFile(
        fields,
        tensors.filter(({ name }) => name !== norm),
      ),
      'MALFORMED_FILE',
      norm,
    ],
    [
      'a tensor too many',
      ggufFile(fields, [
        ...tensors,
        { name: 'blk.0.attn_q_norm.weight', type: 0, dimensions: [8], data: new Uint8Array(32) },
      ]),
      'UNSUPPORTED',
      'attn_q_norm',
    ],
    ['no tokenizer', ggufFile(changed('tokenizer.ggml.model', null), tensors), 'MALFORMED_FILE', 'tokenizer'],
    [
      'another tokenizer',
      ggufFile(changed('tokenizer.ggml.model', { value: 'rwkv' }), tensors),
      'UNSUPPORTED',
      'rwkv',
    ],
    [
      'another pre-tokenizer',
      ggufFile(changed('tokenizer.ggml.pre', { value: 'tekken' }), tensors),
      'UNSUPPORTED',
      'tekken',
    ],
    [
      'too few tokens',
      ggufFile(changed('tokenizer.ggml.tokens', { type: 'strings', value: ['a'] }), tensors),
      'MALFORMED_FILE',
      '272 tokens',
    ],
    ['no merges', ggufFile(changed('tokenizer.ggml.merges', null), tensors), 'MALFORMED_FILE', 'merges'],
    [
      'merges that are none',
      ggufFile(changed('tokenizer.ggml.merges', { type: 'strings', value: ['abc'] }), tensors),
      'MALFORMED_FILE',
      'merges',
    ],
    [
      'an end token that is none',
      ggufFile(changed('tokenizer.ggml.eos_token_id', { value: 272 }), tensors),
      'MALFORMED_FILE',
      'eos_token_id',
    ],
  ] as const)('is refused for %s', async (_, bytes, code, part) => {
    const path = file(bytes, 'gguf');
    await expectFailure(() => openModel(path), code, part, path);
  });

  test('names what it expected and what was there', async () => {
    const error = await failure(() => openModel(file(good.subarray(0, good.length - 200), 'gguf')));
    expect(error.message).toMatch(
      /tensor \S+ \(F32 \[[\d,]+\]\) takes bytes \d+ to \d+ but the file has \d+/,
    );
  });
});

const describeShared = existsSync(smollm) ? describe : describe.skip;
describeShared('SmolLM2 [needs ../shared]', () => {
  test('has the configuration that its README names', async () => {
    const { config, sources } = await openModel(smollm);
    expect(config).toEqual({
      architecture: 'llama',
      hiddenSize: 576,
      layers: 30,
      heads: 9,
      kvHeads: 3,
      headSize: 64,
      mlpSize: 1536,
      vocabSize: 49_152,
      paddingId: 2,
      rmsNormEps: 1e-5,
      tiedHead: true,
      attentionBias: false,
      outputBias: false,
      mlpBias: false,
      maxPositions: 8192,
      rope: { type: 'default', theta: 100_000 },
    });
    expect(sources).toHaveLength(272);
    expect(new Set(sources.map(({ encoding }) => encoding))).toEqual(new Set(['F32', 'Q4_1', 'Q8_0']));
  });
});
