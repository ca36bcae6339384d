import { basename, join } from 'node:path';
import { MerfError } from '../errors.js';
import { type TensorSource, weightEncodings } from '../native.js';
import { configFromGguf, configFromJson, type ModelConfig, parameterShapes } from './config.js';
import {
  fileSize,
  kindOf,
  malformed,
  parseJsonObject,
  readRange,
  readTextIfPresent,
  unsupported,
} from './files.js';
import { type GgufFile, readGguf } from './gguf.js';
import { type TokenizerFiles, tokenizerFromGguf } from './gguf-tokenizer.js';
import { readSafetensorsHeader, type StoredTensor } from './safetensors.js';

/** A model on disk: everything but the weights themselves, which are named by file and byte range. */
export interface ModelFiles {
  path: string;
  config: ModelConfig;
  /** One source for every parameter of `parameterShapes(config)`. */
  sources: TensorSource[];
  tokenizer: TokenizerFiles;
  /** The config.json as it was, where the model has one. */
  configJson?: Record<string, unknown>;
}

const encodings: ReadonlySet<string> = new Set(weightEncodings);

/**
 * Reads a Hugging Face directory (config.json, model.safetensors or its shards with their index, tokenizer.json and
 * what stands beside it) or a .gguf file.
 * @throws MerfError FILE_NOT_FOUND, MALFORMED_FILE, UNSUPPORTED
 */
export async function openModel(path: string): Promise<ModelFiles> {
  const kind = await kindOf(path);
  if (kind === 'directory') return openDirectory(path);
  if (kind === 'absent')
    throw new MerfError('FILE_NOT_FOUND', `Expected a model at ${path} but there is nothing`);
  if (kind === 'other') throw unsupported(path, 'expected a directory or a .gguf file');
  const magic =
    (await fileSize(path)) >= 4 ? Buffer.from(await readRange(path, 0, 4)).toString('latin1') : '';
  if (magic === 'GGUF' || path.toLowerCase().endsWith('.gguf')) return openGguf(path);
  throw unsupported(path, 'expected a Hugging Face directory or a .gguf file');
}

// ---- Hugging Face directories

async function openDirectory(directory: string): Promise<ModelFiles> {
  const configPath = join(directory, 'config.json');
  const configText = await readTextIfPresent(configPath);
  if (configText === undefined) {
    throw new MerfError(
      'FILE_NOT_FOUND',
      `Expected a model in ${directory} but ${configPath} does not exist`,
    );
  }
  const configJson = parseJsonObject(configPath, configText);
  const config = configFromJson(configPath, configJson);
  const tokenizer = await readTokenizerFiles(directory, configJson);
  return {
    path: directory,
    config,
    configJson,
    sources: await directorySources(directory, config),
    tokenizer,
  };
}

/**
 * The tokenizer files of a Hugging Face directory.
 * @param configJson the model's config.json, whose token ids stand in where there is no generation_config.json
 * @throws MerfError FILE_NOT_FOUND, MALFORMED_FILE
 */
export async function readTokenizerFiles(
  directory: string,
  configJson: Record<string, unknown> = {},
): Promise<TokenizerFiles> {
  const json = async (name: string) => {
    const text = await readTextIfPresent(join(directory, name));
    return text === undefined ? undefined : parseJsonObject(join(directory, name), text);
  };
  const tokenizer = await json('tokenizer.json');
  if (tokenizer === undefined) {
    throw new MerfError(
      'FILE_NOT_FOUND',
      `Expected a tokenizer but ${join(directory, 'tokenizer.json')} does not exist`,
    );
  }
  const config = (await json('tokenizer_config.json')) ?? {};
  const generation = await json('generation_config.json');
  const specialTokensMap = await json('special_tokens_map.json');
  const chatTemplate =
    (await readTextIfPresent(join(directory, 'chat_template.jinja'))) ?? templateOf(config.chat_template);
  return {
    tokenizer,
    config: { ...specialTokensMap, ...config },
    generation: generation ?? {
      bos_token_id: configJson.bos_token_id ?? null,
      eos_token_id: configJson.eos_token_id ?? null,
      pad_token_id: configJson.pad_token_id ?? null,
    },
    ...(chatTemplate === undefined ? {} : { chatTemplate }),
    ...(specialTokensMap === undefined ? {} : { specialTokensMap }),
  };
}

/** tokenizer_config.json holds one template, or a list of named ones of which `default` is the chat's. */
function templateOf(value: unknown): string | undefined {
  if (typeof value === 'string') return value;
  if (!Array.isArray(value)) return undefined;
  const named = value as { name?: unknown; template?: unknown }[];
  const chosen = named.find(({ name }) => name === 'default') ?? named[0];
  return typeof chosen?.template === 'string' ? chosen.template : undefined;
}

