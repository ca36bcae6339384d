import { createRequire } from 'node:module';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { MerfError, throwIfAborted } from './errors.js';

// What the addon offers (bindings/). All arguments are checked there; failures are MerfErrors. Methods that return a
// promise run on the device's engine thread, one after another in the order of the calls, and reject rather than
// throw. Arrays are copied on the way in; the caller may change them at once.

/** Storage type of weights and activations; arithmetic accumulates in float32. */
export type NativeDType = 'f32' | 'bf16';

/** Asks the work it was given to for an end. Made by `createCancelToken`, used by `cancel`. */
export type CancelToken = { readonly __cancel: unique symbol };

export interface NativeDeviceChoice {
  name: string;
  /** 0: one for each processor that this process may run on. */
  threads: number;
  /** Times every operator, for `takeProfile`. */
  profile?: boolean | undefined;
  /** Fails with UNSUPPORTED where the device is not `exact`. */
  exact?: boolean | undefined;
}

/** All calls of one operator. */
export interface OperatorTime {
  /** A product's name has its weight's shape, outputs x inputs. */
  name: string;
  calls: number;
  seconds: number;
  /** Additions and multiplications of its products; 0 where it is bound by memory. */
  operations: number;
  /** Bytes of its operands, each counted once; 0 where `operations` says what bounds it. */
  bytes: number;
}

export interface NativeModelConfig {
  hiddenSize: number;
  layers: number;
  heads: number;
  /** Key/value heads; `heads` is a multiple of it. */
  kvHeads: number;
  /** A multiple of 8. */
  headSize: number;
  mlpSize: number;
  vocabSize: number;
  rmsNormEps: number;
  /** The id whose embedding takes no gradient where it is looked up; a tied head's gradient it has all the same. */
  paddingId?: number | undefined;
  /** The language-model head is the embedding table. */
  tiedHead: boolean;
  /** The q, k and v projections have biases. */
  attentionBias: boolean;
  /** The o projection has a bias. */
  outputBias: boolean;
  /** The gate, up and down projections have biases. */
  mlpBias: boolean;
  /** The context length, in tokens. */
  maxPositions: number;
  rope: {
    /** [headSize / 2], with any scaling in them. */
    inverseFrequencies: Float32Array;
    /** Multiplies cosine and sine. */
    attentionScale: number;
  };
  dtype: NativeDType;
}

/** Encodings of tensors that are read; ggml defines the quantised ones. */
export const weightEncodings = [
  'F32',
  'F16',
  'BF16',
  'Q8_0',
  'Q4_0',
  'Q4_1',
  'Q5_0',
  'Q5_1',
  'Q2_K',
  'Q3_K',
  'Q4_K',
  'Q5_K',
  'Q6_K',
  'IQ4_NL',
  'IQ4_XS',
] as const;

/** The place of a parameter in a file. */
export interface TensorSource {
  /** The name that Hugging Face gives it, for instance model.layers.0.self_attn.q_proj.weight. */
  name: string;
  path: string;
  /** Bytes. */
  offset: number;
  byteLength: number;
  encoding: (typeof weightEncodings)[number];
  /** Rows first. */
  shape: number[];
  /** The q or k projection of a llama GGUF, whose rows stand in another order: the number of its heads. */
  permutedHeads?: number | undefined;
}

/**
 * A packed forest of T tokens with R rows that predict a token. Key j is visible to query i exactly when
 * j <= i < visibleUntil[j]; subtrees are nested.
 */
export interface NativeBatch {
  /** [T] */
  tokens: Int32Array;
  /** [T], each token's depth in its path. */
  positions: Int32Array;
  /** [T], the end of the subtree of the token's segment. */
  visibleUntil: Int32Array;
  /** [R], the token after which `targets` is predicted. */
  sourceRows: Int32Array;
  /** [R] */
  targets: Int32Array;
}

export type NativeLossKind = 'policy_gradient_clip' | 'cispo' | 'gspo' | 'cross_entropy';

