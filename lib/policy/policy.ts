import { setImmediate } from 'node:timers/promises';
import { invalidArgument, MerfError, throwIfAborted } from '../errors.js';
import type {
  CancelToken,
  NativeModel,
  NativeSampleResult,
  NativeTokenListener,
  OperatorTime,
} from '../native.js';
import type { FinishReason } from '../reward/completion.js';
import { saveAdapter } from './adapter.js';
import { CallQueue, cancellable, withHint } from './calls.js';
import { checkConfig, type ModelConfig, parameterCount } from './config.js';
import {
  type DeviceDescription,
  freeBytesOf,
  gib,
  type PlacedModel,
  parameterBytes,
  placeModel,
} from './devices.js';
import { checkedTokens, type Forest, type PackedForest, packForest } from './forest.js';
import type { TokenizerFiles } from './gguf-tokenizer.js';
import {
  checkTargets,
  checkTemperature,
  emptyStatistics,
  type Loss,
  type LossStats,
  nativeLoss,
  resolveLoss,
} from './loss.js';
import { openModel } from './model-files.js';
import {
  type CacheStatistics,
  type CreateOptions,
  checkDirectory,
  checkMaxTokens,
  type DeviceOptions,
  type OptimizerOptions,
  resolveOptimizer,
  type SaveOptions,
} from './options.js';
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

export interface Scores {
  /** For each segment with a target in depth-first order: [tokens], 0 where a token is not scored. */
  logprobs: Float32Array[];
  /** Entropies of the next-token distributions, in nats; laid out as `logprobs`. */
  entropies: Float32Array[];
}

