import { join } from 'node:path';
import { openModel } from '../../../lib/policy/model-files.js';
import { Policy } from '../../../lib/policy/policy.js';
import { Tokenizer } from '../../../lib/policy/tokenizer.js';
import {
  configJson,
  type GgufField,
  ggufFields,
  ggufFile,
  ggufTensors,
  safetensorsFile,
  tinyConfig,
  tinyWeights,
  tokenizerFiles,
} from '../../policy/tiny-model.js';
import type { Draw } from '../draw.js';
import { extreme, hostileText, mutateBytes, mutatedJsonText, mutateJson, writeInteger } from '../mutate.js';
import { type Input, type Target, writeInput } from '../target.js';

const smallConfig = { ...tinyConfig, layers: 1 };
const fields = ggufFields(smallConfig);
const tensors = ggufTensors(smallConfig);
const weights = tinyWeights(smallConfig);
const safetensors = safetensorsFile(weights);

/** Opens a model with all that stands beside it, and where that works loads it and draws two tokens. */
async function useModel(path: string): Promise<string> {
  const files = await openModel(path);
  const tokenizer = new Tokenizer(files.tokenizer, path);
  tokenizer.decode(tokenizer.encode('Hello <|im_end|> world', { special: true }));
  const policy = await Policy.load(path, { device: 'cpu', threads: 1, dtype: 'f32' });
  try {
    const groups = await policy.sample([[1, 2, 3]], { n: 1, maxTokens: 2, seed: 1, stop: ['x'] });
    return groups[0]?.completions[0]?.text ?? '';
  } finally {
    policy.dispose();
  }
}

// ---- GGUF

/** Where a .gguf file that this directory's writer made has its lengths, counts, types and offsets. */
function marksOf(file: Buffer): { offset: number; bytes: 4 | 8 }[] {
  const marks: { offset: number; bytes: 4 | 8 }[] = [];
  let at = 4;
  const u32 = () => {
    marks.push({ offset: at, bytes: 4 });
    at += 4;
    return file.readUInt32LE(at - 4);
  };
  const u64 = () => {
    marks.push({ offset: at, bytes: 8 });
    at += 8;
    return Number(file.readBigUInt64LE(at - 8));
  };
  const text = () => {
    const length = u64();
    at += length;
  };
  const scalarBytes = [1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8];
  u32();
  const tensorCount = u64();
  const keyCount = u64();
  for (let i = 0; i < keyCount; ++i) {
    text();
    const type = u32();
    if (type === 8) text();
    else if (type !== 9) at += scalarBytes[type] as number;
    else {
      const element = u32();
      const count = u64();
      for (let j = 0; j < count; ++j) {
        if (element === 8) text();
        else at += scalarBytes[element] as number;
      }
    }
  }
  for (let i = 0; i < tensorCount; ++i) {
    text();
    const rank = u32();
    for (let d = 0; d < rank; ++d) u64();
    u32();
    u64();
  }
  return marks;
}

/** Metadata in which one key is another, missing, there twice, or of a strange value. */
function mutateFields(draw: Draw, from: readonly GgufField[]): GgufField[] {
  const result = from.map((field) => ({ ...field }) as GgufField);
  const i = draw.below(result.length);
  const field = result[i] as GgufField;
  const number = () => Number(extreme(draw, 4));
  switch (draw.below(6)) {
    case 0:
      result.splice(i, 1);
      break;
    case 1:
      result.push({ ...field, key: draw.chance(0.3) ? field.key : hostileText(draw) } as GgufField);
      break;
    case 2:
      result[i] = { key: field.key, type: 'string', value: hostileText(draw) };
      break;
    case 3:
      result[i] = {
        key: field.key,
        type: draw.pick(['u32', 'i32', 'f32', 'bool'] as const),
        value: number(),
      };
      break;
    case 4: {
      const alien = draw.pick(alienFields);
      result.push({
        ...alien,
        value: typeof alien.value === 'number' ? number() : hostileText(draw),
      } as GgufField);
      break;
    }
    default:
      if (field.type === 'strings' || field.type === 'i32s' || field.type === 'f32s') {
        const items: (string | number)[] = [...field.value];
        const at = draw.below(items.length);
        const how = draw.below(3);
        if (how === 0) items.splice(at, 1);
        else if (how === 1) items.push(items[at] as string);
        else items[at] = field.type === 'strings' ? hostileText(draw) : number();
        result[i] = { ...field, value: items } as GgufField;
      } else if (field.type === 'string') result[i] = { ...field, value: hostileText(draw) };
      else {
        const value = number() % (field.type === 'bool' ? 256 : 2 ** 32);
        result[i] = { ...field, value } as GgufField;
      }
  }
  return result;
}

