import { invalidArgument, isDeviceLost, MerfError, throwIfAborted } from '../errors.js';
import {
  type CancelToken,
  type NativeModel,
  type NativeSampleResult,
  native,
  type OperatorTime,
} from '../native.js';
import type { FinishReason } from '../reward/completion.js';
import { saveAdapter } from './adapter.js';
import { checkConfig, type ModelConfig, parameterCount } from './config.js';
import { chooseDevice, type DeviceDescription, gib, parameterBytes } from './devices.js';
import { checkedTokens, type Forest, type ForestPlan, type PackedBatch, planForest } from './forest.js';
import type { TokenizerFiles } from './gguf-tokenizer.js';
import {
  checkTargets,
  type Loss,
  type LossStats,
  lossStats,
  nativeLoss,
  resolveLoss,
  sequenceWeights,
} from './loss.js';
import { openModel } from './model-files.js';
import { inverseFrequencies } from './rope.js';
import {
  type CompletionGroup,
  type Prompt,
  promptTokens,
  type SampleOptions,
  sampleRequest,
  seedOf,
} from './sampling.js';
import { defaultShardBytes, saveModel } from './save.js';
import { loadState, saveState } from './state.js';
import { TextStream, Tokenizer } from './tokenizer.js';

export interface DeviceOptions {
  /**
   * `auto` (default): the GPU, or the CPU where there is none to use or the model does not fit its free memory;
   * `policy.device.reason` says why then. Else `cpu`, `cuda`, or for tests `cuda-emulated`: CUDA's kernels on the
   * processor.
   */
  device?: string | undefined;
  /**
   * Of weights and activations; master weights, gradients and moments are always float32. `auto`: bf16 where the
   * device multiplies it in hardware and the model has at least 50 million parameters (smaller ones gain little time
   * from it and lose accuracy), else f32.
   */
  dtype?: 'auto' | 'f32' | 'bf16' | undefined;
  /** CPU threads; 0 (default): all. */
  threads?: number | undefined;
  /** false: no gradients and no optimiser state, for sampling and scoring. Default true. */
  trainable?: boolean | undefined;
  /** Trains low-rank adapters on the projections of all layers and leaves the weights as they are. */
  lora?: LoraOptions | undefined;
  /**
   * Insists that `sample`, `score` and `forwardBackward` give a token the same log-probability, bit for bit, whatever is
   * in the batch beside it, so that the importance ratio of the first update is exactly 1. It costs nothing: the CPU
   * computes in such orders anyhow, and a device that does not is refused with UNSUPPORTED. Holds between updates of one
   * policy on one machine. Default false.
   */
  exact?: boolean | undefined;
  /** Times every operator, for `takeProfile`; a call takes a little longer. Default false. */
  profile?: boolean | undefined;
  signal?: AbortSignal | undefined;
}

/**
 * y = x W^T + (x A^T) B^T with A [rank, inputs] and B [outputs, rank] (LoRA, https://arxiv.org/abs/2106.09685): gradients,
 * moments and float32 masters are those of A and B alone. Its scale is 1 (alpha equals the rank); B starts at 0. The
 * products q, k, v share an A, and so do gate and up.
 */
export interface LoraOptions {
  /** 1 to the smaller of the hidden and the MLP size; 8 to 64 are usual. */
  rank: number;
  /** Of the first values of A. Default 0. */
  seed?: number | bigint | undefined;
}

export interface CreateOptions extends DeviceOptions {
  /** Of the random weights. Default 0. */
  seed?: number | bigint | undefined;
  /** Of the matrices' normal distribution. Default 0.02. */
  standardDeviation?: number | undefined;
}

export interface OptimizerOptions {
  /** Positive, or 0 for no change. */
  learningRate: number;
  /** Default 0.9. */
  beta1?: number | undefined;
  /** Default 0.999. */
  beta2?: number | undefined;
  /** Default 1e-8. */
  epsilon?: number | undefined;
  /** Decoupled, on matrices alone. Default 0. */
  weightDecay?: number | undefined;
  /** Gradients are scaled down to this global norm; 0 (default): not clipped. */
  maxGradNorm?: number | undefined;
}