export interface NativeLossOptions {
  kind: NativeLossKind;
  clipLow: number;
  clipHigh: number;
  /** Coefficient of the k3 estimator; above 0 it needs reference log-probabilities. */
  klCoefficient: number;
  entropyCoefficient: number;
  /** Divides the logits; 0 and none: 1. */
  temperature?: number | undefined;
  /** Whether the KL term is multiplied by the ratio, which carries gradient; not for cross_entropy. */
  klRatio?: boolean | undefined;
}

/** How the losses of rows become one number. */
export interface NativeLossAggregation {
  /**
   * `token_mean`: the sum over all rows by their number. `sequence_mean`: the mean over a completion's rows, then the
   * mean over completions. `constant`: the sum by completions times `maxTokens`.
   */
  aggregation: 'token_mean' | 'sequence_mean' | 'constant';
  /** [R], which completion a row belongs to, rising from 0 by at most 1. */
  sequences: Int32Array;
  /** How many completions there are, those without rows included. */
  completions: number;
  /** For `constant`. */
  maxTokens?: number | undefined;
  /** What stands in for the number of completions and of rows; above 0. */
  normalizer?: { completions?: number | undefined; tokens?: number | undefined } | undefined;
}

/** The loss over a batch's R rows; formulas of a row's loss in native/backend/backend.h. */
export interface NativeLoss extends NativeLossOptions, NativeLossAggregation {
  /** [R], not for cross_entropy. */
  advantages?: Float32Array | undefined;
  /** [R], not for cross_entropy. NaN: the model as it is now stands in, and the ratio is 1. */
  oldLogprobs?: Float32Array | undefined;
  /** [R]. NaN: there is none, which is refused where the row's KL coefficient is above 0. */
  referenceLogprobs?: Float32Array | undefined;
  /** [R], each row's own in place of `klCoefficient`. */
  klCoefficients?: Float32Array | undefined;
  /** [R], each row's own in place of `entropyCoefficient`. */
  entropyCoefficients?: Float32Array | undefined;
}

export interface NativeLossStatistics {
  /** Rows whose weights are not all 0. */
  tokens: number;
  /**
   * Mean k3 estimate of KL(policy || reference), in nats, over the rows that have a reference and a KL weight, times
   * their ratios under `klRatio`; 0 where there are none.
   */
  kl: number;
  /**
   * Share of the ratios, by token and for gspo by completion, in whose place the clip bound stands, so that no gradient
   * flows: below with A < 0, or above with A > 0.
   */
  clipFraction: number;
  clipLowFraction: number;
  clipHighFraction: number;
  /** The importance ratio by token, for gspo by completion; 1 where the loss has none. */
  ratio: { mean: number; min: number; max: number };
  /** Mean entropy of the next-token distribution, in nats. */
  entropy: number;
}

export interface NativeSamplingOptions {
  /** 0: greedy. */
  temperature: number;
  /** 0: off. */
  topK: number;
  /** 1: off. */
  topP: number;
  /** 0: off. */
  minP: number;
  seed: bigint;
}

/** P prompts as one packed forest (as in NativeBatch) and S completions of them. */
export interface NativeSampleRequest extends NativeSamplingOptions {
  tokens: Int32Array;
  positions: Int32Array;
  visibleUntil: Int32Array;
  /** [P], the row of each prompt's last token. */
  promptRows: Int32Array;
  /** [P], completions of each prompt; their sum is S. */
  counts: Int32Array;
  /** [2 S], the words (low, high) of each completion's Philox key, in the order of the prompts. */
  keys: Uint32Array;
  /** [P], at least 1. A completion also ends where the context does. */
  maxTokens: Int32Array;
  /** One of these ends a completion and stays in it. */
  stopTokens: Int32Array;
  /** Looked for in the bytes of the tokens drawn; they need `setTokenBytes` first. The last token stays. */
  stopStrings: Uint8Array[];
  /** How many completions are decoded together at most; 0: the engine's choice. */
  maxLiveSequences: number;
  /** Bytes of activations that are kept for `forwardBackward` at most; 0 (default): none are. */
  keepBytes?: number | undefined;
}