async function directorySources(directory: string, config: ModelConfig): Promise<TensorSource[]> {
  const single = join(directory, 'model.safetensors');
  const indexPath = join(directory, 'model.safetensors.index.json');
  const located = new Map<string, { path: string; tensor: StoredTensor }>();
  const indexText = (await kindOf(single)) === 'file' ? undefined : await readTextIfPresent(indexPath);
  if (indexText !== undefined) {
    const weightMap = parseJsonObject(indexPath, indexText).weight_map;
    if (typeof weightMap !== 'object' || weightMap === null || Array.isArray(weightMap)) {
      throw malformed(indexPath, 'expected an object of tensors and files for weight_map');
    }
    const headers = new Map<string, Map<string, StoredTensor>>();
    for (const [name, shard] of Object.entries(weightMap)) {
      if (typeof shard !== 'string' || shard !== basename(shard) || !shard.endsWith('.safetensors')) {
        throw malformed(
          indexPath,
          `expected a .safetensors file of this directory for ${name} but found ${JSON.stringify(shard)}`,
        );
      }
      const path = join(directory, shard);
      const header = headers.get(shard) ?? (await readSafetensorsHeader(path));
      headers.set(shard, header);
      const tensor = header.get(name);
      if (tensor === undefined)
        throw malformed(path, `expected tensor ${name}, as ${indexPath} says, but there is none`);
      located.set(name, { path, tensor });
    }
  } else {
    if ((await kindOf(single)) !== 'file') {
      const hint =
        (await kindOf(join(directory, 'pytorch_model.bin'))) === 'file'
          ? ' (convert pytorch_model.bin to safetensors)'
          : '';
      throw new MerfError(
        'FILE_NOT_FOUND',
        `Expected weights in ${directory} but ${single} does not exist${hint}`,
      );
    }
    for (const [name, tensor] of await readSafetensorsHeader(single))
      located.set(name, { path: single, tensor });
  }
  const ignorable = (name: string) =>
    name.endsWith('.rotary_emb.inv_freq') || (config.tiedHead && name === 'lm_head.weight');
  return matchSources(directory, config, located, (name) => name, ignorable);
}

/** One source for every parameter, shapes checked; a tensor that no parameter takes means another architecture. */
function matchSources(
  path: string,
  config: ModelConfig,
  located: ReadonlyMap<string, { path: string; tensor: StoredTensor; permutedHeads?: number }>,
  storedName: (name: string) => string,
  ignorable: (name: string) => boolean,
): TensorSource[] {
  const taken = new Set<string>();
  const sources: TensorSource[] = [];
  for (const [name, shape] of parameterShapes(config)) {
    const stored = storedName(name);
    const found = located.get(stored);
    if (found === undefined)
      throw malformed(path, `expected a tensor ${stored} of shape [${shape}] but there is none`);
    const { tensor, permutedHeads } = found;
    if (tensor.shape.length !== shape.length || tensor.shape.some((n, i) => n !== shape[i])) {
      throw malformed(found.path, `tensor ${stored}: expected shape [${shape}] but found [${tensor.shape}]`);
    }
    if (!encodings.has(tensor.dtype)) {
      throw unsupported(
        found.path,
        `tensor ${stored} of type ${tensor.dtype} is not supported: expected ${[...encodings].join(', ')}`,
      );
    }
    taken.add(stored);
    sources.push({
      name,
      path: found.path,
      offset: tensor.offset,
      byteLength: tensor.byteLength,
      encoding: tensor.dtype as TensorSource['encoding'],
      shape,
      ...(permutedHeads === undefined ? {} : { permutedHeads }),
    });
  }
  for (const name of located.keys()) {
    if (!taken.has(name) && !ignorable(name)) {
      throw unsupported(
        path,
        `tensor ${name} has no place in a ${config.architecture} model of this configuration`,
      );
    }
  }
  return sources;
}

// ---- GGUF

async function openGguf(path: string): Promise<ModelFiles> {
  const file = await readGguf(path);
  const config = configFromGguf(file, await ropeDivisors(file));
  // llama.cpp stores the rows of llama's q and k with the halves of a head interleaved, for its own rope.
  const permutedHeads = (name: string) => {
    if (config.architecture !== 'llama') return undefined;
    if (/^blk\.\d+\.attn_q\./.test(name)) return config.heads;
    return /^blk\.\d+\.attn_k\./.test(name) ? config.kvHeads : undefined;
  };
  const located = new Map(
    [...file.tensors].map(([name, tensor]) => {
      const heads = permutedHeads(name);
      return [name, { path, tensor, ...(heads === undefined ? {} : { permutedHeads: heads }) }];
    }),
  );
  const sources = matchSources(path, config, located, ggufName, (name) => name === 'rope_freqs.weight');
  return { path, config, sources, tokenizer: tokenizerFromGguf(file, config.vocabSize) };
}

async function ropeDivisors({ path, tensors }: GgufFile): Promise<Float32Array | undefined> {
  const tensor = tensors.get('rope_freqs.weight');
  if (tensor === undefined) return undefined;
  if (tensor.dtype !== 'F32' || tensor.byteLength > 4096) {
    throw unsupported(
      path,
      `tensor rope_freqs.weight: expected up to 1024 F32 values but found ${tensor.dtype} [${tensor.shape}]`,
    );
  }
  const bytes = await readRange(path, tensor.offset, tensor.byteLength);
  return new Float32Array(bytes.buffer);
}

const ggufParts: readonly (readonly [string, string])[] = [
  ['model.embed_tokens', 'token_embd'],
  ['model.norm', 'output_norm'],
  ['lm_head', 'output'],
  ['input_layernorm', 'attn_norm'],
  ['post_attention_layernorm', 'ffn_norm'],
  ['self_attn.q_proj', 'attn_q'],
  ['self_attn.k_proj', 'attn_k'],
  ['self_attn.v_proj', 'attn_v'],
  ['self_attn.o_proj', 'attn_output'],
  ['mlp.gate_proj', 'ffn_gate'],
  ['mlp.up_proj', 'ffn_up'],
  ['mlp.down_proj', 'ffn_down'],
];

/** llama.cpp's name for a Hugging Face parameter. */
function ggufName(name: string): string {
  const prefixed = name.replace(/^model\.layers\./, 'blk.');
  const [from, to] = ggufParts.find(([part]) => prefixed.includes(part)) as readonly [string, string];
  return prefixed.replace(from, to);
}