export interface SaveOptions {
  /** Of the stored weights. Default: the policy's. */
  dtype?: 'f32' | 'bf16' | undefined;
  /** Weights beyond this are divided into several files, with an index. Default 5 GB. */
  maxShardBytes?: number | undefined;
  signal?: AbortSignal | undefined;
}

export interface Scores {
  /** For each segment with a target in depth-first order: [tokens], 0 where a token is not scored. */
  logprobs: Float32Array[];
  /** Of the next-token distribution, in nats; laid out as `logprobs`. */
  entropies: Float32Array[];
}

const autoBf16Parameters = 50_000_000;
const finishReasons: readonly (FinishReason | undefined)[] = ['stop', 'length', 'stop_string'];

/**
 * A language model that samples, scores, accumulates gradients and updates itself. Calls run one after another in
 * the order they were made, off the event loop.
 *
 * Every method rejects with MerfError: DISPOSED after `dispose`, ABORTED where its signal fires, DEVICE_LOST once its
 * GPU has failed for good.
 */
export class Policy {
  readonly contextLength: number;
  readonly parameterCount: number;
  #tail: Promise<unknown> = Promise.resolve();
  #disposed = false;
  #hasTokenBytes = false;

  private constructor(
    readonly config: Readonly<ModelConfig>,
    readonly tokenizer: Tokenizer,
    readonly device: Readonly<DeviceDescription>,
    readonly dtype: 'f32' | 'bf16',
    readonly trainable: boolean,
    /** The rank of its adapters; 0 where all weights are trained, or none. */
    readonly loraRank: number,
    /** Where it was loaded from; undefined for one that was created. */
    readonly path: string | undefined,
    private readonly model: NativeModel,
    private readonly configJson: Record<string, unknown> | undefined,
  ) {
    this.contextLength = config.maxPositions;
    this.parameterCount = parameterCount(config);
  }