export interface NativeSampleResult {
  /** [S + 1], where each completion begins in the following. */
  offsets: Int32Array;
  tokens: Int32Array;
  /** Under softmax(logits / temperature), 0 as 1: what `score` gives and the importance ratio uses. */
  logprobs: Float32Array;
  /** Under the distribution drawn from. */
  samplingLogprobs: Float32Array;
  /** Entropies of that distribution, in nats. */
  entropies: Float32Array;
  /** [S] 0: stop token, 1: length, 2: stop string, 3: pending, which has not ended */
  finishReasons: Uint8Array;
  /** Distinct tokens of the prompts that were computed, and those whose keys and values the session had. */
  tokensPrefilled: number;
  tokensReused: number;
}

/**
 * Hears of tokens drawn: which completions, their tokens, the tokens' log-probabilities under the distribution drawn
 * from, and as of NativeSampleResult what ended the completion with the token.
 */
export type NativeTokenListener = (
  sequences: Int32Array,
  tokens: Int32Array,
  samplingLogprobs: Float32Array,
  finishReasons: Uint8Array,
) => void;

/** `merged`, which cannot be written: the value with its adapter in it. */
export type ParameterKind = 'value' | 'gradient' | 'adam_m' | 'adam_v' | 'merged';

export interface NativeOptimizerOptions {
  learningRate: number;
  beta1: number;
  beta2: number;
  epsilon: number;
  /** Decoupled, on matrices alone. */
  weightDecay: number;
  /** Global norm that gradients are scaled down to; 0: no clipping. */
  maxGradNorm: number;
}

export interface NativeModel {
  /**
   * Names and shapes as Hugging Face has them; `decayed` are the matrices. Adapters stand among them, named
   * *.lora_A.weight and *.lora_B.weight after the products qkv_proj, o_proj, gate_up_proj and down_proj.
   */
  parameters(): { name: string; shape: number[]; decayed: boolean; adapter: boolean; trained: boolean }[];
  /** Fills every parameter but adapters; each must be given once. */
  load(sources: TensorSource[], cancel: CancelToken): Promise<void>;
  /** Matrices from a normal distribution, norms 1, biases 0. */
  initialize(seed: bigint, standardDeviation: number): Promise<void>;
  /** Row-major float32. Gradients and moments that were never made are zeros. */
  readTensor(name: string, kind: ParameterKind): Promise<Float32Array>;
  writeTensor(name: string, kind: ParameterKind, data: Float32Array): Promise<void>;
  /** Token t stands for bytes [offsets[t], offsets[t + 1]). */
  setTokenBytes(bytes: Uint8Array, offsets: Int32Array): void;
  /** [R, vocabSize] row-major; at most 2^28 numbers. */
  logits(batch: Omit<NativeBatch, 'targets'>): Promise<Float32Array>;
  /**
   * `maxTokens` is the most tokens that go through the model at once, as far as segments divide the forest (default:
   * as many as suit the device's memory); every token is computed once all the same. `temperature` (default 1) divides
   * the logits; 0 stands for 1.
   */
  score(
    batch: NativeBatch,
    cancel: CancelToken,
    maxTokens?: number,
    temperature?: number,
  ): Promise<{ logprobs: Float32Array; entropies: Float32Array }>;
  /**
   * Adds to the gradients; `maxTokens` as for `score`. Where the loss is not finite (`finite` is false) or the engine
   * rejects, all gradients are zero, those of earlier calls included.
   */
  forwardBackward(
    batch: NativeBatch,
    loss: NativeLoss,
    cancel: CancelToken,
    maxTokens?: number,
  ): Promise<NativeLossStatistics & { loss: number; finite: boolean; logprobs: Float32Array }>;
  zeroGradients(): Promise<void>;
  /** Gradients are zeroed either way; `applied` is false where their norm is not finite. */
  optimStep(options: NativeOptimizerOptions): Promise<{ gradientNorm: number; applied: boolean }>;
  /** Updates applied. */
  readonly optimizerStep: number;
  setOptimizerStep(step: number): void;
  /**
   * `onTokens` hears of every token drawn, at most once a decode step; steps that pass while the event loop is busy
   * come as one call. `endedOnly`: it hears of a completion's tokens together, once that has ended. If it throws, sampling ends and the promise rejects with its error. A cancelled call resolves
   * with what was drawn. Until a weight changes, what a call computed of keys and values is not computed again.
   */
  sample(
    request: NativeSampleRequest,
    cancel: CancelToken,
    onTokens?: NativeTokenListener,
    endedOnly?: boolean,
  ): Promise<NativeSampleResult>;
  /** Bytes of keys and values that the next `sample` may use again. */
  sessionBytes(): Promise<number>;
  /**
   * Bytes of the device's memory in use by all models on it, and the most since `resetPeakMemory`. `retries`: as
   * `memoryRetries` of a NativeBackend.
   */
  memory(): { used: number; peak: number; retries?: number };
  resetPeakMemory(): void;
  /** The times of operators since the last call, the longest first. Needs a device that was chosen with `profile`. */
  takeProfile(): OperatorTime[];
  /** Frees the model when the jobs it has are done. Every other method fails with DISPOSED from then on. */
  dispose(): void;
}

