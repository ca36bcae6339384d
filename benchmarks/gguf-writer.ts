// A GGUF file with random weights, for llama.cpp to read. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
import { closeSync, openSync, writeSync } from 'node:fs';
import type { ModelConfig } from 'merf';
import type { Dtype } from './workloads.js';

const alignment = 32;
const ggmlType = { f32: 0, bf16: 30 } as const;
const elementBytes = { f32: 4, bf16: 2 } as const;

interface Tensor {
  name: string;
  /** Rows first. */
  shape: number[];
  dtype: Dtype;
}

/** Matrices in `dtype`, normally distributed as those of a new model; norms and biases in float32. */
export function writeRandomGguf(path: string, config: ModelConfig, dtype: Dtype): void {
  const tensors = tensorsOf(config, dtype);
  const file = openSync(path, 'w');
  try {
    const header = headerOf(config, tensors);
    const padded = Buffer.alloc(aligned(header.length));
    header.copy(padded);
    writeSync(file, padded);
    for (const [i, tensor] of tensors.entries()) writeAll(file, tensor, i);
  } finally {
    closeSync(file);
  }
}

function tensorsOf(c: ModelConfig, dtype: Dtype): Tensor[] {
  const matrix = (name: string, outputs: number, inputs: number, bias = false): Tensor[] => [
    { name: `${name}.weight`, shape: [outputs, inputs], dtype },
    ...(bias ? [{ name: `${name}.bias`, shape: [outputs], dtype: 'f32' as const }] : []),
  ];
  const norm = (name: string): Tensor => ({ name: `${name}.weight`, shape: [c.hiddenSize], dtype: 'f32' });
  const layer = (i: number) => [
    norm(`blk.${i}.attn_norm`),
    ...matrix(`blk.${i}.attn_q`, c.heads * c.headSize, c.hiddenSize, c.attentionBias),
    ...matrix(`blk.${i}.attn_k`, c.kvHeads * c.headSize, c.hiddenSize, c.attentionBias),
    ...matrix(`blk.${i}.attn_v`, c.kvHeads * c.headSize, c.hiddenSize, c.attentionBias),
    ...matrix(`blk.${i}.attn_output`, c.hiddenSize, c.heads * c.headSize, c.outputBias),
    norm(`blk.${i}.ffn_norm`),
    ...matrix(`blk.${i}.ffn_gate`, c.mlpSize, c.hiddenSize, c.mlpBias),
    ...matrix(`blk.${i}.ffn_up`, c.mlpSize, c.hiddenSize, c.mlpBias),
    ...matrix(`blk.${i}.ffn_down`, c.hiddenSize, c.mlpSize, c.mlpBias),
  ];
  return [
    ...matrix('token_embd', c.vocabSize, c.hiddenSize),
    ...Array.from({ length: c.layers }, (_, i) => layer(i)).flat(),
    norm('output_norm'),
    ...(c.tiedHead ? [] : matrix('output', c.vocabSize, c.hiddenSize)),
  ];
}

// ---- the header

function headerOf(c: ModelConfig, tensors: readonly Tensor[]): Buffer {
  const key = (name: string) => `${c.architecture}.${name}`;
  const metadata: Buffer[] = [
    text('general.architecture', c.architecture),
    uint32(key('context_length'), c.maxPositions),
    uint32(key('embedding_length'), c.hiddenSize),
    uint32(key('block_count'), c.layers),
    uint32(key('feed_forward_length'), c.mlpSize),
    uint32(key('attention.head_count'), c.heads),
    uint32(key('attention.head_count_kv'), c.kvHeads),
    uint32(key('attention.key_length'), c.headSize),
    uint32(key('attention.value_length'), c.headSize),
    uint32(key('rope.dimension_count'), c.headSize),
    float32(key('rope.freq_base'), c.rope.theta),
    float32(key('attention.layer_norm_rms_epsilon'), c.rmsNormEps),
    // A vocabulary that llama.cpp takes: every id is a word, and nothing is ever merged. It asks for an end token.
    text('tokenizer.ggml.model', 'gpt2'),
    text('tokenizer.ggml.pre', 'gpt-2'),
    texts(
      'tokenizer.ggml.tokens',
      Array.from({ length: c.vocabSize }, (_, i) => `w${i}`),
    ),
    texts('tokenizer.ggml.merges', ['w 0']),
    uint32('tokenizer.ggml.eos_token_id', 0),
  ];
  let offset = 0;
  const directory = tensors.map(({ name, shape, dtype }) => {
    const at = offset;
    offset += aligned(sizeOf(shape) * elementBytes[dtype]);
    return Buffer.concat([
      string(name),
      u32(shape.length),
      ...[...shape].reverse().map(u64), // the fastest dimension first
      u32(ggmlType[dtype]),
      u64(at),
    ]);
  });
  const start = [Buffer.from('GGUF'), u32(3), u64(tensors.length), u64(metadata.length)];
  return Buffer.concat([...start, ...metadata, ...directory]);
}

