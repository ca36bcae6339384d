// What is measured: random weights of a known model's shape, on prompts of arbitrary tokens.
import { defaultModel, MerfError, type ModelConfig, openModel, Policy } from 'merf';

export interface Sizes {
  prompts: number;
  /** Tokens of each prompt. */
  promptTokens: number;
  /** Completions of each prompt. */
  group: number;
  /** Tokens of each completion. */
  completionTokens: number;
}

export interface Workload {
  /** Whose shape it is. */
  title: string;
  config: ModelConfig;
  /** The model whose shape it is; undefined: SmolLM2-135M's. */
  model: string | undefined;
  sizes: Sizes;
}

export type Dtype = 'f32' | 'bf16';

export const smollm2: ModelConfig = {
  architecture: 'llama',
  hiddenSize: 576,
  layers: 30,
  heads: 9,
  kvHeads: 3,
  headSize: 64,
  mlpSize: 1536,
  vocabSize: 49_152,
  rmsNormEps: 1e-5,
  tiedHead: true,
  attentionBias: false,
  outputBias: false,
  mlpBias: false,
  maxPositions: 8192,
  rope: { type: 'default', theta: 100_000 },
};

export const grpoSizes: Sizes = { prompts: 4, promptTokens: 256, group: 8, completionTokens: 64 };

/** @throws MerfError where the model's context is shorter than a sequence of the workload, or as `openModel` does */
export async function workloadOf(model: string | undefined, sizes: Sizes): Promise<Workload> {
  const config = model === undefined ? smollm2 : (await openModel(model)).config;
  const tokens = sizes.promptTokens + sizes.completionTokens;
  if (tokens > config.maxPositions) {
    throw new MerfError(
      'CONTEXT_EXCEEDED',
      `Expected a prompt and its completion of at most ${config.maxPositions} tokens, the model's context, but received ${tokens}`,
    );
  }
  return { title: model ?? 'SmolLM2-135M', config, model, sizes };
}

/**
 * PROMPTSxTOKENSxGROUPxTOKENS, for instance 4x256x8x64.
 * @throws MerfError INVALID_ARGUMENT
 */
export function parseSizes(text: string): Sizes {
  const numbers = /^\d+(x\d+){3}$/.test(text) ? text.split('x').map(Number) : [];
  if (numbers.length === 0 || numbers.some((n) => n < 1)) {
    throw new MerfError(
      'INVALID_ARGUMENT',
      `Expected PROMPTSxTOKENSxGROUPxTOKENS, such as 4x256x8x64, for --sizes but received ${text}`,
    );
  }
  const [prompts, promptTokens, group, completionTokens] = numbers as [number, number, number, number];
  return { prompts, promptTokens, group, completionTokens };
}

/** Token ids of each prompt, after `common` tokens that are the same in all. */
export function promptsOf({ config: { vocabSize }, sizes }: Workload, common = 0): number[][] {
  const ids = (count: number, first: number) =>
    Array.from({ length: count }, (_, i) => ((first + i) * 7919) % vocabSize);
  return Array.from({ length: sizes.prompts }, (_, p) => [
    ...ids(common, 0),
    ...ids(sizes.promptTokens, 10_000 * (p + 1)),
  ]);
}

/** A policy of random weights and no end tokens, so that every completion has all its tokens. */
export async function randomPolicy(
  { config, model }: Pick<Workload, 'config' | 'model'>,
  options: { dtype: Dtype; threads: number; profile?: boolean; trainable?: boolean; sessionBytes?: number },
): Promise<Policy> {
  const { tokenizer } = await openModel(model ?? defaultModel());
  const endless = {
    tokenizer: tokenizer.tokenizer,
    config: { ...tokenizer.config, eos_token: null },
    generation: {},
  };
  return Policy.create(config, endless, { device: 'cpu', seed: 1, ...options });
}