export interface NativeTensor {
  readonly shape: number[];
  readonly dtype: 'f32' | 'bf16' | 'i32';
  readonly disposed: boolean;
  read(): Promise<Float32Array | Int32Array>;
  dispose(): void;
}

export interface NativeAttention {
  q: NativeTensor;
  k: NativeTensor;
  v: NativeTensor;
  visibleUntil: Int32Array;
  scale?: number | undefined;
}

export interface NativeLossTensors extends NativeLossOptions {
  weights: NativeTensor;
  advantages?: NativeTensor | undefined;
  oldLogprobs?: NativeTensor | undefined;
  referenceLogprobs?: NativeTensor | undefined;
  sequences?: Int32Array | undefined;
  klWeights?: NativeTensor | undefined;
  entropyWeights?: NativeTensor | undefined;
}

/**
 * Kernels over tensors; lib/kernels says what they compute. A kernel that was cancelled fails with ABORTED, on the CPU
 * in its midst.
 */
export interface NativeDevice {
  readonly name: string;
  tensor(
    data: Float32Array | Int32Array | null,
    shape: number[],
    dtype: 'f32' | 'bf16' | 'i32',
  ): NativeTensor;
  attention(o: NativeAttention, cancel?: CancelToken): Promise<{ out: NativeTensor; lse: NativeTensor }>;
  attentionBackward(
    o: NativeAttention & { out: NativeTensor; lse: NativeTensor; dout: NativeTensor },
    cancel?: CancelToken,
  ): Promise<{ dq: NativeTensor; dk: NativeTensor; dv: NativeTensor }>;
  sampleTokens(
    o: NativeSamplingOptions & { logits: NativeTensor; keys: Uint32Array; positions: Int32Array },
    cancel?: CancelToken,
  ): Promise<{
    tokens: NativeTensor;
    logprobs: NativeTensor;
    samplingLogprobs: NativeTensor;
    entropies: NativeTensor;
  }>;
  groupAdvantages(
    o: {
      rewards: NativeTensor;
      groupOffsets: Int32Array;
      kind: 'group' | 'batch' | 'leave_one_out';
      scale: boolean;
      epsilon: number;
    },
    cancel?: CancelToken,
  ): Promise<NativeTensor>;
  policyLoss(
    o: NativeLossTensors & {
      logprobs: NativeTensor;
      entropies?: NativeTensor | undefined;
      statistics: boolean;
    },
    cancel?: CancelToken,
  ): Promise<{ loss: number; coefficients: NativeTensor; statistics?: NativeLossStatistics }>;
  fusedPolicyLoss(
    o: NativeLossTensors & {
      hidden: NativeTensor;
      weight: NativeTensor;
      rows: Int32Array;
      targets: Int32Array;
    },
    cancel?: CancelToken,
  ): Promise<{
    loss: number;
    logprobs: NativeTensor;
    entropies: NativeTensor;
    dhidden: NativeTensor;
    dweight: NativeTensor;
  }>;
}

