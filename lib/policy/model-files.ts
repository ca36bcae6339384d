import { basename, dirname, join } from 'node:path';
import { setImmediate } from 'node:timers/promises';
import { describeValue, MerfError } from '../errors.js';
import { type TensorSource, weightEncodings } from '../native.js';
import { configFromGguf, configFromJson, type ModelConfig, parameterShapes } from './config.js';
import {
  Fields,
  fileSize,
  kindOf,
  lfsPointer,
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
  /** Every file that was read, or that weights are read from. */
  files: string[];
  config: ModelConfig;
  /** One source for every parameter of `parameterShapes(config)`. */
  sources: TensorSource[];
  tokenizer: TokenizerFiles;
  /** The config.json as it was, where the model has one. */
  configJson?: Record<string, unknown>;
}

const encodings: ReadonlySet<string> = new Set(weightEncodings);

/** A tensor of a model's files, under the name that Hugging Face or llama.cpp has for it. */
interface Located {
  path: string;
  tensor: StoredTensor;
  /** The name that the file has for it. */
  stored: string;
  permutedHeads?: number;
}

/**
 * Reads a Hugging Face directory (config.json, model.safetensors or its shards with their index, tokenizer.json and
 * what stands beside it) or a .gguf file, of which a split one may be named by any of its parts.
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
  const pointer = await lfsPointer(path);
  if (pointer !== undefined) throw pointer;
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
  const files = [configPath];
  const tokenizer = await readTokenizerFiles(directory, configJson, (path) => files.push(path));
  const located = await locateTensors(directory, (path) => files.push(path));
  const notices = await settleHead(config, located);
  const ignorable = (name: string) =>
    name.endsWith('.rotary_emb.inv_freq') || (config.tiedHead && name === 'lm_head.weight');
  const sources = matchSources(directory, config, located, (name) => name, ignorable);
  for (const { path } of sources) if (!files.includes(path)) files.push(path);
  if (notices.length > 0) tokenizer.notices = [...(tokenizer.notices ?? []), ...notices];
  return { path: directory, files, config, configJson, sources, tokenizer };
}

/**
 * The tokenizer files of a Hugging Face directory.
 * @param configJson the model's config.json, whose token ids stand in where there is no generation_config.json
 * @param onRead is told the path of each file that is there and was read
 * @throws MerfError FILE_NOT_FOUND, MALFORMED_FILE
 */
