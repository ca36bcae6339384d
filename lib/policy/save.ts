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
  dtype: 'F32' | 'BF16',
  metadata: Record<string, string>,
  signal?: AbortSignal,
): Promise<{ bytes: number; sha256: string }> {
  const header = safetensorsHeader(
    tensors.map(({ name, shape }) => ({ name, dtype, shape })),
    metadata,
  );
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
        const cast = dtype === 'F32' ? chunk : toBfloat16(chunk);
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

/** The weights as a model without adapters has them. */
function weightTensors(model: NativeModel): TensorToWrite[] {
  return model
    .parameters()
    .filter(({ adapter }) => !adapter)
    .map(({ name, shape }) => ({ name, shape, read: () => model.readTensor(name, 'merged') }));
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
  const elementBytes = safetensorsElementBytes[stored] as number;
  const bytesOf = ({ shape }: TensorToWrite) => shape.reduce((product, n) => product * n, elementBytes);
  const shards: TensorToWrite[][] = [];
  let room = 0;
  for (const tensor of weightTensors(model)) {
    if (shards.length === 0 || bytesOf(tensor) > room) {
      shards.push([]);
      room = maxShardBytes;
    }
    shards.at(-1)?.push(tensor);
    room -= bytesOf(tensor);
  }
  if (shards.length === 1) {
    await writeSafetensors(
      join(directory, 'model.safetensors'),
      shards[0] ?? [],
      stored,
      { format: 'pt' },
      signal,
    );
    return;
  }
  const weightMap: Record<string, string> = {};
  const digits = (n: number) => String(n).padStart(5, '0');
  for (const [i, tensors] of shards.entries()) {
    const name = `model-${digits(i + 1)}-of-${digits(shards.length)}.safetensors`;
    await writeSafetensors(join(directory, name), tensors, stored, { format: 'pt' }, signal);
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
      : { ...configJson, ...('dtype' in configJson ? { dtype } : { torch_dtype: dtype }) },
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