const alienFields: readonly GgufField[] = [
  { key: 'general.alignment', type: 'u32', value: 1 },
  { key: 'split.count', type: 'u32', value: 1 },
  { key: 'split.no', type: 'u32', value: 1 },
  { key: 'llama.rope.scale_linear', type: 'f32', value: 1 },
  { key: 'llama.rope.scaling.type', type: 'string', value: '' },
  { key: 'llama.rope.scaling.factor', type: 'f32', value: 1 },
  { key: 'llama.attention.key_length', type: 'u32', value: 1 },
  { key: 'llama.vocab_size', type: 'u32', value: 1 },
  { key: 'tokenizer.ggml.bos_token_id', type: 'u32', value: 1 },
  { key: 'tokenizer.ggml.padding_token_id', type: 'u32', value: 1 },
  { key: 'tokenizer.ggml.add_bos_token', type: 'bool', value: 1 },
  { key: 'tokenizer.ggml.model', type: 'string', value: 'llama' },
  { key: 'tokenizer.ggml.pre', type: 'string', value: 'qwen2' },
  { key: 'tokenizer.chat_template', type: 'string', value: '' },
];

function ggufWith(draw: Draw): Uint8Array {
  const chosen = draw.chance(0.4) ? mutateFields(draw, fields) : fields;
  const changed = tensors.map((tensor) => {
    if (!draw.chance(0.04)) return tensor;
    const dimension = draw.below(tensor.dimensions.length);
    switch (draw.below(4)) {
      case 0:
        return { ...tensor, type: draw.below(45) };
      case 1:
        return { ...tensor, offset: Number(extreme(draw, 4)) };
      case 2:
        return { ...tensor, name: hostileText(draw) };
      default:
        return {
          ...tensor,
          dimensions: tensor.dimensions.map((n, d) => (d === dimension ? Number(extreme(draw, 4)) : n)),
        };
    }
  });
  const file = ggufFile(chosen, changed);
  if (draw.chance(0.5)) return file;
  if (draw.chance(0.5)) {
    const marks = marksOf(file);
    for (let i = draw.below(3); i >= 0; --i) {
      const { offset, bytes } = draw.pick(marks);
      writeInteger(file, offset, bytes, extreme(draw, bytes));
    }
    return file;
  }
  return mutateBytes(draw, file, 0, draw.chance(0.7) ? 9000 : file.length);
}

const gguf: Target = {
  name: 'gguf',
  make: (draw) => ({ 'model.gguf': ggufWith(draw) }),
  run(input, folder) {
    writeInput(folder, input);
    return useModel(join(folder, 'model.gguf'));
  },
};

const partNames = [1, 2].map((n) => `model-0000${n}-of-00002.gguf`);

const ggufSplit: Target = {
  name: 'gguf-split',
  make(draw) {
    const half = Math.floor(tensors.length / 2);
    const parts = [tensors.slice(0, half), tensors.slice(half)].map((own, i) => {
      const split: GgufField[] = [
        { key: 'split.no', type: 'u32', value: i },
        { key: 'split.count', type: 'u32', value: 2 },
        { key: 'split.tensors.count', type: 'i32', value: tensors.length },
      ];
      const all = i === 0 ? [...fields, ...split] : split;
      return ggufFile(draw.chance(0.3) ? mutateFields(draw, all) : all, own);
    });
    const files = partNames.map((name, i) => [name, parts[i] as Uint8Array] as const);
    const changed = files.map(([name, bytes]) => [
      name,
      draw.chance(0.2) ? mutateBytes(draw, bytes, 0, 500) : bytes,
    ]);
    if (draw.chance(0.1)) changed.pop();
    return Object.fromEntries(changed) as Input;
  },
  run(input, folder) {
    writeInput(folder, input);
    return useModel(join(folder, partNames[0] as string));
  },
};

// ---- Hugging Face directories

const tokenizer = tokenizerFiles();
const directory: Readonly<Record<string, object>> = {
  'config.json': configJson(smallConfig),
  'tokenizer.json': tokenizer.tokenizer,
  'tokenizer_config.json': { ...tokenizer.config, chat_template: tokenizer.chatTemplate },
  'generation_config.json': tokenizer.generation,
};
const plain: Input = {
  ...Object.fromEntries(Object.entries(directory).map(([name, json]) => [name, JSON.stringify(json)])),
  'model.safetensors': safetensors,
};

