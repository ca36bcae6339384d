import { mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { type ModelConfig, parameterShapes } from '../../lib/policy/config.js';

/** mulberry32: enough for test data. */
export function random(seed: number): () => number {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = Math.imul(state ^ (state >>> 15), 1 | state);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
}

export const tinyConfig: ModelConfig = {
  architecture: 'llama',
  hiddenSize: 32,
  layers: 2,
  heads: 4,
  kvHeads: 2,
  headSize: 8,
  mlpSize: 48,
  vocabSize: 272,
  rmsNormEps: 1e-5,
  tiedHead: true,
  attentionBias: false,
  outputBias: false,
  mlpBias: false,
  maxPositions: 128,
  rope: { type: 'default', theta: 10_000 },
};

export function configJson(config: ModelConfig = tinyConfig): Record<string, unknown> {
  return {
    architectures: ['LlamaForCausalLM'],
    model_type: config.architecture,
    hidden_size: config.hiddenSize,
    num_hidden_layers: config.layers,
    num_attention_heads: config.heads,
    num_key_value_heads: config.kvHeads,
    head_dim: config.headSize,
    intermediate_size: config.mlpSize,
    vocab_size: config.vocabSize,
    hidden_act: 'silu',
    rms_norm_eps: config.rmsNormEps,
    tie_word_embeddings: config.tiedHead,
    max_position_embeddings: config.maxPositions,
    rope_theta: config.rope.theta,
  };
}

const alphabet: string[] = (() => {
  const characters: string[] = [];
  let next = 256;
  for (let byte = 0; byte < 256; ++byte) {
    const printable = (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
    characters.push(String.fromCharCode(printable ? byte : next++));
  }
  return characters;
})();

const chatml =
  "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";

const tinySpecial = ['<|endoftext|>', '<|im_start|>', '<|im_end|>'];
const tinyMerges = ['h e', 'l l', 'o w', 'he ll', 'Ġ w', 'Ġw o'];

/** All bytes, a few merges, ChatML: ids 0 to 2 are special, 3 to 258 the bytes' characters, then the merges. */
export const tinyTokens = [...tinySpecial, ...alphabet, ...tinyMerges.map((merge) => merge.replace(' ', ''))];

export function tokenizerFiles() {
  return {
    tokenizer: {
      version: '1.0',
      truncation: null,
      padding: null,
      added_tokens: tinySpecial.map((content, id) => ({
        id,
        content,
        single_word: false,
        lstrip: false,
        rstrip: false,
        normalized: false,
        special: true,
      })),
      normalizer: null,
      pre_tokenizer: { type: 'ByteLevel', add_prefix_space: false, trim_offsets: true, use_regex: true },
      post_processor: null,
      decoder: { type: 'ByteLevel', add_prefix_space: false, trim_offsets: true, use_regex: true },
      model: {
        type: 'BPE',
        unk_token: null,
        vocab: Object.fromEntries(tinyTokens.map((token, id) => [token, id])),
        merges: tinyMerges,
      },
    } as Record<string, unknown>,
    config: { eos_token: '<|endoftext|>', pad_token: '<|endoftext|>' } as Record<string, unknown>,
    generation: { eos_token_id: [0] } as Record<string, unknown>,
    chatTemplate: chatml,
  };
}

// ---- safetensors

export interface TestTensor {
  name: string;
  dtype: string;
  shape: number[];
  data: Uint8Array;
}

export function safetensorsFile(
  tensors: readonly TestTensor[],
  edit?: (header: Record<string, unknown>) => void,
): Buffer {
  const header: Record<string, unknown> = { __metadata__: { format: 'pt' } };
  let offset = 0;
  for (const { name, dtype, shape, data } of tensors) {
    header[name] = { dtype, shape, data_offsets: [offset, offset + data.length] };
    offset += data.length;
  }
  edit?.(header);
  const text = Buffer.from(JSON.stringify(header));
  const length = Buffer.alloc(8);
  length.writeBigUInt64LE(BigInt(text.length));
  return Buffer.concat([length, text, ...tensors.map(({ data }) => data)]);
}

/** Random float32 weights for every parameter; norms are 1. */
export function tinyWeights(config: ModelConfig = tinyConfig, seed = 1): TestTensor[] {
  const draw = random(seed);
  return [...parameterShapes(config)].map(([name, shape]) => {
    const values = new Float32Array(shape.reduce((product, n) => product * n, 1));
    for (let i = 0; i < values.length; ++i) values[i] = name.includes('norm') ? 1 : (draw() - 0.5) * 0.4;
    return { name, dtype: 'F32', shape, data: new Uint8Array(values.buffer) };
  });
}

/** A Hugging Face directory of a tiny random model; `files` replaces or (null) leaves out some of its files. */
export function writeTinyModel(
  directory: string,
  files: Record<string, string | Uint8Array | null> = {},
): string {
  mkdirSync(directory, { recursive: true });
  const tokenizer = tokenizerFiles();
  const all: Record<string, string | Uint8Array | null> = {
    'config.json': JSON.stringify(configJson()),
    'model.safetensors': safetensorsFile(tinyWeights()),
    'tokenizer.json': JSON.stringify(tokenizer.tokenizer),
    'tokenizer_config.json': JSON.stringify({ ...tokenizer.config, chat_template: tokenizer.chatTemplate }),
    'generation_config.json': JSON.stringify(tokenizer.generation),
    ...files,
  };
  for (const [name, content] of Object.entries(all)) {
    if (content !== null) writeFileSync(join(directory, name), content);
  }
  return directory;
}

// ---- GGUF

export type GgufField =
  | { key: string; type: 'u32' | 'i32' | 'f32' | 'u64' | 'bool'; value: number }
  | { key: string; type: 'string'; value: string }
  | { key: string; type: 'strings'; value: string[] }
  | { key: string; type: 'i32s' | 'f32s'; value: number[] };

export interface GgufTensor {
  name: string;
  /** ggml's number of the type. */
  type: number;
  /** Fastest dimension first, as in the file. */
  dimensions: number[];
  data: Uint8Array;
  /** What the directory says where it lies. */
  offset?: number;
}

const u32 = (value: number) => {
  const bytes = Buffer.alloc(4);
  bytes.writeUInt32LE(value >>> 0);
  return bytes;
};
const u64 = (value: number | bigint) => {
  const bytes = Buffer.alloc(8);
  bytes.writeBigUInt64LE(BigInt(value));
  return bytes;
};
const f32 = (value: number) => {
  const bytes = Buffer.alloc(4);
  bytes.writeFloatLE(value);
  return bytes;
};
const text = (value: string) => {
  const bytes = Buffer.from(value);
  return Buffer.concat([u64(bytes.length), bytes]);
};

function fieldBytes(field: GgufField): Buffer {
  switch (field.type) {
    case 'u32':
      return Buffer.concat([u32(4), u32(field.value)]);
    case 'i32':
      return Buffer.concat([u32(5), u32(field.value)]);
    case 'f32':
      return Buffer.concat([u32(6), f32(field.value)]);
    case 'bool':
      return Buffer.concat([u32(7), Buffer.of(field.value)]);
    case 'u64':
      return Buffer.concat([u32(10), u64(field.value)]);
    case 'string':
      return Buffer.concat([u32(8), text(field.value)]);
    case 'strings':
      return Buffer.concat([u32(9), u32(8), u64(field.value.length), ...field.value.map(text)]);
    case 'i32s':
      return Buffer.concat([u32(9), u32(5), u64(field.value.length), ...field.value.map(u32)]);
    case 'f32s':
      return Buffer.concat([u32(9), u32(6), u64(field.value.length), ...field.value.map(f32)]);
  }
}

export function ggufFile(
  fields: readonly GgufField[],
  tensors: readonly GgufTensor[],
  lies: { version?: number; tensorCount?: number | bigint; keyCount?: number | bigint; magic?: string } = {},
): Buffer {
  const directory: Buffer[] = [];
  const data: Buffer[] = [];
  let offset = 0;
  for (const tensor of tensors) {
    directory.push(
      text(tensor.name),
      u32(tensor.dimensions.length),
      ...tensor.dimensions.map(u64),
      u32(tensor.type),
      u64(tensor.offset ?? offset),
    );
    const padded = Math.ceil(tensor.data.length / 32) * 32;
    data.push(Buffer.concat([tensor.data, Buffer.alloc(padded - tensor.data.length)]));
    offset += padded;
  }
  const header = Buffer.concat([
    Buffer.from(lies.magic ?? 'GGUF', 'latin1'),
    u32(lies.version ?? 3),
    u64(lies.tensorCount ?? tensors.length),
    u64(lies.keyCount ?? fields.length),
    ...fields.flatMap((field) => [text(field.key), fieldBytes(field)]),
    ...directory,
  ]);
  const aligned = Buffer.alloc(Math.ceil(header.length / 32) * 32 - header.length);
  return Buffer.concat([header, aligned, ...data]);
}

const ggufNames: [RegExp, string][] = [
  [/^model\.embed_tokens/, 'token_embd'],
  [/^model\.norm/, 'output_norm'],
  [/^lm_head/, 'output'],
  [/^model\.layers\./, 'blk.'],
  [/input_layernorm/, 'attn_norm'],
  [/post_attention_layernorm/, 'ffn_norm'],
  [/self_attn\.([qkv])_proj/, 'attn_$1'],
  [/self_attn\.o_proj/, 'attn_output'],
  [/mlp\.(gate|up|down)_proj/, 'ffn_$1'],
];

export function ggufFields(config: ModelConfig = tinyConfig): GgufField[] {
  const a = config.architecture;
  return [
    { key: 'general.architecture', type: 'string', value: a },
    { key: `${a}.block_count`, type: 'u32', value: config.layers },
    { key: `${a}.context_length`, type: 'u32', value: config.maxPositions },
    { key: `${a}.embedding_length`, type: 'u32', value: config.hiddenSize },
    { key: `${a}.feed_forward_length`, type: 'u32', value: config.mlpSize },
    { key: `${a}.attention.head_count`, type: 'u32', value: config.heads },
    { key: `${a}.attention.head_count_kv`, type: 'u32', value: config.kvHeads },
    { key: `${a}.rope.freq_base`, type: 'f32', value: config.rope.theta },
    { key: `${a}.attention.layer_norm_rms_epsilon`, type: 'f32', value: config.rmsNormEps },
    { key: 'tokenizer.ggml.model', type: 'string', value: 'gpt2' },
    { key: 'tokenizer.ggml.pre', type: 'string', value: 'gpt-2' },
    { key: 'tokenizer.ggml.tokens', type: 'strings', value: paddedTokens(config.vocabSize) },
    {
      key: 'tokenizer.ggml.token_type',
      type: 'i32s',
      value: paddedTokens(config.vocabSize).map((_, id) => (id < 3 ? 3 : 1)),
    },
    { key: 'tokenizer.ggml.merges', type: 'strings', value: tinyMerges },
    { key: 'tokenizer.ggml.eos_token_id', type: 'u32', value: 0 },
    { key: 'tokenizer.chat_template', type: 'string', value: chatml },
  ];
}

function paddedTokens(size: number): string[] {
  return Array.from({ length: size }, (_, id) => tinyTokens[id] ?? `[PAD${id}]`);
}

/** The weights of `tinyWeights` under llama.cpp's names; q and k have their rows interleaved as llama.cpp wants. */
export function ggufTensors(config: ModelConfig = tinyConfig): GgufTensor[] {
  return tinyWeights(config).map(({ name, shape, data }) => {
    const heads = name.includes('q_proj') ? config.heads : name.includes('k_proj') ? config.kvHeads : 0;
    return {
      name: ggufNames.reduce((renamed, [from, to]) => renamed.replace(from, to), name),
      type: 0,
      dimensions: [...shape].reverse(),
      data:
        heads > 0 && config.architecture === 'llama' ? interleaved(data, shape[0] as number, heads) : data,
    };
  });
}

/** Row `half * d/2 + i` of a head of size d moves to row `2 i + half`. */
function interleaved(data: Uint8Array, rows: number, heads: number): Uint8Array {
  const rowBytes = data.length / rows;
  const headSize = rows / heads;
  const out = new Uint8Array(data.length);
  for (let row = 0; row < rows; ++row) {
    const within = row % headSize;
    const half = Math.floor(within / (headSize / 2));
    const to = row - within + 2 * (within % (headSize / 2)) + half;
    out.set(data.subarray(row * rowBytes, (row + 1) * rowBytes), to * rowBytes);
  }
  return out;
}
