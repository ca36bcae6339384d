import { describeValue, MerfError } from '../errors.js';
import type { NativeModelConfig } from '../native.js';
import { Fields, malformed, unsupported } from './files.js';
import type { GgufFile } from './gguf.js';
import { llama3FromDivisors, type RopeConfig } from './rope.js';

/** A llama or qwen2 transformer's shape, all sizes in elements. */
export interface ModelConfig extends Omit<NativeModelConfig, 'rope' | 'dtype'> {
  architecture: 'llama' | 'qwen2';
  rope: RopeConfig;
}

/** PyTorch's padding index of a table: from the end where it is negative; none where the table has no such row. */
function paddingId(index: number | undefined, vocabSize: number): { paddingId?: number } {
  const id = index === undefined || index >= 0 ? index : vocabSize + index;
  return id === undefined || id < 0 || id >= vocabSize ? {} : { paddingId: id };
}

const limits = { size: 1 << 20, heads: 1 << 14, layers: 4096, vocabulary: 1 << 24, positions: 1 << 26 };

/** What holds between a config's numbers, whichever file they came from. Returns the config. */
function checked(path: string, config: ModelConfig): ModelConfig {
  const { heads, kvHeads, headSize } = config;
  if (heads % kvHeads !== 0) {
    throw malformed(
      path,
      `expected the number of heads (${heads}) to be a multiple of the key/value heads (${kvHeads})`,
    );
  }
  if (headSize % 8 !== 0 || headSize > 512) {
    throw unsupported(path, `head size ${headSize} is not supported: expected a multiple of 8 up to 512`);
  }
  return config;
}

/**
 * Refuses a config made in code that no model can have.
 * @throws MerfError INVALID_ARGUMENT, UNSUPPORTED
 */
export function checkConfig(config: ModelConfig): ModelConfig {
  const sizes = {
    hiddenSize: limits.size,
    layers: limits.layers,
    heads: limits.heads,
    kvHeads: limits.heads,
    headSize: 512,
  };
  const all = {
    ...sizes,
    mlpSize: limits.size,
    vocabSize: limits.vocabulary,
    maxPositions: limits.positions,
  };
  for (const [key, maximum] of Object.entries(all)) {
    const value = config[key as keyof typeof all];
    if (!Number.isInteger(value) || value < 1 || value > maximum) {
      throw new MerfError(
        'INVALID_ARGUMENT',
        `Expected an integer from 1 to ${maximum} for config.${key} but received ${value}`,
      );
    }
  }
  const { paddingId: padding } = config;
  if (padding !== undefined && !(Number.isInteger(padding) && padding >= 0 && padding < config.vocabSize)) {
    throw new MerfError(
      'INVALID_ARGUMENT',
      `Expected a token id below ${config.vocabSize} for config.paddingId but received ${padding}`,
    );
  }
  if (!(config.rmsNormEps >= 0 && config.rmsNormEps < 1)) {
    throw new MerfError(
      'INVALID_ARGUMENT',
      `Expected a number from 0 to 1 for config.rmsNormEps but received ${config.rmsNormEps}`,
    );
  }
  if (config.heads % config.kvHeads !== 0) {
    throw new MerfError(
      'INVALID_ARGUMENT',
      `Expected a divisor of config.heads (${config.heads}) for config.kvHeads but received ${config.kvHeads}`,
    );
  }
  if (config.architecture !== 'llama' && config.architecture !== 'qwen2') {
    throw new MerfError(
      'UNSUPPORTED',
      `Expected llama or qwen2 for config.architecture but received ${String(config.architecture)}`,
    );
  }
  return checked('config', config);
}