  /**
   * Loads a Hugging Face directory (config.json, safetensors, tokenizer.json, ...) or a .gguf file.
   * @throws MerfError FILE_NOT_FOUND, MALFORMED_FILE, UNSUPPORTED (by name), DEVICE_UNAVAILABLE, OUT_OF_MEMORY
   */
  static async load(path: string, options: DeviceOptions = {}): Promise<Policy> {
    if (typeof path !== 'string' || path === '') throw invalidArgument('path', 'a path', path);
    throwIfAborted(options.signal, 'loading a model');
    const files = await openModel(path);
    const tokenizer = new Tokenizer(files.tokenizer, path);
    checkVocabulary(tokenizer, files.config, path);
    throwIfAborted(options.signal, 'loading a model');
    const policy = Policy.#make(files.config, tokenizer, options, path, files.configJson);
    try {
      await policy.#native('loading a model', options.signal, (cancel) =>
        policy.model.load(files.sources, cancel),
      );
    } catch (error) {
      policy.dispose();
      throw policy.#explained(error);
    }
    return policy;
  }

  /**
   * A model with random weights, for training from scratch and for measurements.
   * @throws MerfError INVALID_ARGUMENT, UNSUPPORTED, DEVICE_UNAVAILABLE, OUT_OF_MEMORY
   */
  static async create(
    config: ModelConfig,
    tokenizerFiles: TokenizerFiles,
    options: CreateOptions = {},
  ): Promise<Policy> {
    checkConfig(config);
    const deviation = options.standardDeviation ?? 0.02;
    if (!(deviation >= 0 && Number.isFinite(deviation))) {
      throw invalidArgument('standardDeviation', 'a non-negative number', deviation);
    }
    const seed = seedOf(options.seed ?? 0);
    const tokenizer = new Tokenizer(tokenizerFiles, 'tokenizer');
    checkVocabulary(tokenizer, config, 'config');
    throwIfAborted(options.signal, 'creating a model');
    const policy = Policy.#make(structuredClone(config), tokenizer, options, undefined, undefined);
    try {
      await policy.model.initialize(seed, deviation);
    } catch (error) {
      policy.dispose();
      throw policy.#explained(error);
    }
    return policy;
  }

  static #make(
    config: ModelConfig,
    tokenizer: Tokenizer,
    options: DeviceOptions,
    path: string | undefined,
    configJson: Record<string, unknown> | undefined,
  ): Policy {
    const { threads = 0, trainable = true, dtype: wanted = 'auto', lora } = options;
    if (!Number.isInteger(threads) || threads < 0 || threads > 4096) {
      throw invalidArgument('threads', 'an integer from 0 to 4096', threads);
    }
    if (!['auto', 'f32', 'bf16'].includes(wanted))
      throw invalidArgument('dtype', 'auto, f32 or bf16', wanted);
    if (lora !== undefined) checkLora(lora, trainable, config);
    const large = parameterCount(config) >= autoBf16Parameters;
    const dtypeOn = ({ fastBf16 }: { fastBf16: boolean }) =>
      wanted === 'auto' ? (fastBf16 && large ? 'bf16' : 'f32') : wanted;
    const { device, reason } = chooseDevice(options.device ?? 'auto', (candidate) =>
      parameterBytes(config, { dtype: dtypeOn(candidate), trainable, lora: lora !== undefined }),
    );
    const dtype = dtypeOn(device);
    const { rope, ...sizes } = config;
    const model = native().createModel(
      {
        ...sizes,
        rope: { inverseFrequencies: inverseFrequencies(rope, config.headSize), attentionScale: 1 },
        dtype,
      },
      { name: device.name, threads, profile: options.profile ?? false, exact: options.exact ?? false },
      lora === undefined ? trainable : { loraRank: lora.rank, loraSeed: seedOf(lora.seed ?? 0) },
    );
    const { name, description, isa, memoryBytes } = device;
    const described = { name, description, isa, threads: threads || device.threads, memoryBytes, reason };
    return new Policy(
      config,
      tokenizer,
      described,
      dtype,
      trainable,
      lora?.rank ?? 0,
      path,
      model,
      configJson,
    );
  }

  // ---- the four primitives

  /**
   * Draws completions, `n` for each prompt. What prompts begin with in common is computed once.
   * @returns groups in the order of the prompts
   * @throws MerfError INVALID_ARGUMENT, CONTEXT_EXCEEDED where a prompt fills the context, UNSUPPORTED where
   *   messages are given and the model has no chat template
   */
  async sample(prompts: readonly Prompt[], options: SampleOptions = {}): Promise<CompletionGroup[]> {
    this.#check();
    if (!Array.isArray(prompts)) throw invalidArgument('prompts', 'an array', prompts);
    if (prompts.length === 0) return [];
    const limits = { vocabSize: this.config.vocabSize, contextLength: this.contextLength };
    const tokens = prompts.map((prompt, i) => promptTokens(prompt, i, this.tokenizer, limits));
    const request = sampleRequest(tokens, options, this.tokenizer, limits);
    if (!this.trainable) request.keepBytes = 0;
    const n = request.counts[0] as number;
    const onTokens = options.onToken && this.#streamer(options.onToken, n);
    const result = await this.#enqueue('sampling', options.signal, async () => {
      if (request.stopStrings.length > 0 && !this.#hasTokenBytes) {
        const { bytes, offsets } = this.tokenizer.byteTable(this.config.vocabSize);
        this.model.setTokenBytes(bytes, offsets);
        this.#hasTokenBytes = true;
      }
      return this.#native('sampling', options.signal, (cancel) =>
        this.model.sample(request, cancel, onTokens),
      );
    });
    return tokens.map((prompt, p) => ({
      promptTokens: Array.from(prompt),
      completions: Array.from({ length: n }, (_, i) => this.#completion(result, p * n + i)),
    }));
  }

  #completion(result: NativeSampleResult, sequence: number) {
    const start = result.offsets[sequence] as number;
    const end = result.offsets[sequence + 1] as number;
    const tokens = result.tokens.slice(start, end);
    const finishReason = finishReasons[result.finishReasons[sequence] as number];
    if (finishReason === undefined) throw new MerfError('ABORTED', 'sampling was aborted');
    return {
      text: this.tokenizer.decode(tokens, { skipSpecial: true }),
      tokens,
      logprobs: result.rawLogprobs.slice(start, end),
      samplingLogprobs: result.logprobs.slice(start, end),
      entropies: result.entropies.slice(start, end),
      finishReason,
    };
  }

  #streamer(onToken: NonNullable<SampleOptions['onToken']>, n: number) {
    const streams = new Map<number, TextStream>();
    return (sequences: Int32Array, tokens: Int32Array, logprobs: Float32Array) => {
      const chunks = new Map<number, { tokens: number[]; logprobs: number[] }>();
      sequences.forEach((sequence, i) => {
        const chunk = chunks.get(sequence) ?? { tokens: [], logprobs: [] };
        chunks.set(sequence, chunk);
        chunk.tokens.push(tokens[i] as number);
        chunk.logprobs.push(logprobs[i] as number);
      });
      for (const [sequence, chunk] of chunks) {
        const stream = streams.get(sequence) ?? new TextStream(this.tokenizer, { skipSpecial: true });
        streams.set(sequence, stream);
        onToken({
          prompt: Math.floor(sequence / n),
          completion: sequence % n,
          ...chunk,
          text: stream.push(chunk.tokens),
        });
      }
    };
  }

  /**
   * Log-probabilities (untempered) and entropies of the tokens of all segments with a `train` target.
   * @throws MerfError INVALID_ARGUMENT, CONTEXT_EXCEEDED
   */
  async score(
    forest: Forest,
    options: { maxTokens?: number | undefined; signal?: AbortSignal | undefined } = {},
  ): Promise<Scores> {
    this.#check();
    const plan = this.#plan(forest, options.maxTokens);
    return this.#enqueue('scoring', options.signal, () => this.#score(plan, options.signal));
  }

  async #score(plan: ForestPlan, signal: AbortSignal | undefined): Promise<Scores> {
    const scores = emptyScores(plan);
    for (const batch of plan.batches) {
      if (batch.targets.length === 0) continue;
      scatter(
        scores,
        batch,
        await this.#batch('scoring', signal, (cancel) => this.model.score(nativeBatch(batch), cancel)),
      );
    }
    return scores;
  }

  /**
   * Adds the gradient of the loss over the forest to the gradients. `maxTokens` bounds the tokens whose activations are
   * held at once, as far as segments divide it (default: so many that they take a quarter of what weights, gradients
   * and moments do, and at least 512 MiB); every token is computed once whatever it is, and the gradient does not depend
   * on it. Where a target has no `logprobs`, those of the policy as it is now stand in, which costs a forward pass more.
   *
   * An abort, a loss that is not finite or a lack of memory leaves all gradients zeroed, those of earlier calls
   * included, so that no update is made of a part of a batch.
   * @throws MerfError INVALID_ARGUMENT, CONTEXT_EXCEEDED, NON_FINITE, OUT_OF_MEMORY, which says how many tokens would
   *   have fitted, UNSUPPORTED where the policy is not trainable
   */
  async forwardBackward(
    forest: Forest,
    loss: Loss,
    options: { maxTokens?: number | undefined; signal?: AbortSignal | undefined } = {},
  ): Promise<LossStats> {
    this.#check();
    this.#requireTrainable('forwardBackward');
    const resolved = resolveLoss(loss);
    const { maxTokens = this.#heldTokens() } = options;
    const plan = this.#plan(forest, maxTokens, Number.POSITIVE_INFINITY);
    checkTargets(resolved, plan.targets);
    const weights = sequenceWeights(resolved, plan.sequenceLengths);
    const { signal } = options;
    return this.#enqueue('forwardBackward', signal, async () => {
      const needsOld = resolved.kind !== 'cross_entropy';
      const missing = needsOld && plan.targets.some(({ train }) => train.logprobs === undefined);
      const current = missing ? (await this.#score(this.#plan(forest, maxTokens), signal)).logprobs : [];
      const old = needsOld
        ? plan.targets.map(({ train }, i) => train.logprobs ?? (current[i] as Float32Array))
        : [];
      const scores = emptyScores(plan);
      let total = 0;
      try {
        const [batch] = plan.batches;
        if (batch !== undefined && batch.targets.length > 0) {
          const rows = nativeLoss(resolved, plan, batch, weights, old);
          const result = await this.#batch('forwardBackward', signal, (cancel) =>
            this.model.forwardBackward(nativeBatch(batch), rows, cancel, maxTokens),
          );
          if (!result.finite) {
            throw new MerfError(
              'NON_FINITE',
              `Expected a finite loss but it is ${result.loss}; the gradients were zeroed`,
            );
          }
          total = result.loss;
          scatter(scores, batch, result);
        }
      } catch (error) {
        if (!this.#disposed && !isDeviceLost(error)) await this.model.zeroGradients();
        throw error;
      }
      return lossStats(resolved, plan, old, { loss: total, ...scores });
    });
  }

  /**
   * Clips the gradients to `maxGradNorm`, updates by AdamW (decoupled weight decay, arXiv:1711.05101) and zeroes the
   * gradients. Where their norm is not finite nothing is updated: `applied` is false.
   */
  async optimStep(options: OptimizerOptions): Promise<{ gradientNorm: number; applied: boolean }> {
    this.#check();
    this.#requireTrainable('optimStep');
    const {
      learningRate,
      beta1 = 0.9,
      beta2 = 0.999,
      epsilon = 1e-8,
      weightDecay = 0,
      maxGradNorm = 0,
    } = options ?? {};
    const checked = { learningRate, beta1, beta2, epsilon, weightDecay, maxGradNorm };
    for (const [key, value] of Object.entries(checked)) {
      if (typeof value !== 'number' || !Number.isFinite(value) || value < 0) {
        throw invalidArgument(key, 'a non-negative number', value);
      }
    }
    if (beta1 >= 1) throw invalidArgument('beta1', 'a number below 1', beta1);
    if (beta2 >= 1) throw invalidArgument('beta2', 'a number below 1', beta2);
    return this.#enqueue('optimStep', undefined, () => this.model.optimStep(checked));
  }

  /** Throws away the gradients added so far. */
  async zeroGradients(): Promise<void> {
    this.#check();
    this.#requireTrainable('zeroGradients');
    return this.#enqueue('zeroGradients', undefined, () => this.model.zeroGradients());
  }

  /** Updates applied so far. */
  get optimizerStep(): number {
    this.#check();
    return this.model.optimizerStep;
  }

  // ---- storage

  /**
   * Writes a directory that `transformers` and `Policy.load` read: config.json, safetensors, tokenizer, generation
   * settings, chat template. Adapters are merged into the weights. Files are written beside the directory and renamed
   * into place.
   * @throws MerfError INVALID_ARGUMENT where the directory cannot be written
   */
  async save(directory: string, options: SaveOptions = {}): Promise<void> {
    this.#check();
    checkDirectory(directory);
    const { dtype = this.dtype, maxShardBytes = defaultShardBytes, signal } = options;
    if (dtype !== 'f32' && dtype !== 'bf16') throw invalidArgument('dtype', 'f32 or bf16', dtype);
    if (!(maxShardBytes > 0)) throw invalidArgument('maxShardBytes', 'a positive number', maxShardBytes);
    const { model, config, tokenizer, configJson } = this;
    await this.#enqueue('saving', signal, () =>
      saveModel(directory, { model, config, tokenizer, configJson, dtype, maxShardBytes }, signal),
    );
  }

  /**
   * Writes the adapters alone, in PEFT's layout (adapter_config.json, adapter_model.safetensors), which
   * `PeftModel.from_pretrained` puts on the model that they were trained on.
   * @throws MerfError INVALID_ARGUMENT where the directory cannot be written, UNSUPPORTED for a policy without `lora`
   */
  async saveAdapter(directory: string, options: { signal?: AbortSignal | undefined } = {}): Promise<void> {
    this.#check();
    checkDirectory(directory);
    if (this.loraRank === 0) {
      throw new MerfError('UNSUPPORTED', 'saveAdapter needs a policy that was loaded with lora');
    }
    const { model, config, path, loraRank } = this;
    await this.#enqueue('saving the adapter', options.signal, () =>
      saveAdapter(directory, { model, config, base: path, rank: loraRank }, options.signal),
    );
  }

  /**
   * Writes the float32 master weights of what is trained, AdamW's moments and its step, from which training goes on
   * bit for bit.
   */
  async saveState(directory: string, options: { signal?: AbortSignal | undefined } = {}): Promise<void> {
    this.#check();
    this.#requireTrainable('saveState');
    checkDirectory(directory);
    await this.#enqueue('saving the state', options.signal, () =>
      saveState(directory, this.model, this.#identity(), options.signal),
    );
  }

  /**
   * Reads what `saveState` wrote and throws away gradients. The files are checked whole before the policy changes.
   * @throws MerfError FILE_NOT_FOUND, MALFORMED_FILE, RESUME_MISMATCH naming what differs
   */
  async loadState(directory: string, options: { signal?: AbortSignal | undefined } = {}): Promise<void> {
    this.#check();
    this.#requireTrainable('loadState');
    checkDirectory(directory);
    await this.#enqueue('loading the state', options.signal, async () => {
      await loadState(directory, this.model, this.#identity(), options.signal);
      await this.model.zeroGradients();
    });
  }

  // ---- inspection

  /** Hugging Face names and shapes of all parameters. */
  parameters(): { name: string; shape: number[] }[] {
    this.#check();
    return this.model.parameters().map(({ name, shape }) => ({ name, shape }));
  }

  /**
   * A parameter's float32 master weight, gradient or moment, row-major; `merged` is the weight with its adapter in it.
   * @throws MerfError INVALID_ARGUMENT
   */
  async readParameter(
    name: string,
    kind: 'value' | 'gradient' | 'adam_m' | 'adam_v' | 'merged' = 'value',
  ): Promise<Float32Array> {
    this.#check();
    return this.#enqueue('readParameter', undefined, () => this.model.readTensor(name, kind));
  }

  /** Logits after each token of one sequence, [tokens, vocabSize] row-major: for tests and small uses. */
  async logits(tokens: ArrayLike<number>): Promise<Float32Array> {
    this.#check();
    const ids = checkedTokens(tokens, this.config.vocabSize, 'tokens');
    if (ids.length === 0) throw invalidArgument('tokens', 'at least one token', tokens);
    if (ids.length > this.contextLength) {
      throw new MerfError(
        'CONTEXT_EXCEEDED',
        `Expected at most ${this.contextLength} tokens but received ${ids.length}`,
      );
    }
    const rows = Int32Array.from(ids.keys());
    const visibleUntil = new Int32Array(ids.length).fill(ids.length);
    return this.#enqueue('logits', undefined, () =>
      this.model.logits({ tokens: ids, positions: rows, visibleUntil, sourceRows: rows }),
    );
  }

  /**
   * Bytes that the policy's device holds now, and the most it held since `resetPeakMemory`. `retries` is how often,
   * since the process began, work went on only after the GPU's memory pool had given back what it held unused, which
   * is slow: a number that grows says that memory is short. The CPU has none.
   */
  memory(): { used: number; peak: number; retries?: number } {
    this.#check();
    return this.model.memory();
  }

  resetPeakMemory(): void {
    this.#check();
    this.model.resetPeakMemory();
  }

  /**
   * What each operator took since the last call, the longest first: what `merf bench --profile` prints. Policies on one
   * device share its times.
   * @throws MerfError UNSUPPORTED where the policy was not loaded with `profile: true`
   */
  takeProfile(): OperatorTime[] {
    this.#check();
    return this.model.takeProfile();
  }

  /** Frees the model. What is running ends first; later calls reject with DISPOSED. */
  dispose(): void {
    if (this.#disposed) return;
    this.#disposed = true;
    this.model.dispose();
  }

  /** What a training state must have been made with. */
  #identity() {
    return this.loraRank === 0 ? this.config : { ...this.config, loraRank: this.loraRank };
  }

  // ---- how calls run

  #check(): void {
    if (this.#disposed) throw new MerfError('DISPOSED', 'The policy was disposed');
  }

  #requireTrainable(what: string): void {
    if (!this.trainable)
      throw new MerfError('UNSUPPORTED', `${what} needs a policy that was loaded with trainable: true`);
  }

  #plan(
    forest: Forest,
    maxTokens: number | undefined,
    planned = maxTokens ?? this.#batchTokens(),
  ): ForestPlan {
    if (maxTokens !== undefined && (!Number.isInteger(maxTokens) || maxTokens < 1)) {
      throw invalidArgument('maxTokens', 'a positive integer', maxTokens);
    }
    return planForest(forest, {
      vocabSize: this.config.vocabSize,
      contextLength: this.contextLength,
      maxTokens: planned,
    });
  }

  /** Tokens whose activations a backward pass can hold in what `forwardBackward` says. */
  #heldTokens(): number {
    const { layers, hiddenSize, heads, kvHeads, headSize, mlpSize } = this.config;
    const stored = 2 * (heads + kvHeads) * headSize + 2 * mlpSize;
    const bytesPerToken = layers * (8 * hiddenSize + (this.dtype === 'bf16' ? 2 : 4) * stored);
    const bytes = Math.max(2 ** 29, (this.loraRank === 0 ? 4 : 1) * this.parameterCount);
    return Math.max(256, Math.floor(Math.min(bytes, this.device.memoryBytes / 5) / bytesPerToken));
  }

  /** Tokens whose activations fit a fifth of the device's memory. */
  #batchTokens(): number {
    const { layers, hiddenSize, heads, kvHeads, headSize, mlpSize } = this.config;
    const perLayer = 6 * hiddenSize + 2 * (heads + 2 * kvHeads) * headSize + 4 * mlpSize;
    const bytesPerToken = layers * perLayer * (this.dtype === 'bf16' ? 2 : 4);
    return Math.min(32_768, Math.max(512, Math.floor(this.device.memoryBytes / 5 / bytesPerToken)));
  }

  /** Runs after all calls made before, whether they succeeded or not. */
  #enqueue<T>(what: string, signal: AbortSignal | undefined, run: () => Promise<T>): Promise<T> {
    const result = this.#tail.then(async () => {
      this.#check();
      throwIfAborted(signal, what);
      try {
        return await run();
      } catch (error) {
        throw this.#explainedLoss(error);
      }
    });
    this.#tail = result.catch(() => undefined);
    return result;
  }

  /** A native call over a batch whose size is the caller's choice. */
  async #batch<T>(
    what: string,
    signal: AbortSignal | undefined,
    run: (cancel: CancelToken) => Promise<T>,
  ): Promise<T> {
    try {
      return await this.#native(what, signal, run);
    } catch (error) {
      throw withHint(error, 'maxTokens, or batchTokens of a trainer, sets how many');
    }
  }

  /** What loading failed with, and how much memory the model takes. */
  #explained(error: unknown): unknown {
    const { config, dtype, trainable, loraRank } = this;
    const bytes = parameterBytes(config, { dtype, trainable, lora: loraRank > 0 });
    const millions = (this.parameterCount / 1e6).toFixed(1);
    const less = trainable && loraRank === 0 ? ' to train; less with lora, or with trainable: false' : '';
    return withHint(error, `${millions} million parameters take at least ${gib(bytes)}${less}`);
  }

  /** What became of the policy where its device was lost: it has nothing of its weights but there. */
  #explainedLoss(error: unknown): unknown {
    if (!isDeviceLost(error)) return error;
    const origin = this.path === undefined ? 'was created' : `was loaded from ${this.path}`;
    const message = `${error.message}: the policy, which ${origin}, is lost but for what was saved of it`;
    return new MerfError('DEVICE_LOST', message, { cause: error });
  }

  /** A native call that ends early where the signal fires. */
  async #native<T>(
    what: string,
    signal: AbortSignal | undefined,
    run: (cancel: CancelToken) => Promise<T>,
  ): Promise<T> {
    throwIfAborted(signal, what);
    const addon = native();
    const token = addon.createCancelToken();
    const onAbort = () => addon.cancel(token);
    signal?.addEventListener('abort', onAbort, { once: true });
    try {
      const result = await run(token);
      throwIfAborted(signal, what);
      return result;
    } catch (error) {
      throwIfAborted(signal, what);
      throw error;
    } finally {
      signal?.removeEventListener('abort', onAbort);
    }
  }
}

