import { createHash, type Hash } from 'node:crypto';
import { open, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { writeFolderAtomically } from '../atomic-files.js';
import { throwIfAborted } from '../errors.js';
import type { NativeModel } from '../native.js';
import { configToJson, type ModelConfig } from './config.js';
import { safetensorsElementBytes, safetensorsHeader } from './safetensors.js';
import type { Tokenizer } from './tokenizer.js';

/** Elements cast and written at once, so that the event loop is never held for long. */
const chunkElements = 1 << 20;

/** Bytes of a shard at most; transformers divides weights at the same size. */
export const defaultShardBytes = 5_000_000_000;

export interface TensorToWrite {
  name: string;
  shape: readonly number[];
  dtype: 'F32' | 'BF16';
  read: () => Promise<Float32Array>;
}

/** Bits of bfloat16, rounded to nearest even; NaN stays NaN. */
export function toBfloat16(values: Float32Array): Uint16Array {
  const bits = new Uint32Array(values.buffer, values.byteOffset, values.length);
  const out = new Uint16Array(values.length);
  for (let i = 0; i < out.length; ++i) {
    const word = bits[i] as number;
    const notANumber = (word & 0x7fffffff) > 0x7f800000;
    out[i] = notANumber ? (word >>> 16) | 0x40 : (word + 0x7fff + ((word >>> 16) & 1)) >>> 16;
  }
  return out;
}

/** Writes the tensors one after another, holding one of them in memory. Returns the file's size and digest. */
export async function writeSafetensors(
  path: string,
  tensors: readonly TensorToWrite[],
  metadata: Record<string, string>,
  signal?: AbortSignal,
): Promise<{ bytes: number; sha256: string }> {
  const header = safetensorsHeader(tensors, metadata);
  const file = await open(path, 'wx');
  const hash: Hash = createHash('sha256');
  const write = async (bytes: Uint8Array) => {
    hash.update(bytes);
    for (let done = 0; done < bytes.length; ) done += (await file.write(bytes, done)).bytesWritten;
  };
  try {
    await write(header.bytes);
    for (const tensor of tensors) {
      throwIfAborted(signal, `writing ${path}`);
      const values = await tensor.read();
      for (let start = 0; start < values.length; start += chunkElements) {
        const chunk = values.subarray(start, start + chunkElements);
        const cast = tensor.dtype === 'F32' ? chunk : toBfloat16(chunk);
        await write(new Uint8Array(cast.buffer, cast.byteOffset, cast.byteLength));
      }
    }
  } finally {
    await file.close();
  }
  return { bytes: header.bytes.length + header.dataBytes, sha256: hash.digest('hex') };
}

export async function writeJson(path: string, value: unknown): Promise<void> {
  await writeFile(path, `${JSON.stringify(value, null, 2)}\n`);
}

/**
 * The weights as a model without adapters has them. Products read matrices in the policy's dtype, but norms and biases
 * are float32 whatever that is: where bfloat16 lacks bits of theirs they are stored as float32, so that a model that is
 * loaded again computes what this one does.
 */
async function weightTensors(model: NativeModel, dtype: 'F32' | 'BF16'): Promise<TensorToWrite[]> {
  const tensors: TensorToWrite[] = [];
  for (const { name, shape, adapter } of model.parameters()) {
    if (adapter) continue;
    const read = () => model.readTensor(name, 'merged');
    if (dtype === 'F32' || shape.length > 1) {
      tensors.push({ name, shape, dtype, read });
      continue;
    }
    const values = await read();
    tensors.push({ name, shape, dtype: isBfloat16(values) ? dtype : 'F32', read: async () => values });
  }
  return tensors;
}

/** Whether bfloat16 has all the values. */
function isBfloat16(values: Float32Array): boolean {
  const bits = new Uint32Array(values.buffer, values.byteOffset, values.length);
  return bits.every((word) => (word & 0xffff) === 0);
}

export interface SaveContents {
  model: NativeModel;
  config: ModelConfig;
  tokenizer: Tokenizer;
  /** The config.json that the model came with. */
  configJson: Record<string, unknown> | undefined;
  dtype: 'f32' | 'bf16';
  /** The most bytes of weights in one file, as far as tensors allow. */
  maxShardBytes: number;
}

/** A directory that `transformers` loads: weights, configuration, tokenizer, generation settings, chat template. */
export async function saveModel(
  directory: string,
  contents: SaveContents,
  signal?: AbortSignal,
): Promise<void> {
  const isWeights = (name: string) => /^model(-\d+-of-\d+)?\.safetensors(\.index\.json)?$/.test(name);
  await writeFolderAtomically(
    directory,
    async (beside) => {
      await writeWeights(beside, contents, signal);
      await writeDescription(beside, contents);
    },
    (name) => !isWeights(name),
  );
}

async function writeWeights(
  directory: string,
  { model, dtype, maxShardBytes }: SaveContents,
  signal?: AbortSignal,
): Promise<void> {
  const stored = dtype === 'f32' ? 'F32' : 'BF16';
  const bytesOf = (tensor: TensorToWrite) =>
    tensor.shape.reduce((product, n) => product * n, safetensorsElementBytes[tensor.dtype] as number);
  const shards: TensorToWrite[][] = [];
  let room = 0;
  for (const tensor of await weightTensors(model, stored)) {
    if (shards.length === 0 || bytesOf(tensor) > room) {
      shards.push([]);
      room = maxShardBytes;
    }
    shards.at(-1)?.push(tensor);
    room -= bytesOf(tensor);
  }
  if (shards.length === 1) {
    await writeSafetensors(join(directory, 'model.safetensors'), shards[0] ?? [], { format: 'pt' }, signal);
    return;
  }
  const weightMap: Record<string, string> = {};
  const digits = (n: number) => String(n).padStart(5, '0');
  for (const [i, tensors] of shards.entries()) {
    const name = `model-${digits(i + 1)}-of-${digits(shards.length)}.safetensors`;
    await writeSafetensors(join(directory, name), tensors, { format: 'pt' }, signal);
    for (const tensor of tensors) weightMap[tensor.name] = name;
  }
  const total = shards.flat().reduce((sum, tensor) => sum + bytesOf(tensor), 0);
  await writeJson(join(directory, 'model.safetensors.index.json'), {
    metadata: { total_size: total },
    weight_map: weightMap,
  });
}

async function writeDescription(directory: string, contents: SaveContents): Promise<void> {
  const { config, tokenizer, configJson } = contents;
  const dtype = contents.dtype === 'f32' ? 'float32' : 'bfloat16';
  const { files } = tokenizer;
  await writeJson(
    join(directory, 'config.json'),
    configJson === undefined
      ? configToJson(config, dtype, { bos: tokenizer.bosId, eos: tokenizer.eosIds })
      : {
          ...configJson,
          tie_word_embeddings: config.tiedHead,
          ...('dtype' in configJson ? { dtype } : { torch_dtype: dtype }),
        },
  );
  await writeFile(join(directory, 'tokenizer.json'), JSON.stringify(files.tokenizer));
  const template = files.chatTemplate === undefined ? {} : { chat_template: files.chatTemplate };
  await writeJson(join(directory, 'tokenizer_config.json'), { ...template, ...files.config });
  if (files.chatTemplate !== undefined)
    await writeFile(join(directory, 'chat_template.jinja'), files.chatTemplate);
  if (files.generation !== undefined)
    await writeJson(join(directory, 'generation_config.json'), files.generation);
  if (files.specialTokensMap !== undefined) {
    await writeJson(join(directory, 'special_tokens_map.json'), files.specialTokensMap);
  }
}