/** The Hugging Face names and shapes of all parameters; a matrix is [outputs, inputs]. */
export function parameterShapes(config: ModelConfig): Map<string, number[]> {
  const { hiddenSize, heads, kvHeads, headSize, mlpSize, vocabSize } = config;
  const shapes = new Map<string, number[]>();
  const linear = (name: string, outputs: number, inputs: number, bias: boolean) => {
    shapes.set(`${name}.weight`, [outputs, inputs]);
    if (bias) shapes.set(`${name}.bias`, [outputs]);
  };
  shapes.set('model.embed_tokens.weight', [vocabSize, hiddenSize]);
  for (let layer = 0; layer < config.layers; ++layer) {
    const prefix = `model.layers.${layer}`;
    shapes.set(`${prefix}.input_layernorm.weight`, [hiddenSize]);
    linear(`${prefix}.self_attn.q_proj`, heads * headSize, hiddenSize, config.attentionBias);
    linear(`${prefix}.self_attn.k_proj`, kvHeads * headSize, hiddenSize, config.attentionBias);
    linear(`${prefix}.self_attn.v_proj`, kvHeads * headSize, hiddenSize, config.attentionBias);
    linear(`${prefix}.self_attn.o_proj`, hiddenSize, heads * headSize, config.outputBias);
    shapes.set(`${prefix}.post_attention_layernorm.weight`, [hiddenSize]);
    linear(`${prefix}.mlp.gate_proj`, mlpSize, hiddenSize, config.mlpBias);
    linear(`${prefix}.mlp.up_proj`, mlpSize, hiddenSize, config.mlpBias);
    linear(`${prefix}.mlp.down_proj`, hiddenSize, mlpSize, config.mlpBias);
  }
  shapes.set('model.norm.weight', [hiddenSize]);
  if (!config.tiedHead) shapes.set('lm_head.weight', [vocabSize, hiddenSize]);
  return shapes;
}

export function parameterCount(config: ModelConfig): number {
  let count = 0;
  for (const shape of parameterShapes(config).values()) count += shape.reduce((product, n) => product * n, 1);
  return count;
}

// ---- config.json

/**
 * A config.json of `transformers`. Whatever would change the computation and is not supported is refused by name.
 * @throws MerfError MALFORMED_FILE, UNSUPPORTED
 */
export function configFromJson(path: string, json: Record<string, unknown>): ModelConfig {
  const fields = new Fields(path, (key) => json[key]);
  const architecture = fields.string('model_type');
  if (architecture !== 'llama' && architecture !== 'qwen2') {
    throw unsupported(path, `architecture ${architecture} is not supported: expected llama or qwen2`);
  }
  refuseFeatures(fields, architecture);
  const hiddenSize = fields.integer('hidden_size', 1, limits.size);
  const heads = fields.integer('num_attention_heads', 1, limits.heads);
  if (!fields.has('head_dim') && hiddenSize % heads !== 0) {
    throw malformed(
      path,
      `expected hidden_size (${hiddenSize}) to be a multiple of num_attention_heads (${heads})`,
    );
  }
  const llamaBias = architecture === 'llama' && fields.boolean('attention_bias', false);
  const vocabSize = fields.integer('vocab_size', 1, limits.vocabulary);
  const maxPositions = fields.integer(
    'max_position_embeddings',
    1,
    limits.positions,
    architecture === 'llama' ? 2048 : 32_768,
  );
  const pad = fields.has('pad_token_id')
    ? fields.integer('pad_token_id', -limits.vocabulary, limits.vocabulary)
    : undefined;
  return checked(path, {
    architecture,
    hiddenSize,
    layers: fields.integer('num_hidden_layers', 1, limits.layers),
    heads,
    kvHeads: fields.integer('num_key_value_heads', 1, limits.heads, heads),
    headSize: fields.integer('head_dim', 1, limits.size, hiddenSize / heads),
    mlpSize: fields.integer('intermediate_size', 1, limits.size),
    vocabSize,
    ...paddingId(pad, vocabSize),
    rmsNormEps: fields.number('rms_norm_eps', 'a number from 0 to 1', (n) => n >= 0 && n < 1, 1e-6),
    tiedHead: fields.boolean('tie_word_embeddings', false),
    attentionBias: architecture === 'qwen2' || llamaBias,
    outputBias: llamaBias,
    mlpBias: architecture === 'llama' && fields.boolean('mlp_bias', false),
    maxPositions,
    rope: ropeFromJson(fields, maxPositions),
  });
}