const valueType = { uint32: 4, float32: 6, string: 8, array: 9 } as const;
const entry = (key: string, type: keyof typeof valueType, value: Buffer) =>
  Buffer.concat([string(key), u32(valueType[type]), value]);
const uint32 = (key: string, value: number) => entry(key, 'uint32', u32(value));
const float32 = (key: string, value: number) => {
  const bytes = Buffer.alloc(4);
  bytes.writeFloatLE(value);
  return entry(key, 'float32', bytes);
};
const text = (key: string, value: string) => entry(key, 'string', string(value));
const texts = (key: string, values: readonly string[]) =>
  entry(
    key,
    'array',
    Buffer.concat([u32(valueType.string), u64(values.length), ...values.map((value) => string(value))]),
  );

function string(value: string): Buffer {
  const bytes = Buffer.from(value);
  return Buffer.concat([u64(bytes.length), bytes]);
}

function u32(value: number): Buffer {
  const bytes = Buffer.alloc(4);
  bytes.writeUInt32LE(value);
  return bytes;
}

function u64(value: number): Buffer {
  const bytes = Buffer.alloc(8);
  bytes.writeBigUInt64LE(BigInt(value));
  return bytes;
}

const aligned = (bytes: number) => Math.ceil(bytes / alignment) * alignment;
const sizeOf = (shape: readonly number[]) => shape.reduce((product, n) => product * n, 1);

// ---- the weights

// Pieces of one table of random numbers, each tensor's from another place: quick, and no two rows are alike, because
// the table's length is prime.
const table = normals(1_000_003);

function writeAll(file: number, { name, shape, dtype }: Tensor, index: number): void {
  const size = sizeOf(shape);
  const norm = name.includes('norm');
  const values = new Float32Array(aligned(size * 4) / 4);
  if (norm) values.fill(1, 0, size);
  else if (shape.length === 2) {
    let from = (index * 7919) % table.length;
    for (let at = 0; at < size; from = 0) {
      const part = table.subarray(from, Math.min(table.length, from + size - at));
      values.set(part, at);
      at += part.length;
    }
  }
  if (dtype === 'f32') {
    writeWhole(file, Buffer.from(values.buffer));
    return;
  }
  // The upper halves: bfloat16, cut instead of rounded.
  const halves = new Uint16Array(values.buffer);
  const cut = new Uint16Array(aligned(size * 2) / 2);
  for (let i = 0; i < size; ++i) cut[i] = halves[2 * i + 1] as number;
  writeWhole(file, Buffer.from(cut.buffer));
}

function writeWhole(file: number, bytes: Buffer): void {
  for (let at = 0; at < bytes.length; ) at += writeSync(file, bytes, at);
}

/** Normal numbers of mean 0 and standard deviation 0.02 (Box-Muller over a linear congruential generator). */
function normals(count: number): Float32Array {
  let state = 1;
  const uniform = () => {
    state = (Math.imul(state, 1_664_525) + 1_013_904_223) >>> 0;
    return (state + 1) / 4_294_967_297;
  };
  return Float32Array.from(
    { length: count },
    () => 0.02 * Math.sqrt(-2 * Math.log(uniform())) * Math.cos(2 * Math.PI * uniform()),
  );
}