export async function readTokenizerFiles(
  directory: string,
  configJson: Record<string, unknown> = {},
  onRead?: (path: string) => void,
): Promise<TokenizerFiles> {
  const read = async (name: string) => {
    const path = join(directory, name);
    const text = await readTextIfPresent(path);
    if (text !== undefined) onRead?.(path);
    return text;
  };
  const json = async (name: string) => {
    const text = await read(name);
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
  const chatTemplate = (await read('chat_template.jinja')) ?? templateOf(config.chat_template);
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
  const named = value as ({ name?: unknown; template?: unknown } | null)[];
  const chosen = named.find((template) => template?.name === 'default') ?? named[0];
  return typeof chosen?.template === 'string' ? chosen.template : undefined;
}

/** What frameworks that wrap a model put before the names of its parameters, at any depth. */
const wrappers =
  /(?<=^|\.)(?:_orig_mod|module|_forward_module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\./g;

/** The name that `transformers` has for a tensor, whatever wrapped the model that was saved. */
function plainName(stored: string): string {
  const name = stored.replace(wrappers, '').replace(/^base_model\.model\./, '');
  // A model without its head is saved without the prefix.
  return /^(?:embed_tokens|layers|norm)\./.test(name) ? `model.${name}` : name;
}

/** The tensors of a directory under the names that `transformers` has for them. */
async function locateTensors(
  directory: string,
  onRead: (path: string) => void,
): Promise<Map<string, Located>> {
  const located = new Map<string, Located>();
  const add = (stored: string, path: string, tensor: StoredTensor) => {
    const name = plainName(stored);
    const other = located.get(name);
    if (other !== undefined) throw malformed(path, `tensors ${other.stored} and ${stored} are both ${name}`);
    located.set(name, { path, tensor, stored });
  };
  const single = join(directory, 'model.safetensors');
  const indexPath = join(directory, 'model.safetensors.index.json');
  const indexText = (await kindOf(single)) === 'file' ? undefined : await readTextIfPresent(indexPath);
  if (indexText !== undefined) {
    onRead(indexPath);
    const weightMap = parseJsonObject(indexPath, indexText).weight_map;
    if (typeof weightMap !== 'object' || weightMap === null || Array.isArray(weightMap)) {
      throw malformed(indexPath, 'expected an object of tensors and files for weight_map');
    }
    const headers = new Map<string, Map<string, StoredTensor>>();
    for (const [name, shard] of Object.entries(weightMap)) {
      if (typeof shard !== 'string' || shard !== basename(shard) || !shard.endsWith('.safetensors')) {
        throw malformed(
          indexPath,
          `expected a .safetensors file of this directory for ${name} but found ${describeValue(shard)}`,
        );
      }
      const path = join(directory, shard);
      const header = headers.get(shard) ?? (await readSafetensorsHeader(path));
      headers.set(shard, header);
      const tensor = header.get(name);
      if (tensor === undefined)
        throw malformed(path, `expected tensor ${name}, as ${indexPath} says, but there is none`);
      add(name, path, tensor);
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
    for (const [name, tensor] of await readSafetensorsHeader(single)) add(name, single, tensor);
  }
  return located;
}

const headName = 'lm_head.weight';
const embeddingName = 'model.embed_tokens.weight';

/**
 * Decides as `transformers` does whether the head is tied where config.json says so: not where the files hold a head
 * that differs from the embedding; where they hold one of the two, it is both. Returns what a user should know of it.
 */
async function settleHead(config: ModelConfig, located: Map<string, Located>): Promise<string[]> {
  const [head, embedding] = [located.get(headName), located.get(embeddingName)];
  if (!config.tiedHead || head === undefined) return [];
  if (embedding === undefined) {
    located.delete(headName);
    located.set(embeddingName, head);
    return [];
  }
  if (await sameBytes(head, embedding)) return [];
  config.tiedHead = false;
  return [
    `${head.path}: ${headName} differs from ${embeddingName}, so that the head is its own, ` +
      'although config.json says tie_word_embeddings',
  ];
}

const comparedBytes = 4 << 20;

async function sameBytes(a: Located, b: Located): Promise<boolean> {
  const { dtype, byteLength } = a.tensor;
  if (dtype !== b.tensor.dtype || byteLength !== b.tensor.byteLength) return false;
  for (let begin = 0; begin < byteLength; begin += comparedBytes) {
    const length = Math.min(comparedBytes, byteLength - begin);
    const [x, y] = await Promise.all(
      [a, b].map(({ path, tensor }) => readRange(path, tensor.offset + begin, length)),
    );
    if (Buffer.compare(x as Uint8Array, y as Uint8Array) !== 0) return false;
  }
  return true;
}

/** One source for every parameter, shapes checked; a tensor that no parameter takes means another architecture. */
function matchSources(
  path: string,
  config: ModelConfig,
  located: ReadonlyMap<string, Located>,
  storedName: (name: string) => string,
  ignorable: (name: string) => boolean,
): TensorSource[] {
  const taken = new Set<string>();
  const sources: TensorSource[] = [];
  for (const [name, shape] of parameterShapes(config)) {
    const stored = storedName(name);
    const found = located.get(stored);
    if (found === undefined) {
      const others = [...located.values()].slice(0, 3).map((other) => other.stored);
      const instead = others.length === 0 ? 'no tensors' : `tensors such as ${others.join(', ')}`;
      throw malformed(
        path,
        `expected a tensor ${stored} of shape [${shape}] but there is none, only ${instead}`,
      );
    }
    const { tensor, permutedHeads } = found;
    if (tensor.shape.length !== shape.length || tensor.shape.some((n, i) => n !== shape[i])) {
      throw malformed(
        found.path,
        `tensor ${found.stored}: expected shape [${shape}] but found [${tensor.shape}]`,
      );
    }
    if (!encodings.has(tensor.dtype)) {
      throw unsupported(
        found.path,
        `tensor ${found.stored} of type ${tensor.dtype} is not supported: expected ${[...encodings].join(', ')}`,
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
  for (const [name, { stored }] of located) {
    if (!taken.has(name) && !ignorable(name)) {
      throw unsupported(
        path,
        `tensor ${stored} has no place in a ${config.architecture} model of this configuration`,
      );
    }
  }
  return sources;
}

// ---- GGUF

/** The name of a part of a split file, as gguf-split gives it. */
const partName = /^(.*)-(\d{5})-of-(\d{5})(\.gguf)$/i;

const splitFields = ({ path, metadata }: GgufFile) => new Fields(path, (key) => metadata.get(`split.${key}`));

/** The file, or all the parts of the split one that `path` is a part of, in their order. */
async function readParts(path: string): Promise<GgufFile[]> {
  const named = await readGguf(path);
  const count = splitFields(named).integer('count', 0, 65_535, 1);
  if (count <= 1) return [named];
  const [, stem, , total, extension] = partName.exec(basename(path)) ?? [];
  if (Number(total) !== count) {
    throw malformed(
      path,
      `expected a name such as model-00001-of-${String(count).padStart(5, '0')}.gguf for one of ${count} parts of a split file`,
    );
  }
  const parts: GgufFile[] = [];
  for (let i = 0; i < count; ++i) {
    const part = join(dirname(path), `${stem}-${String(i + 1).padStart(5, '0')}-of-${total}${extension}`);
    const file = await readGguf(part);
    const split = splitFields(file);
    for (const [key, expected] of [
      ['no', i],
      ['count', count],
    ] as const) {
      const found = split.integer(key, 0, 65_535);
      if (found !== expected)
        throw malformed(part, `expected ${expected} for split.${key}, as its name says, but found ${found}`);
    }
    parts.push(file);
  }
  const found = parts.reduce((sum, { tensors }) => sum + tensors.size, 0);
  const expected = splitFields(parts[0] as GgufFile).integer('tensors.count', 0, 1 << 30, found);
  if (found !== expected)
    throw malformed(path, `expected ${expected} tensors, as split.tensors.count says, but found ${found}`);
  return parts;
}

async function openGguf(path: string): Promise<ModelFiles> {
  const parts = await readParts(path);
  const stored = new Map<string, { path: string; tensor: StoredTensor }>();
  for (const part of parts) {
    for (const [name, tensor] of part.tensors) {
      if (stored.has(name)) throw malformed(part.path, `tensor ${name} is in another part too`);
      stored.set(name, { path: part.path, tensor });
    }
  }
  // The first part has the metadata of all.
  const { path: first, metadata } = parts[0] as GgufFile;
  const tensors = new Map([...stored].map(([name, { tensor }]) => [name, tensor]));
  const file: GgufFile = { path: first, metadata, tensors };
  const config = configFromGguf(file, await ropeDivisors(stored.get('rope_freqs.weight')));
  // llama.cpp stores the rows of llama's q and k with the halves of a head interleaved, for its own rope.
  const permutedHeads = (name: string) => {
    if (config.architecture !== 'llama') return undefined;
    if (/^blk\.\d+\.attn_q\./.test(name)) return config.heads;
    return /^blk\.\d+\.attn_k\./.test(name) ? config.kvHeads : undefined;
  };
  const located = new Map<string, Located>();
  for (const [name, place] of stored) {
    const heads = permutedHeads(name);
    located.set(name, { ...place, stored: name, ...(heads === undefined ? {} : { permutedHeads: heads }) });
  }
  const sources = matchSources(path, config, located, ggufName, (name) => name === 'rope_freqs.weight');
  const files = parts.map((part) => part.path);
  await setImmediate();
  return { path, files, config, sources, tokenizer: tokenizerFromGguf(file, config.vocabSize) };
}

async function ropeDivisors(
  place: { path: string; tensor: StoredTensor } | undefined,
): Promise<Float32Array | undefined> {
  if (place === undefined) return undefined;
  const { path, tensor } = place;
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