function refuseFeatures(fields: Fields, architecture: string): void {
  const { path } = fields;
  if (fields.has('quantization_config')) {
    const method = fields.object('quantization_config')?.raw('quant_method');
    const name = typeof method === 'string' ? method : 'unnamed';
    throw unsupported(path, `quantization_config (${name}) is not supported: expected plain weights`);
  }
  const activation = fields.string('hidden_act', 'silu');
  if (activation !== 'silu' && activation !== 'swish') {
    throw unsupported(path, `hidden_act ${activation} is not supported: expected silu`);
  }
  if (fields.boolean('use_sliding_window', false)) {
    throw unsupported(path, 'use_sliding_window is not supported: expected attention over the whole context');
  }
  if (architecture === 'llama' && fields.has('sliding_window')) {
    throw unsupported(path, 'sliding_window is not supported: expected attention over the whole context');
  }
  const layerTypes = fields.raw('layer_types');
  if (Array.isArray(layerTypes)) {
    const other = layerTypes.find((type) => type !== 'full_attention');
    if (other !== undefined)
      throw unsupported(path, `layer type ${describeValue(other)} is not supported: expected full_attention`);
  }
  if (fields.number('partial_rotary_factor', 'a positive number', (n) => n > 0, 1) !== 1) {
    throw unsupported(path, 'partial_rotary_factor other than 1 is not supported');
  }
  for (const key of ['num_experts', 'num_local_experts', 'n_routed_experts']) {
    if (fields.has(key)) throw unsupported(path, `mixture of experts (${key}) is not supported`);
  }
}

/**
 * `rope_parameters` is where transformers 5 keeps what used to be `rope_theta` and `rope_scaling`. As there,
 * `rope_scaling` stands in for all of it where it says anything, the base of the frequencies included.
 */
function ropeFromJson(fields: Fields, maxPositions: number): RopeConfig {
  const { path } = fields;
  const legacy = fields.object('rope_scaling');
  const scaling = legacy?.isEmpty() === false ? legacy : fields.object('rope_parameters');
  const isTheta = (n: number) => n > 1;
  const theta = scaling?.has('rope_theta')
    ? scaling.number('rope_theta', 'a number above 1', isTheta)
    : fields.number('rope_theta', 'a number above 1', isTheta, 10_000);
  if (scaling === undefined) return { type: 'default', theta };
  for (const key of ['full_attention', 'sliding_attention']) {
    if (scaling.has(key))
      throw unsupported(path, `rope settings by type of layer (${key}) are not supported`);
  }
  if (scaling.number('partial_rotary_factor', 'a positive number', (n) => n > 0, 1) !== 1) {
    throw unsupported(path, 'partial_rotary_factor other than 1 is not supported');
  }
  const type = scaling.string('rope_type', scaling.string('type', 'default'));
  const atLeastOne = (key: string) => scaling.number(key, 'a number of at least 1', (n) => n >= 1);
  if (type === 'default') return { type, theta };
  if (type === 'linear') return { type, theta, factor: atLeastOne('factor') };
  if (type !== 'llama3')
    throw unsupported(path, `rope type ${type} is not supported: expected default, linear or llama3`);
  const original = 'original_max_position_embeddings';
  const rope = {
    type,
    theta,
    factor: atLeastOne('factor'),
    lowFrequencyFactor: scaling.number('low_freq_factor', 'a positive number', (n) => n > 0),
    highFrequencyFactor: scaling.number('high_freq_factor', 'a positive number', (n) => n > 0),
    originalMaxPositions: fields.has(original)
      ? fields.integer(original, 1, limits.positions)
      : scaling.integer(original, 1, limits.positions, maxPositions),
  } as const;
  if (rope.highFrequencyFactor <= rope.lowFrequencyFactor) {
    throw malformed(
      path,
      `expected high_freq_factor (${rope.highFrequencyFactor}) above low_freq_factor (${rope.lowFrequencyFactor})`,
    );
  }
  return rope;
}