function withHint(error: unknown, hint: string): unknown {
  if (!(error instanceof MerfError) || error.code !== 'OUT_OF_MEMORY') return error;
  return new MerfError('OUT_OF_MEMORY', `${error.message} (${hint})`, { cause: error });
}

/** Every id that the tokenizer can give must have a row in the embedding table. */
function checkVocabulary(tokenizer: Tokenizer, config: ModelConfig, path: string): void {
  if (tokenizer.size > config.vocabSize) {
    throw new MerfError(
      'MALFORMED_FILE',
      `${path}: expected a tokenizer of at most ${config.vocabSize} tokens, as the model has rows, but it has ${tokenizer.size}`,
    );
  }
}

function checkLora({ rank }: LoraOptions, trainable: boolean, config: ModelConfig): void {
  if (!trainable) throw invalidArgument('lora', 'nothing where trainable is false', { rank });
  const most = Math.min(config.hiddenSize, config.mlpSize);
  if (!Number.isInteger(rank) || rank < 1 || rank > most) {
    throw invalidArgument('lora.rank', `an integer from 1 to ${most}`, rank);
  }
}

function checkDirectory(directory: string): void {
  if (typeof directory !== 'string' || directory === '')
    throw invalidArgument('directory', 'a path', directory);
}

function nativeBatch({ tokens, positions, visibleUntil, sourceRows, targets }: PackedBatch) {
  return { tokens, positions, visibleUntil, sourceRows, targets };
}

function emptyScores(plan: ForestPlan): Scores {
  const zeros = () => plan.targets.map(({ tokens }) => new Float32Array(tokens.length));
  return { logprobs: zeros(), entropies: zeros() };
}

function scatter(
  scores: Scores,
  batch: PackedBatch,
  result: { logprobs: Float32Array; entropies: Float32Array },
): void {
  for (let row = 0; row < batch.rowTarget.length; ++row) {
    const target = batch.rowTarget[row] as number;
    const token = batch.rowToken[row] as number;
    (scores.logprobs[target] as Float32Array)[token] = result.logprobs[row] as number;
    (scores.entropies[target] as Float32Array)[token] = result.entropies[row] as number;
  }
}