const finishReasons: readonly FinishReason[] = ['stop', 'length', 'stop_string', 'pending'];

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
  readonly device: Readonly<DeviceDescription>;
  readonly dtype: 'f32' | 'bf16';
  readonly trainable: boolean;
  /** The rank of its adapters; 0 where all weights are trained, or none. */
  readonly loraRank: number;
  private readonly model: NativeModel;
  readonly #calls: CallQueue;
  /** The tokens that end a completion, which its text leaves out. */
  readonly #ends: ReadonlySet<number>;
  #hasTokenBytes = false;
  #smallest: string | undefined;
  #tokensPrefilled = 0;
  #tokensReused = 0;

  private constructor(
    readonly config: Readonly<ModelConfig>,
    readonly tokenizer: Tokenizer,
    placed: PlacedModel,
    /** Where it was loaded from; undefined for one that was created. */
    readonly path: string | undefined,
    private readonly configJson: Record<string, unknown> | undefined,
    /** The files that it was loaded from; none for one that was created. */
    readonly files: readonly string[],
  ) {
    this.model = placed.model;
    this.device = placed.device;
    this.dtype = placed.dtype;
    this.trainable = placed.trainable;
    this.loraRank = placed.loraRank;
    this.contextLength = config.maxPositions;
    this.#ends = new Set(tokenizer.eosIds);
    this.parameterCount = parameterCount(config);
    const origin = path === undefined ? 'was created' : `was loaded from ${path}`;
    this.#calls = new CallQueue(
      'The policy',
      `the policy, which ${origin}, is lost but for what was saved of it`,
    );
  }

  /**
   * Loads a Hugging Face directory (config.json, safetensors, tokenizer.json, ...) or a .gguf file, of which a split
   * one may be named by any of its parts.
   * @throws MerfError FILE_NOT_FOUND, MALFORMED_FILE, UNSUPPORTED (by name), NON_FINITE where a weight is,
   *   DEVICE_UNAVAILABLE, OUT_OF_MEMORY
   */
  static async load(path: string, options: DeviceOptions = {}): Promise<Policy> {
    if (typeof path !== 'string' || path === '') throw invalidArgument('path', 'a path', path);
    throwIfAborted(options.signal, 'loading a model');
    const files = await openModel(path);
    // A vocabulary takes the event loop a while: what waits has its turn before and after it.
    await setImmediate();
    const tokenizer = new Tokenizer(files.tokenizer, path, options);
    checkVocabulary(tokenizer, files.config, path);
    await setImmediate();
    throwIfAborted(options.signal, 'loading a model');
    const placed = placeModel(files.config, options);
    const { config, configJson } = files;
    const policy = new Policy(config, tokenizer, placed, path, configJson, files.files);
    try {
      await cancellable('loading a model', options.signal, (cancel) =>
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
    const tokenizer = new Tokenizer(tokenizerFiles, 'tokenizer', options);
    checkVocabulary(tokenizer, config, 'config');
    throwIfAborted(options.signal, 'creating a model');
    const own = structuredClone(config);
    const policy = new Policy(own, tokenizer, placeModel(own, options), undefined, undefined, []);
    try {
      await policy.model.initialize(seed, deviation);
    } catch (error) {
      policy.dispose();
      throw policy.#explained(error);
    }
    return policy;
  }

  // ---- the four primitives

  /**
   * Draws completions, `n` for each prompt. What prompts begin with in common is computed once, and what an
   * earlier call has computed is not computed again until the weights change (`DeviceOptions.sessionBytes`).
   * @returns groups in the order of the prompts
   * @throws MerfError INVALID_ARGUMENT, CONTEXT_EXCEEDED where a prompt fills the context, UNSUPPORTED where
   *   messages are given and the model has no chat template, NON_FINITE where logits are not finite
   */
  async sample(prompts: readonly Prompt[], options: SampleOptions = {}): Promise<CompletionGroup[]> {
    this.#calls.check();
    if (!Array.isArray(prompts)) throw invalidArgument('prompts', 'an array', prompts);
    if (prompts.length === 0) return [];
    const limits = { vocabSize: this.config.vocabSize, contextLength: this.contextLength };
    const tokens = prompts.map((prompt, i) => promptTokens(prompt, i, this.tokenizer, limits));
    const request = sampleRequest(tokens, options, this.tokenizer, limits);
    if (!this.trainable) request.keepBytes = 0;
    const n = request.counts[0] as number;
    const onTokens = this.#streamer(options, n);
    const result = await this.#calls.enqueue('sampling', options.signal, async () => {
      if (request.stopStrings.length > 0 && !this.#hasTokenBytes) {
        const { bytes, offsets } = this.tokenizer.byteTable(this.config.vocabSize);
        this.model.setTokenBytes(bytes, offsets);
        this.#hasTokenBytes = true;
      }
      const sampled = await cancellable('sampling', options.signal, (cancel) =>
        this.model.sample(request, cancel, onTokens, options.onToken === undefined),
      );
      // What was drawn until a signal fired is no answer.
      throwIfAborted(options.signal, 'sampling');
      return sampled;
    });
    this.#tokensPrefilled += result.tokensPrefilled;
    this.#tokensReused += result.tokensReused;
    return tokens.map((prompt, p) => ({
      promptTokens: Array.from(prompt),
      completions: Array.from({ length: n }, (_, i) => this.#completion(result, p * n + i)),
    }));
  }

  #completion(result: NativeSampleResult, sequence: number) {
    const start = result.offsets[sequence] as number;
    const end = result.offsets[sequence + 1] as number;
    const tokens = result.tokens.slice(start, end);
    const finishReason = finishReasons[result.finishReasons[sequence] as number] as FinishReason;
    if (finishReason === 'pending') throw new MerfError('ABORTED', 'sampling was aborted');
    return {
      text: this.#text(tokens, finishReason),
      tokens,
      logprobs: result.logprobs.slice(start, end),
      samplingLogprobs: result.samplingLogprobs.slice(start, end),
      entropies: result.entropies.slice(start, end),
      finishReason,
    };
  }

  /** A completion's text, without the token that ended it unless that is ordinary text. */
  #text(tokens: Int32Array, finishReason: FinishReason): string {
    const last = tokens.at(-1);
    const ended = finishReason === 'stop' && last !== undefined && this.tokenizer.isSpecial(last);
    return this.tokenizer.decode(ended ? tokens.subarray(0, -1) : tokens, { skip: this.#ends });
  }

  /** Tells the listeners of `options` of tokens; undefined where there are none. */
  #streamer({ onToken, onCompletion }: SampleOptions, n: number): NativeTokenListener | undefined {
    if (onToken === undefined && onCompletion === undefined) return undefined;
    const streams = new Map<number, TextStream>();
    const drawn = new Map<number, number[]>();
    return (sequences, tokens, samplingLogprobs, reasons) => {
      const chunks = new Map<number, { tokens: number[]; samplingLogprobs: number[] }>();
      const ended = new Map<number, FinishReason>();
      sequences.forEach((sequence, i) => {
        const chunk = chunks.get(sequence) ?? { tokens: [], samplingLogprobs: [] };
        chunks.set(sequence, chunk);
        chunk.tokens.push(tokens[i] as number);
        chunk.samplingLogprobs.push(samplingLogprobs[i] as number);
        const reason = finishReasons[reasons[i] as number] as FinishReason;
        if (reason !== 'pending') ended.set(sequence, reason);
      });
      for (const [sequence, chunk] of chunks) {
        const which = { prompt: Math.floor(sequence / n), completion: sequence % n };
        if (onToken) {
          const stream = streams.get(sequence) ?? new TextStream(this.tokenizer, { skip: this.#ends });
          streams.set(sequence, stream);
          onToken({ ...which, ...chunk, text: stream.push(chunk.tokens) });
        }
        if (!onCompletion) continue;
        const all = drawn.get(sequence) ?? [];
        drawn.set(sequence, all);
        all.push(...chunk.tokens);
        const finishReason = ended.get(sequence);
        if (finishReason === undefined) continue;
        drawn.delete(sequence);
        const completed = Int32Array.from(all);
        const text = this.#text(completed, finishReason);
        onCompletion({ ...which, text, tokens: completed, finishReason });
      }
    };
  }

  /**
   * Log-probabilities and entropies of the tokens of all segments with a `train` target, under softmax(logits /
   * `temperature`) (default 1; 0, which is greedy where tokens are drawn, stands for 1). `maxTokens` bounds the tokens
   * that are computed at once, as far as segments divide the forest (default: so many that they take a fifth of the
   * device's memory at most, from 512 to 32,768); every token is computed once whatever it is.
   * @throws MerfError INVALID_ARGUMENT, CONTEXT_EXCEEDED, NON_FINITE where logits are not finite, OUT_OF_MEMORY, which
   *   says how many tokens would have fitted
   */
  async score(
    forest: Forest,
    options: {
      maxTokens?: number | undefined;
      temperature?: number | undefined;
      signal?: AbortSignal | undefined;
    } = {},
  ): Promise<Scores> {
    this.#calls.check();
    const temperature = checkTemperature('temperature', options.temperature);
    const packed = this.#pack(forest, options.maxTokens);
    return this.#calls.enqueue('scoring', options.signal, async () => {
      if (packed.sourceRows.length === 0) {
        return { logprobs: byTarget(packed), entropies: byTarget(packed) };
      }
      const { logprobs, entropies } = await this.#batch('scoring', options.signal, (cancel) =>
        this.model.score(nativeBatch(packed), cancel, options.maxTokens, temperature),
      );
      return { logprobs: byTarget(packed, logprobs), entropies: byTarget(packed, entropies) };
    });
  }

  /**
   * Adds the gradient of the loss over the forest to the gradients. `maxTokens` bounds the tokens whose activations are
   * held at once, as far as segments divide it (default: so many that they take a quarter of what weights, gradients
   * and moments do, and at least 512 MiB); every token is computed once whatever it is, and the gradient does not depend
   * on it. Where a target has no `logprobs`, those of the policy as it is now stand in: its ratio is 1.
   *
   * A loss that is not finite (`finite` is false then), an abort or a lack of memory leaves all gradients zeroed, those
   * of earlier calls included, so that no update is made of a part of a batch. A signal that fires when all is done
   * changes nothing.
   * @throws MerfError INVALID_ARGUMENT, CONTEXT_EXCEEDED, OUT_OF_MEMORY, which says how many tokens would have fitted,
   *   UNSUPPORTED where the policy is not trainable
   */
  async forwardBackward(
    forest: Forest,
    loss: Loss,
    options: { maxTokens?: number | undefined; signal?: AbortSignal | undefined } = {},
  ): Promise<LossStats> {
    this.#calls.check();
    this.#requireTrainable('forwardBackward');
    const resolved = resolveLoss(loss);
    const packed = this.#pack(forest, options.maxTokens);
    checkTargets(resolved, packed.targets);
    const rows = nativeLoss(resolved, packed);
    // No signal for the queue: the engine has to hear of an abort in any case, since it zeroes the gradients then.
    return this.#calls.enqueue('forwardBackward', undefined, async () => {
      if (packed.sourceRows.length === 0) return { ...emptyStatistics(), logprobs: byTarget(packed) };
      const { logprobs, ...stats } = await this.#batch('forwardBackward', options.signal, (cancel) =>
        this.model.forwardBackward(nativeBatch(packed), rows, cancel, options.maxTokens),
      );
      return { ...stats, logprobs: byTarget(packed, logprobs) };
    });
  }

  /**
   * Clips the gradients to `maxGradNorm`, updates by AdamW (decoupled weight decay, arXiv:1711.05101) and zeroes the
   * gradients. Where their norm is not finite nothing is updated: `applied` is false.
   * @throws MerfError INVALID_ARGUMENT, NON_FINITE where the update left weights that are not finite, as a learning rate
   *   beyond reason does
   */
  async optimStep(options: OptimizerOptions): Promise<{ gradientNorm: number; applied: boolean }> {
    this.#calls.check();
    this.#requireTrainable('optimStep');
    const resolved = resolveOptimizer(options);
    return this.#calls.enqueue('optimStep', undefined, async () => {
      const result = await this.model.optimStep(resolved);
      if (result.applied) await this.#checkUpdated(resolved.learningRate);
      return result;
    });
  }

  /** Looks at the smallest parameter that is trained: what drives weights beyond all numbers drives all of them there. */
  async #checkUpdated(learningRate: number): Promise<void> {
    this.#smallest ??= this.model
      .parameters()
      .filter(({ trained }) => trained)
      .map(({ name, shape }) => ({ name, size: shape.reduce((product, n) => product * n, 1) }))
      .reduce((a, b) => (b.size < a.size ? b : a)).name;
    const values = await this.model.readTensor(this.#smallest, 'value');
    if (values.every(Number.isFinite)) return;
    throw new MerfError(
      'NON_FINITE',
      `The update left weights in ${this.#smallest} that are not finite: the learning rate ${learningRate} is too high`,
    );
  }

  /** Throws away the gradients added so far. */
  async zeroGradients(): Promise<void> {
    this.#calls.check();
    this.#requireTrainable('zeroGradients');
    return this.#calls.enqueue('zeroGradients', undefined, () => this.model.zeroGradients());
  }

  /** Updates applied so far. */
  get optimizerStep(): number {
    this.#calls.check();
    return this.model.optimizerStep;
  }

  // ---- storage

  /**
   * Writes a directory that `transformers` and `Policy.load` read: config.json, safetensors, tokenizer, generation
   * settings, chat template. Norms and biases that bfloat16 lacks bits of are stored as float32, so that the policy
   * computes the same when it is loaded again. Adapters are merged into the weights, where bfloat16 rounds what they
   * add. Files are written beside the directory and renamed into place.
   * @throws MerfError INVALID_ARGUMENT where the directory cannot be written
   */
  async save(directory: string, options: SaveOptions = {}): Promise<void> {
    this.#calls.check();
    checkDirectory(directory);
    const { dtype = this.dtype, maxShardBytes = defaultShardBytes, signal } = options;
    if (dtype !== 'f32' && dtype !== 'bf16') throw invalidArgument('dtype', 'f32 or bf16', dtype);
    if (!(maxShardBytes > 0)) throw invalidArgument('maxShardBytes', 'a positive number', maxShardBytes);
    const { model, config, tokenizer, configJson } = this;
    await this.#calls.enqueue('saving', signal, () =>
      saveModel(directory, { model, config, tokenizer, configJson, dtype, maxShardBytes }, signal),
    );
  }

  /**
   * Writes the adapters alone, in PEFT's layout (adapter_config.json, adapter_model.safetensors), which
   * `PeftModel.from_pretrained` puts on the model that they were trained on.
   * @throws MerfError INVALID_ARGUMENT where the directory cannot be written, UNSUPPORTED for a policy without `lora`
   */
  async saveAdapter(directory: string, options: { signal?: AbortSignal | undefined } = {}): Promise<void> {
    this.#calls.check();
    checkDirectory(directory);
    if (this.loraRank === 0) {
      throw new MerfError('UNSUPPORTED', 'saveAdapter needs a policy that was loaded with lora');
    }
    const { model, config, path, loraRank } = this;
    await this.#calls.enqueue('saving the adapter', options.signal, () =>
      saveAdapter(directory, { model, config, base: path, rank: loraRank }, options.signal),
    );
  }

  /**
   * Writes the float32 master weights of what is trained, AdamW's moments and its step, from which training goes on
   * bit for bit.
   */
  async saveState(directory: string, options: { signal?: AbortSignal | undefined } = {}): Promise<void> {
    this.#calls.check();
    this.#requireTrainable('saveState');
    checkDirectory(directory);
    await this.#calls.enqueue('saving the state', options.signal, () =>
      saveState(directory, this.model, this.#identity(), options.signal),
    );
  }

  /**
   * Reads what `saveState` wrote and throws away gradients. The files are checked whole before the policy changes.
   * @throws MerfError FILE_NOT_FOUND, MALFORMED_FILE, RESUME_MISMATCH naming what differs
   */
  async loadState(directory: string, options: { signal?: AbortSignal | undefined } = {}): Promise<void> {
    this.#calls.check();
    this.#requireTrainable('loadState');
    checkDirectory(directory);
    await this.#calls.enqueue('loading the state', options.signal, async () => {
      await loadState(directory, this.model, this.#identity(), options.signal);
      await this.model.zeroGradients();
    });
  }

  // ---- inspection

  /** Hugging Face names and shapes of all parameters. */
  parameters(): { name: string; shape: number[] }[] {
    this.#calls.check();
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
    this.#calls.check();
    return this.#calls.enqueue('readParameter', undefined, () => this.model.readTensor(name, kind));
  }

  /** Logits after each token of one sequence, [tokens, vocabSize] row-major: for tests and small uses. */
  async logits(tokens: ArrayLike<number>): Promise<Float32Array> {
    this.#calls.check();
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
    return this.#calls.enqueue('logits', undefined, () =>
      this.model.logits({ tokens: ids, positions: rows, visibleUntil, sourceRows: rows }),
    );
  }

  /**
   * Bytes that the policy's device holds now, and the most it held since `resetPeakMemory`. `retries` is how often,
   * since the process began, work went on only after the GPU's memory pool had given back what it held unused, which
   * is slow: a number that grows says that memory is short. The CPU has none.
   */
  memory(): { used: number; peak: number; retries?: number } {
    this.#calls.check();
    return this.model.memory();
  }

  /**
   * Bytes of the device's memory that are free, less what gradients and moments have yet to take. On the CPU a limit
   * on the process (cgroup) counts.
   */
  spareMemory(): number {
    const { used } = this.memory();
    const { config, dtype, trainable, loraRank } = this;
    const needed = parameterBytes(config, { dtype, trainable, lora: loraRank > 0 });
    return Math.max(0, freeBytesOf(this.device.name) - Math.max(0, needed - used));
  }

  resetPeakMemory(): void {
    this.#calls.check();
    this.model.resetPeakMemory();
  }

  /** What of prompts was computed and what was found in the session. Comes after all calls made before. */
  async cacheStatistics(): Promise<CacheStatistics> {
    return this.#calls.enqueue('cacheStatistics', undefined, async () => ({
      bytes: await this.model.sessionBytes(),
      tokensPrefilled: this.#tokensPrefilled,
      tokensReused: this.#tokensReused,
    }));
  }

  /** Counts tokens from 0 again. */
  resetCacheStatistics(): void {
    this.#tokensPrefilled = 0;
    this.#tokensReused = 0;
  }

  /**
   * What each operator took since the last call, the longest first: what `merf bench --profile` prints. Policies on one
   * device share its times.
   * @throws MerfError UNSUPPORTED where the policy was not loaded with `profile: true`
   */
  takeProfile(): OperatorTime[] {
    this.#calls.check();
    return this.model.takeProfile();
  }

  /** Frees the model. What is running ends first; later calls reject with DISPOSED. */
  dispose(): void {
    if (this.#calls.closed) return;
    this.#calls.close();
    this.model.dispose();
  }

  /** What a training state must have been made with. */
  #identity() {
    return this.loraRank === 0 ? this.config : { ...this.config, loraRank: this.loraRank };
  }

  // ---- how calls run

  #requireTrainable(what: string): void {
    if (!this.trainable)
      throw new MerfError('UNSUPPORTED', `${what} needs a policy that was loaded with trainable: true`);
  }

  #pack(forest: Forest, maxTokens: number | undefined): PackedForest {
    checkMaxTokens(maxTokens);
    return packForest(forest, { vocabSize: this.config.vocabSize, contextLength: this.contextLength });
  }

  /** A native call over a batch whose size is the caller's choice. */
  async #batch<T>(
    what: string,
    signal: AbortSignal | undefined,
    run: (cancel: CancelToken) => Promise<T>,
  ): Promise<T> {
    try {
      return await cancellable(what, signal, run);
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
}

/** Every id that the tokenizer can give must have a row in the embedding table. */
function checkVocabulary(tokenizer: Tokenizer, config: ModelConfig, path: string): void {
  // An added token that the model has no row for is never used, or refused where it is.
  if (tokenizer.mergedSize > config.vocabSize) {
    throw new MerfError(
      'MALFORMED_FILE',
      `${path}: expected a tokenizer of at most ${config.vocabSize} tokens, as the model has rows, but it has ${tokenizer.mergedSize}`,
    );
  }
}

function nativeBatch({ tokens, positions, visibleUntil, sourceRows, predicted }: PackedForest) {
  return { tokens, positions, visibleUntil, sourceRows, targets: predicted };
}

/** The values of rows by target and token; 0 where a token has no row. */
function byTarget(forest: PackedForest, rows?: Float32Array): Float32Array[] {
  const values = forest.targets.map(({ tokens }) => new Float32Array(tokens.length));
  rows?.forEach((value, row) => {
    const target = values[forest.rowTarget[row] as number] as Float32Array;
    target[forest.rowToken[row] as number] = value;
  });
  return values;
}