/** The config.json that `transformers` reads for this model; `dtype` is that of the weights beside it. */
export function configToJson(
  config: ModelConfig,
  dtype: 'float32' | 'bfloat16',
  tokens: { bos?: number | undefined; eos: readonly number[] },
): Record<string, unknown> {
  const { rope } = config;
  const scaling =
    rope.type === 'default'
      ? null
      : rope.type === 'linear'
        ? { rope_type: 'linear', factor: rope.factor }
        : {
            rope_type: 'llama3',
            factor: rope.factor,
            low_freq_factor: rope.lowFrequencyFactor,
            high_freq_factor: rope.highFrequencyFactor,
            original_max_position_embeddings: rope.originalMaxPositions,
          };
  return {
    architectures: [config.architecture === 'llama' ? 'LlamaForCausalLM' : 'Qwen2ForCausalLM'],
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
    ...(config.architecture === 'llama'
      ? { attention_bias: config.attentionBias, mlp_bias: config.mlpBias }
      : {}),
    max_position_embeddings: config.maxPositions,
    rope_theta: rope.theta,
    rope_scaling: scaling,
    attention_dropout: 0,
    initializer_range: 0.02,
    use_cache: true,
    bos_token_id: tokens.bos ?? null,
    eos_token_id: tokens.eos.length === 1 ? tokens.eos[0] : tokens.eos.length === 0 ? null : tokens.eos,
    // Beside its use in batches it says which embedding is not trained; the tokenizer's files have the pad token itself.
    pad_token_id: config.paddingId ?? null,
    torch_dtype: dtype,
  };
}

// ---- GGUF

/**
 * @param ropeDivisors the values of the tensor `rope_freqs.weight`, where the file has one
 * @throws MerfError MALFORMED_FILE, UNSUPPORTED
 */