export interface NativeBackend {
  name: string;
  available: boolean;
  /** Why it is not available. */
  reason?: string;
  /** Processor or card, as its maker names it. */
  description: string;
  /** The instruction set chosen at run time. */
  isa: string;
  threads: number;
  memoryBytes: number;
  /** What could be allocated now. */
  freeBytes: number;
  /**
   * How often work went on only after the memory pool had given back what it held unused, since the process began; a
   * device without such a pool has none.
   */
  memoryRetries?: number;
  /** bfloat16 products in hardware. */
  fastBf16: boolean;
  /** A token's log-probability has the same bits whatever is beside it, drawn or scored. */
  exact: boolean;
  /** Name and version of each. */
  libraries: [string, string][];
}

export interface NativeAddon {
  version: string;
  /** Names of all devices that there are, whether this machine has them or not. */
  deviceNames(): string[];
  /** Opens the device to look at it; says why where it cannot be used. */
  describeDevice(name: string): NativeBackend;
  /**
   * `training` false: no float32 masters, gradients and moments; a rank: these are had by low-rank adapters alone.
   * The memory is taken by the first method that needs it. `sessionBytes`: of keys and values that stay from one
   * `sample` to the next at most; 0: none do; default: what suits the device.
   * @throws MerfError INVALID_ARGUMENT, DEVICE_UNAVAILABLE, UNSUPPORTED
   */
  createModel(
    config: NativeModelConfig,
    device: NativeDeviceChoice,
    training: boolean | { loraRank: number; loraSeed: bigint },
    sessionBytes?: number,
  ): NativeModel;
  openDevice(device: NativeDeviceChoice): NativeDevice;
  /** [R] */
  lossWeights(o: NativeLossAggregation): Float32Array;
  createCancelToken(): CancelToken;
  cancel(token: CancelToken): void;
}

type AddonModule = NativeAddon & { useErrorClass(errorClass: typeof MerfError): void };

let loaded: AddonModule | undefined;

/**
 * The addon, loaded at the first call: build/Release/merf.node, or the prebuilt one of this platform.
 * @throws MerfError NATIVE_MISSING, which says how to build it
 */
export function native(): NativeAddon {
  if (loaded) return loaded;
  const require = createRequire(import.meta.url);
  const root = join(dirname(fileURLToPath(import.meta.url)), '..');
  // OpenMP's threads would by default spin for milliseconds at every barrier, which starves each other as soon as
  // anything else runs on the machine. The runtime reads this once, when the addon brings it in.
  if (process.env.OMP_WAIT_POLICY === undefined) process.env.GOMP_SPINCOUNT ??= '2000';
  try {
    loaded = require('node-gyp-build')(root) as AddonModule;
  } catch (cause) {
    throw new MerfError(
      'NATIVE_MISSING',
      `Could not load merf's native part for ${process.platform}-${process.arch} from ${root}. ` +
        `Build it with: npm run build. (${cause instanceof Error ? cause.message.split('\n')[0] : String(cause)})`,
      { cause },
    );
  }
  loaded.useErrorClass(MerfError);
  return loaded;
}

/**
 * A native call that ends early where the signal fires. One that has ended by then gives what it gave; one
 * whose signal fired before learns of it as it begins.
 * @throws MerfError ABORTED
 */
export async function cancellable<T>(
  what: string,
  signal: AbortSignal | undefined,
  run: (cancel: CancelToken) => Promise<T>,
): Promise<T> {
  const addon = native();
  const token = addon.createCancelToken();
  const onAbort = () => addon.cancel(token);
  if (signal?.aborted) onAbort();
  signal?.addEventListener('abort', onAbort, { once: true });
  try {
    return await run(token);
  } catch (error) {
    throwIfAborted(signal, what);
    throw error;
  } finally {
    signal?.removeEventListener('abort', onAbort);
  }
}