/** A safetensors file whose header is another, or of another length than it says. */
function safetensorsWith(draw: Draw): Uint8Array {
  if (draw.chance(0.2))
    return mutateBytes(draw, safetensors, 0, draw.chance(0.7) ? 2500 : safetensors.length);
  const headerBytes = Number(safetensors.readBigUInt64LE(0));
  const header = JSON.parse(safetensors.toString('utf8', 8, 8 + headerBytes)) as Record<string, unknown>;
  const text = Buffer.from(
    draw.chance(0.3) ? JSON.stringify(mutateTensor(draw, header)) : mutatedJsonText(draw, header),
  );
  const length = Buffer.alloc(8);
  length.writeBigUInt64LE(draw.chance(0.1) ? extreme(draw, 8) : BigInt(text.length));
  const data = safetensors.subarray(8 + headerBytes);
  const kept = draw.chance(0.1) ? data.subarray(0, draw.below(data.length)) : data;
  return new Uint8Array(Buffer.concat([length, text, kept]));
}

function mutateTensor(draw: Draw, header: Record<string, unknown>): Record<string, unknown> {
  const name = draw.pick(Object.keys(header));
  const numbers = Array.from({ length: draw.below(4) }, () => Number(extreme(draw, draw.pick([1, 4, 8]))));
  const part = draw.pick(['shape', 'data_offsets', 'dtype']);
  const value = part === 'dtype' ? draw.pick(['F16', 'BF16', 'F8_E4M3', 'I64', 'BOOL', 'x']) : numbers;
  return { ...header, [name]: { ...Object(header[name]), [part]: value } };
}

const safetensorsTarget: Target = {
  name: 'safetensors',
  make(draw) {
    if (draw.chance(0.7)) return { ...plain, 'model.safetensors': safetensorsWith(draw) };
    const { 'model.safetensors': _, ...rest } = plain;
    const half = Math.floor(weights.length / 2);
    const shards = { 'a.safetensors': weights.slice(0, half), 'b.safetensors': weights.slice(half) };
    const weightMap = Object.fromEntries(
      Object.entries(shards).flatMap(([file, some]) => some.map(({ name }) => [name, file])),
    );
    const files = Object.entries(shards).map(([name, some]) => [name, safetensorsFile(some)]);
    const index = mutatedJsonText(draw, { metadata: { total_size: 1 }, weight_map: weightMap });
    return { ...rest, ...(Object.fromEntries(files) as Input), 'model.safetensors.index.json': index };
  },
  run(input, folder) {
    writeInput(folder, input);
    return useModel(folder);
  },
};

const configs: readonly Record<string, unknown>[] = [
  configJson(smallConfig),
  { ...configJson(smallConfig), rope_scaling: { rope_type: 'linear', factor: 2 }, head_dim: null },
  {
    ...configJson(smallConfig),
    rope_parameters: {
      rope_type: 'llama3',
      factor: 8,
      low_freq_factor: 1,
      high_freq_factor: 4,
      original_max_position_embeddings: 64,
      rope_theta: 1e5,
    },
    bos_token_id: 1,
    eos_token_id: [0, 2],
    pad_token_id: 2,
  },
];

/** config.json at the edges of what it may say, and the small JSON files beside it. */
const config: Target = {
  name: 'config',
  make(draw) {
    const json = draw.pick(configs);
    const files: Record<string, string | Uint8Array> = { ...plain, 'config.json': JSON.stringify(json) };
    if (draw.chance(0.4)) {
      const key = draw.pick(Object.keys(json));
      files['config.json'] = JSON.stringify({ ...json, [key]: Number(extreme(draw, draw.pick([1, 4, 8]))) });
    } else if (draw.chance(0.7)) files['config.json'] = mutatedJsonText(draw, json);
    if (draw.chance(0.3)) {
      files['generation_config.json'] = mutatedJsonText(draw, {
        eos_token_id: [0],
        bos_token_id: 1,
        pad_token_id: 2,
      });
    }
    if (draw.chance(0.2))
      files['special_tokens_map.json'] = mutatedJsonText(draw, { eos_token: { content: 'h' } });
    if (draw.chance(0.2)) {
      files['tokenizer_config.json'] = mutatedJsonText(
        draw,
        mutateJson(draw, directory['tokenizer_config.json'] as object),
      );
    }
    if (draw.chance(0.2)) files['adapter_config.json'] = mutatedJsonText(draw, { r: 8, peft_type: 'LORA' });
    return files;
  },
  run(input, folder) {
    writeInput(folder, input);
    return useModel(folder);
  },
};

export const modelTargets: readonly Target[] = [gguf, ggufSplit, safetensorsTarget, config];