export function configFromGguf(file: GgufFile, ropeDivisors: Float32Array | undefined): ModelConfig {
  const { path, metadata, tensors } = file;
  const all = new Fields(path, (key) => metadata.get(key));
  const architecture = all.string('general.architecture');
  if (architecture !== 'llama' && architecture !== 'qwen2') {
    throw unsupported(path, `architecture ${architecture} is not supported: expected llama or qwen2`);
  }
  const fields = new Fields(path, (key) => metadata.get(`${architecture}.${key}`));
  if (fields.integer('expert_count', 0, limits.size, 0) > 0) {
    throw unsupported(path, `mixture of experts (${architecture}.expert_count) is not supported`);
  }
  if (fields.integer('attention.sliding_window', 0, limits.positions, 0) > 0) {
    throw unsupported(
      path,
      `${architecture}.attention.sliding_window is not supported: expected attention over the whole context`,
    );
  }
  // What llama.cpp would compute with, beside what Hugging Face's models have.
  for (const [key, plain] of [
    ['attention.scale', 0],
    ['embedding_scale', 0],
    ['residual_scale', 0],
    ['logit_scale', 0],
    ['rope.scaling.attn_factor', 1],
  ] as const) {
    const value = fields.number(key, 'a number', () => true, plain);
    if (value !== plain && value !== 1)
      throw unsupported(path, `${architecture}.${key} of ${value} is not supported`);
  }
  const hiddenSize = fields.integer('embedding_length', 1, limits.size);
  const heads = fields.integer('attention.head_count', 1, limits.heads);
  if (!fields.has('attention.key_length') && hiddenSize % heads !== 0) {
    throw malformed(
      path,
      `expected the embedding length (${hiddenSize}) to be a multiple of the head count (${heads})`,
    );
  }
  const headSize = fields.integer('attention.key_length', 1, limits.size, hiddenSize / heads);
  const valueSize = fields.integer('attention.value_length', 1, limits.size, headSize);
  const rotated = fields.integer('rope.dimension_count', 1, limits.size, headSize);
  if (valueSize !== headSize)
    throw unsupported(path, `values of head size ${valueSize} beside keys of ${headSize} are not supported`);
  if (rotated !== headSize)
    throw unsupported(path, `rope over ${rotated} of ${headSize} components is not supported`);
  // Hugging Face's llama has all attention biases or none; its qwen2 has those of q, k and v.
  const llamaBias = architecture === 'llama' && tensors.has('blk.0.attn_q.bias');
  const embedding = tensors.get('token_embd.weight');
  if (embedding === undefined) throw malformed(path, 'expected a tensor token_embd.weight but there is none');
  const vocabSize = embedding.shape[0] as number;
  const pad = all.has('tokenizer.ggml.padding_token_id')
    ? all.integer('tokenizer.ggml.padding_token_id', 0, limits.vocabulary)
    : undefined;
  return checked(path, {
    architecture,
    hiddenSize,
    layers: fields.integer('block_count', 1, limits.layers),
    heads,
    kvHeads: fields.integer('attention.head_count_kv', 1, limits.heads, heads),
    headSize,
    mlpSize: fields.integer('feed_forward_length', 1, limits.size),
    vocabSize,
    ...paddingId(pad, vocabSize),
    rmsNormEps: Number(
      fields
        .number('attention.layer_norm_rms_epsilon', 'a number from 0 to 1', (n) => n >= 0 && n < 1)
        .toPrecision(7),
    ),
    tiedHead: !tensors.has('output.weight'),
    attentionBias: architecture === 'qwen2' || llamaBias,
    outputBias: llamaBias,
    mlpBias: architecture === 'llama' && tensors.has('blk.0.ffn_gate.bias'),
    maxPositions: fields.integer('context_length', 1, limits.positions),
    rope: ropeFromGguf(path, architecture, fields, headSize, ropeDivisors),
  });
}

function ropeFromGguf(
  path: string,
  architecture: string,
  fields: Fields,
  headSize: number,
  divisors: Float32Array | undefined,
): RopeConfig {
  const theta = fields.number('rope.freq_base', 'a number above 1', (n) => n > 1, 10_000);
  // As in llama.cpp: a factor without a type is linear, and the key of files before August 2023 stands in for it.
  const type = fields.string('rope.scaling.type', 'linear');
  if (type !== 'none' && type !== 'linear') {
    throw unsupported(
      path,
      `${architecture}.rope.scaling.type ${type} is not supported: expected none or linear`,
    );
  }
  const key = fields.has('rope.scaling.factor') ? 'rope.scaling.factor' : 'rope.scale_linear';
  const stored = fields.number(key, 'a number of at least 1, or 0 for none', (n) => n === 0 || n >= 1, 0);
  const factor = type === 'none' || stored === 0 ? 1 : stored;
  if (divisors?.some((divisor) => divisor !== 1)) {
    if (divisors.length !== headSize / 2) {
      throw malformed(
        path,
        `tensor rope_freqs.weight: expected ${headSize / 2} values but found ${divisors.length}`,
      );
    }
    const rope = llama3FromDivisors(theta, divisors);
    if (rope === undefined)
      throw unsupported(path, 'rope_freqs.weight holds a scaling other than that of Llama 3.1 and later');
    if (factor !== 1)
      throw unsupported(path, `${architecture}.${key} ${factor} beside rope_freqs.weight is not supported`);
    return rope;
  }
  return factor === 1 ? { type: 'default', theta } : { type: 'linear', theta, factor };
}
