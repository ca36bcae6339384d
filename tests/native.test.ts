import { spawnSync } from 'node:child_process';
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join, resolve } from 'node:path';
import { afterAll, beforeAll, describe, expect, test } from '@jest/globals';
import { MerfError } from '../lib/errors.js';
import {
  type NativeBatch,
  type NativeLoss,
  type NativeModel,
  type NativeModelConfig,
  type NativeSampleRequest,
  native,
} from '../lib/native.js';
import { batch, config, loss, optimizer, request } from './bindings/tiny-model.js';

const cpu = { name: 'cpu', threads: 0 };

/** The error that a call throws or rejects with. */
async function failure(call: () => unknown): Promise<MerfError> {
  try {
    await call();
  } catch (error) {
    expect(error).toBeInstanceOf(MerfError);
    return error as MerfError;
  }
  throw new Error('It did not fail');
}

async function makeModel(changes: Partial<NativeModelConfig> = {}, trainable = true): Promise<NativeModel> {
  const model = native().createModel({ ...config, ...changes }, cpu, trainable);
  await model.initialize(1n, 0.3);
  return model;
}

const token = () => native().createCancelToken();

describe('what the addon says of itself', () => {
  test('its version and devices', () => {
    expect(native().version).toMatch(/^\d+\.\d+\.\d+$/);
    expect(native().deviceNames()).toEqual(['cpu', 'cuda', 'cuda-emulated']);
    const cpu = native().describeDevice('cpu');
    expect(cpu).toMatchObject({ name: 'cpu', available: true });
    expect(cpu.threads).toBeGreaterThan(0);
    expect(cpu.memoryBytes).toBeGreaterThan(1e8);
    expect(cpu.freeBytes).toBeGreaterThan(0);
    expect(cpu.freeBytes).toBeLessThanOrEqual(cpu.memoryBytes);
    const none = native().describeDevice('abacus');
    expect(none).toMatchObject({ name: 'abacus', available: false, memoryBytes: 0 });
    expect(none.reason).toMatch(/cpu, cuda, cuda-emulated.*abacus/);
  });

  test('a device that does not exist is refused', async () => {
    const error = await failure(() => native().createModel(config, { name: 'abacus', threads: 0 }, true));
    expect(error.code).toBe('DEVICE_UNAVAILABLE');
    expect(error.message).toContain('abacus');
  });
});

describe('a model', () => {
  let model: NativeModel;
  beforeAll(async () => {
    model = await makeModel();
  });
  afterAll(() => model.dispose());

  test('names its parameters as Hugging Face does', () => {
    const parameters = model.parameters();
    expect(parameters).toHaveLength(1 + 2 * 12 + 1);
    expect(parameters).toContainEqual({
      name: 'model.layers.1.self_attn.k_proj.weight',
      shape: [16, 32],
      decayed: true,
      trained: true,
      adapter: false,
    });
    expect(parameters).toContainEqual({
      name: 'model.layers.0.self_attn.v_proj.bias',
      shape: [16],
      decayed: false,
      trained: true,
      adapter: false,
    });
  });

  test('what is written into one parameter is read back, and its fused neighbours stay', async () => {
    const q = 'model.layers.0.self_attn.q_proj.weight';
    const k = 'model.layers.0.self_attn.k_proj.weight';
    const other = await makeModel();
    const before = await other.readTensor(q, 'value');
    const values = Float32Array.from({ length: 16 * 32 }, (_, i) => i / 7);
    await other.writeTensor(k, 'value', values);
    expect(Array.from(await other.readTensor(k, 'value'))).toEqual(Array.from(values));
    expect(Array.from(await other.readTensor(q, 'value'))).toEqual(Array.from(before));
    other.dispose();
  });

  test('log-probabilities are those of the logits', async () => {
    const { targets: _, ...rows } = batch;
    const logits = await model.logits(rows);
    const { logprobs, entropies } = await model.score(batch, token());
    expect(logits).toHaveLength(4 * 40);
    for (let r = 0; r < 4; ++r) {
      const row = Array.from(logits.slice(r * 40, r * 40 + 40));
      const logSum = Math.log(row.reduce((sum, x) => sum + Math.exp(x), 0));
      expect(logprobs[r]).toBeCloseTo((row[batch.targets[r] as number] as number) - logSum, 4);
      expect(entropies[r]).toBeCloseTo(
        -row.reduce((sum, x) => sum + Math.exp(x - logSum) * (x - logSum), 0),
        4,
      );
    }
  });

  test('learns', async () => {
    const other = await makeModel();
    const entropy: NativeLoss = { ...loss, kind: 'cross_entropy' };
    const first = await other.forwardBackward(batch, entropy, token());
    expect(first.finite).toBe(true);
    const { gradientNorm, applied } = await other.optimStep(optimizer);
    expect(gradientNorm).toBeGreaterThan(0);
    expect(applied).toBe(true);
    for (let i = 0; i < 20; ++i) {
      await other.forwardBackward(batch, entropy, token());
      await other.optimStep({ ...optimizer, learningRate: 0.01 });
    }
    const last = await other.forwardBackward(batch, entropy, token());
    expect(last.loss).toBeLessThan(first.loss / 2);
    expect(other.optimizerStep).toBe(21);
    other.setOptimizerStep(3);
    expect(other.optimizerStep).toBe(3);
    other.dispose();
  });

  test('a loss that is not finite leaves no gradients', async () => {
    const other = await makeModel();
    await other.forwardBackward(batch, loss, token());
    const name = 'model.embed_tokens.weight';
    const exploding = {
      ...loss,
      klCoefficient: 1,
      referenceLogprobs: Float32Array.of(-3, -3, 1000, -3),
    };
    expect(await other.forwardBackward(batch, exploding, token())).toMatchObject({ finite: false });
    expect((await other.readTensor(name, 'gradient')).every((value) => value === 0)).toBe(true);
    other.dispose();
  });

  test('samples what it scores, and streams it', async () => {
    const heard = new Map<number, number[]>();
    const result = await model.sample(request, token(), (sequences, tokens, logprobs, reasons) => {
      expect(tokens).toHaveLength(sequences.length);
      expect(logprobs).toHaveLength(sequences.length);
      expect(reasons).toHaveLength(sequences.length);
      sequences.forEach((s, i) => {
        heard.set(s, [...(heard.get(s) ?? []), tokens[i] as number]);
      });
    });
    expect(Array.from(result.offsets)).toEqual([0, 12, 24, 36]);
    expect(Array.from(result.finishReasons)).toEqual([1, 1, 1]);
    for (let s = 0; s < 3; ++s) {
      const completion = Array.from(result.tokens.slice(s * 12, s * 12 + 12));
      expect(heard.get(s)).toEqual(completion);
      const tokens = [1, s < 2 ? 2 : 3, ...completion];
      const { logprobs } = await model.score(
        {
          tokens: Int32Array.from(tokens),
          positions: Int32Array.from(tokens, (_, i) => i),
          visibleUntil: new Int32Array(14).fill(14),
          sourceRows: Int32Array.from(completion, (_, i) => i + 1),
          targets: Int32Array.from(completion),
        },
        token(),
      );
      logprobs.forEach((logprob, i) => {
        expect(logprob).toBeCloseTo(result.logprobs[s * 12 + i] as number, 4);
      });
    }
  });

  test('a model for inference refuses to train, by name', async () => {
    const other = await makeModel({}, false);
    const calls = [
      () => other.forwardBackward(batch, loss, token()),
      () => other.optimStep(optimizer),
      () => other.zeroGradients(),
      () => other.readTensor('model.norm.weight', 'gradient'),
    ];
    for (const call of calls) expect((await failure(call)).code).toBe('UNSUPPORTED');
    expect((await other.score(batch, token())).logprobs).toHaveLength(4);
    other.dispose();
  });

  test('memory is counted and comes back', async () => {
    const before = model.memory().used;
    const other = await makeModel({ mlpSize: 4096 });
    expect(model.memory().used - before).toBeGreaterThan(3 * 4096 * 32 * 4);
    other.dispose();
    await model.score(batch, token());
    expect(model.memory().used - before).toBeLessThan(1e5);
    model.resetPeakMemory();
    expect(model.memory().peak).toBe(model.memory().used);
    const alone = native().createModel(config, { name: 'cpu', threads: 1 }, true);
    await alone.initialize(1n, 0.3);
    await alone.score(batch, token());
    alone.dispose();
    const next = native().createModel(config, { name: 'cpu', threads: 1 }, true);
    expect((await failure(() => next.readTensor('none', 'value'))).code).toBe('INVALID_ARGUMENT');
    // The last model of an engine takes everything with it but the new model's own weights.
    expect(next.memory().used).toBeLessThan(1e6);
    next.dispose();
  });
});

describe('bad arguments', () => {
  let model: NativeModel;
  beforeAll(async () => {
    model = await makeModel();
  });
  afterAll(() => model.dispose());

  const i32 = (...values: number[]) => Int32Array.from(values);
  const nothing = [undefined, null, 7, 'text', [], () => 0, Symbol('s'), 3n];

  test.each<[string, object, string]>([
    ['hidden size', { hiddenSize: 0 }, 'config.hiddenSize'],
    ['fraction', { layers: 1.5 }, 'config.layers'],
    ['heads', { kvHeads: 3 }, 'config.kvHeads'],
    ['head size', { headSize: 12 }, 'config.headSize'],
    ['vocabulary', { vocabSize: 2 ** 40 }, 'config.vocabSize'],
    ['epsilon', { rmsNormEps: Number.NaN }, 'config.rmsNormEps'],
    ['flag', { tiedHead: 1 }, 'config.tiedHead'],
    ['dtype', { dtype: 'f64' }, 'config.dtype'],
    ['rope', { rope: undefined }, 'config.rope'],
    [
      'frequencies',
      { rope: { inverseFrequencies: new Float32Array(3), attentionScale: 1 } },
      'config.rope.inverseFrequencies',
    ],
    [
      'infinite frequency',
      { rope: { inverseFrequencies: new Float32Array(4).fill(Infinity), attentionScale: 1 } },
      'config.rope.inverseFrequencies',
    ],
  ])('of a configuration: %s', async (_, changes, argument) => {
    const error = await failure(() =>
      native().createModel({ ...config, ...changes } as NativeModelConfig, cpu, true),
    );
    expect(error.code).toBe('INVALID_ARGUMENT');
    expect(error.message).toMatch(/^Expected .* for .* but received /);
    expect(error.message).toContain(argument);
  });

  test.each<[string, object, string]>([
    ['plain array', { tokens: [1, 2, 3, 4, 5, 6] }, 'tokens'],
    ['wrong type of array', { tokens: new Float32Array(6) }, 'tokens'],
    ['no tokens', { tokens: i32() }, 'tokens'],
    ['id outside of the vocabulary', { tokens: i32(1, 2, 3, 4, 5, 40) }, 'tokens'],
    ['negative id', { tokens: i32(1, 2, 3, 4, 5, -1) }, 'tokens'],
    ['lengths that differ', { positions: i32(0, 1) }, 'positions'],
    ['position outside of the context', { positions: i32(0, 1, 2, 3, 2, 4096) }, 'positions'],
    ['visibleUntil before its token', { visibleUntil: i32(6, 1, 4, 4, 6, 6) }, 'visibleUntil'],
    ['visibleUntil beyond the end', { visibleUntil: i32(7, 6, 4, 4, 6, 6) }, 'visibleUntil'],
    ['visibleUntil not nested', { visibleUntil: i32(6, 6, 4, 5, 6, 6) }, 'visibleUntil'],
    ['no rows', { sourceRows: i32(), targets: i32() }, 'sourceRows'],
    ['row outside of the batch', { sourceRows: i32(1, 2, 1, 6) }, 'sourceRows'],
    ['target outside of the vocabulary', { targets: i32(3, 4, 5, 99) }, 'targets'],
    ['fewer targets than rows', { targets: i32(3) }, 'targets'],
  ])('of a batch: %s', async (_, changes, argument) => {
    const wrong = { ...batch, ...changes } as NativeBatch;
    for (const call of [
      () => model.score(wrong, token()),
      () => model.forwardBackward(wrong, loss, token()),
    ]) {
      const error = await failure(call);
      expect(error.code).toBe('INVALID_ARGUMENT');
      expect(error.message).toMatch(/^Expected .* for .* but received /);
      expect(error.message).toContain(`batch.${argument}`);
    }
  });

  test.each<[string, object, string]>([
    ['kind', { kind: 'ppo' }, 'kind'],
    ['clip range', { clipLow: -0.1 }, 'clipLow'],
    ['coefficient', { klCoefficient: Number.POSITIVE_INFINITY }, 'klCoefficient'],
    ['no aggregation', { aggregation: undefined }, 'aggregation'],
    ['an unknown aggregation', { aggregation: 'median' }, 'aggregation'],
    ['too few sequences', { sequences: i32(0, 1, 2) }, 'sequences'],
    ['fewer completions than have rows', { completions: 2 }, 'completions'],
    ['a constant without the most tokens', { aggregation: 'constant' }, 'maxTokens'],
    ['infinite old log-probability', { oldLogprobs: Float32Array.of(1, Infinity, 1, 1) }, 'oldLogprobs'],
    [
      'a penalty without a reference',
      { klCoefficient: 0.1, referenceLogprobs: Float32Array.of(-1, Number.NaN, -1, -1) },
      'referenceLogprobs',
    ],
    ['NaN', { advantages: Float32Array.of(1, Number.NaN, 1, 1) }, 'advantages'],
    ['no old log-probabilities', { oldLogprobs: undefined }, 'oldLogprobs'],
    ['no reference', { klCoefficient: 0.1 }, 'referenceLogprobs'],
    ['gspo without sequences', { kind: 'gspo', sequences: undefined }, 'sequences'],
    ['sequences with a gap', { kind: 'gspo', sequences: i32(0, 0, 2, 2) }, 'sequences'],
  ])('of a loss: %s', async (_, changes, argument) => {
    const error = await failure(() =>
      model.forwardBackward(batch, { ...loss, ...changes } as NativeLoss, token()),
    );
    expect(error.code).toBe('INVALID_ARGUMENT');
    expect(error.message).toContain(`loss.${argument}`);
  });

  test.each<[string, object, string]>([
    ['row outside of the prompts', { promptRows: i32(1, 3) }, 'promptRows'],
    ['fewer counts than prompts', { counts: i32(2) }, 'counts'],
    ['negative count', { counts: i32(2, -1) }, 'counts'],
    ['too many', { counts: i32(2, 2 ** 30) }, 'counts'],
    ['keys', { keys: new Uint32Array(5) }, 'keys'],
    ['key type', { keys: new Int32Array(6) }, 'keys'],
    ['no room', { maxTokens: i32(12, 0) }, 'maxTokens'],
    ['temperature', { temperature: -1 }, 'temperature'],
    ['NaN', { temperature: Number.NaN }, 'temperature'],
    ['top k', { topK: -1 }, 'topK'],
    ['top p', { topP: 0 }, 'topP'],
    ['min p', { minP: 1.5 }, 'minP'],
    ['seed', { seed: 5 }, 'seed'],
    ['negative seed', { seed: -5n }, 'seed'],
    ['stop token', { stopTokens: i32(-1) }, 'stopTokens'],
    ['stop string', { stopStrings: ['text'] }, 'stopStrings'],
    ['empty stop string', { stopStrings: [new Uint8Array(0)] }, 'stopStrings'],
    ['stop strings without token bytes', { stopStrings: [Uint8Array.of(65)] }, 'stopStrings'],
    ['live sequences', { maxLiveSequences: -1 }, 'maxLiveSequences'],
  ])('of a request: %s', async (_, changes, argument) => {
    const error = await failure(() =>
      model.sample({ ...request, ...changes } as NativeSampleRequest, token()),
    );
    expect(error.code).toBe('INVALID_ARGUMENT');
    expect(error.message).toContain(`request.${argument}`);
  });

  test('a prompt that fills the context', async () => {
    const wrong = { ...request, positions: i32(0, 4095, 1) };
    expect((await failure(() => model.sample(wrong, token()))).code).toBe('CONTEXT_EXCEEDED');
  });

  test('of every other method', async () => {
    const calls: [() => unknown, string][] = [
      [() => model.optimStep({ ...optimizer, learningRate: -1 }), 'options.learningRate'],
      [() => model.optimStep({ ...optimizer, beta2: 1 }), 'options.beta2'],
      [() => model.readTensor('model.norm', 'value'), 'name'],
      [() => model.readTensor('model.norm.weight', 'values' as 'value'), 'kind'],
      [() => model.writeTensor('model.norm.weight', 'value', new Float32Array(31)), 'model.norm.weight'],
      [() => model.initialize(1 as unknown as bigint, 1), 'seed'],
      [() => model.initialize(1n, Number.NaN), 'standardDeviation'],
      [() => model.setTokenBytes(new Uint8Array(3), i32(0, 2, 1, 3)), 'offsets'],
      [() => model.setTokenBytes(new Uint8Array(3), i32(0, 2)), 'offsets'],
      [() => model.setOptimizerStep(-1), 'step'],
      [() => model.sample(request, token(), 'f' as unknown as () => void), 'onTokens'],
      [() => model.load([{ name: 'x' }] as unknown as [], token()), 'sources[0].path'],
      [() => native().cancel({} as ReturnType<typeof token>), 'token'],
      [() => native().cancel(model as unknown as ReturnType<typeof token>), 'token'],
      [() => native().openDevice({ name: 'cpu', threads: -1 }), 'device.threads'],
    ];
    for (const [call, argument] of calls) {
      const error = await failure(call);
      expect(error.code).toBe('INVALID_ARGUMENT');
      expect(error.message).toContain(argument);
    }
  });

  test('no value in any place crashes or hangs', async () => {
    const methods = [
      'load',
      'initialize',
      'readTensor',
      'writeTensor',
      'setTokenBytes',
      'logits',
      'score',
      'forwardBackward',
      'optimStep',
      'sample',
      'setOptimizerStep',
    ] as const;
    for (const method of methods) {
      for (const first of nothing) {
        for (const second of nothing) {
          if (method === 'setOptimizerStep' && first === 7) continue;
          if (method === 'initialize' && first === 3n && second === 7) continue;
          const call = model[method] as (...values: unknown[]) => unknown;
          expect((await failure(() => call.call(model, first, second, first))).code).toBe('INVALID_ARGUMENT');
        }
      }
    }
    const Constructor = model.constructor as new () => unknown;
    expect(() => new Constructor()).toThrow(/createModel/);
    expect(() => model.score.call({} as NativeModel, batch, token())).toThrow();
    expect((await model.score(batch, token())).logprobs).toHaveLength(4);
  });

  test('an accessor that throws passes its error on', async () => {
    const wrong = {
      get tokens(): Int32Array {
        throw new RangeError('mine');
      },
    };
    await expect(model.score(wrong as NativeBatch, token())).rejects.toThrow('mine');
  });
});

describe('loading', () => {
  test('a file that is missing, cut or lies about itself is refused by name', async () => {
    const directory = mkdtempSync(join(tmpdir(), 'merf-native-'));
    const path = join(directory, 'weights.bin');
    const model = native().createModel(config, cpu, false);
    let offset = 0;
    const sources = model.parameters().map(({ name, shape }) => {
      const byteLength = 4 * shape.reduce((a, b) => a * b, 1);
      offset += byteLength;
      return { name, path, offset: offset - byteLength, byteLength, encoding: 'F32' as const, shape };
    });
    writeFileSync(path, new Uint8Array(offset));
    await model.load(sources, token());
    const last = sources.at(-1) as (typeof sources)[0];
    const others = sources.slice(0, -1);
    const cases: [object, string][] = [
      [{ offset: last.offset + 1 }, 'MALFORMED_FILE'],
      [{ offset: 2 ** 52 }, 'MALFORMED_FILE'],
      [{ byteLength: last.byteLength - 1 }, 'MALFORMED_FILE'],
      [{ path: join(directory, 'none.bin') }, 'FILE_NOT_FOUND'],
      [{ path: directory }, 'MALFORMED_FILE'],
      [{ encoding: 'IQ2_XS' }, 'UNSUPPORTED'],
      [{ shape: [33] }, 'INVALID_ARGUMENT'],
      [{ name: 'model.other.weight' }, 'INVALID_ARGUMENT'],
    ];
    for (const [changes, code] of cases) {
      const error = await failure(() => model.load([...others, { ...last, ...changes }], token()));
      expect(error.code).toBe(code);
    }
    expect((await failure(() => model.load(others, token()))).code).toBe('INVALID_ARGUMENT');
    const cancelled = token();
    native().cancel(cancelled);
    expect((await failure(() => model.load(sources, cancelled))).code).toBe('ABORTED');
    model.dispose();
    rmSync(directory, { recursive: true });
  });
});

describe('ends', () => {
  const long: NativeSampleRequest = { ...request, maxTokens: Int32Array.of(4000, 4000) };

  test('a disposed model refuses everything, and its running work ends first', async () => {
    const model = await makeModel();
    const running = model.sample({ ...long, maxTokens: Int32Array.of(200, 200) }, token());
    model.dispose();
    model.dispose();
    const calls = [
      () => model.parameters(),
      () => model.load([], token()),
      () => model.initialize(1n, 1),
      () => model.readTensor('model.norm.weight', 'value'),
      () => model.writeTensor('model.norm.weight', 'value', new Float32Array(32)),
      () => model.setTokenBytes(new Uint8Array(0), Int32Array.of(0)),
      () => model.logits(batch),
      () => model.score(batch, token()),
      () => model.forwardBackward(batch, loss, token()),
      () => model.zeroGradients(),
      () => model.optimStep(optimizer),
      () => model.sample(request, token()),
      () => model.optimizerStep,
      () => model.setOptimizerStep(1),
      () => model.memory(),
      () => model.resetPeakMemory(),
    ];
    for (const call of calls) expect((await failure(call)).code).toBe('DISPOSED');
    expect((await running).tokens).toHaveLength(600);
  });

  test('a cancelled sample gives what was drawn; cancelled work before it begins is refused', async () => {
    const model = await makeModel();
    const cancel = token();
    let heard = 0;
    const result = await model.sample(long, cancel, (_, tokens) => {
      heard += tokens.length;
      native().cancel(cancel);
    });
    expect(Array.from(result.finishReasons)).toEqual([3, 3, 3]);
    expect(result.tokens.length).toBeGreaterThan(0);
    expect(result.tokens.length).toBeLessThan(12000);
    expect(heard).toBe(result.tokens.length);
    expect((await failure(() => model.score(batch, cancel))).code).toBe('ABORTED');
    expect((await failure(() => model.forwardBackward(batch, loss, cancel))).code).toBe('ABORTED');
    expect((await model.sample(request, cancel)).tokens).toHaveLength(0);
    model.dispose();
  });

  test('a listener that throws ends the sampling with its error', async () => {
    const model = await makeModel();
    await expect(
      model.sample(long, token(), () => {
        throw new RangeError('mine');
      }),
    ).rejects.toThrow('mine');
    expect((await model.sample(request, token())).tokens).toHaveLength(36);
    model.dispose();
  });

  test('the event loop goes on while the engine works', async () => {
    const model = await makeModel();
    let turns = 0;
    const timer = setInterval(() => ++turns, 1);
    await model.sample({ ...long, maxTokens: Int32Array.of(1500, 1500) }, token());
    clearInterval(timer);
    expect(turns).toBeGreaterThan(5);
    model.dispose();
  });

  /** What the scripts below begin with: the addon, models of `config`, and a request for 4,000 tokens each. */
  const preamble = `
    const addon = require(${JSON.stringify(resolve(process.env.MERF_PREBUILD ?? '.', 'build/Release/merf.node'))});
    const config = ${JSON.stringify({ ...config, rope: undefined })};
    config.rope = { inverseFrequencies: Float32Array.of(1, 0.3, 0.1, 0.03), attentionScale: 1 };
    const model = () => addon.createModel(config, { name: 'cpu', threads: 0 }, true);
    const request = {
      tokens: Int32Array.of(1, 2), positions: Int32Array.of(0, 1), visibleUntil: Int32Array.of(2, 2),
      promptRows: Int32Array.of(1), counts: Int32Array.of(8), keys: new Uint32Array(16), seed: 1n,
      maxTokens: Int32Array.of(4000), temperature: 1, topK: 0, topP: 1, minP: 0,
      stopTokens: new Int32Array(0), stopStrings: [], maxLiveSequences: 0,
    };`;

  function run(script: string) {
    const { status, signal, stdout, stderr } = spawnSync(process.execPath, ['-e', script], {
      encoding: 'utf8',
      timeout: 20_000,
    });
    return { status, signal, stdout, stderr };
  }

  test.each([
    ['process.exit while it samples', 'process.exit(7)', 7],
    ['an uncaught error while it samples', 'throw new Error("mine")', 1],
  ])('%s', (_, how, status) => {
    const script = `${preamble}
      const m = model();
      m.initialize(1n, 0.3).then(() => {
        m.sample(request, addon.createCancelToken(), () => {});
        for (let i = 0; i < 20; ++i) m.readTensor('model.norm.weight', 'value');
        setTimeout(() => { ${how} }, 50);
      });`;
    expect(run(script)).toMatchObject({ status, signal: null });
  });

  test('products leave the environment as it was, for programs that are started after them', () => {
    const script = `${preamble}
      const before = JSON.stringify(process.env);
      const m = model();
      m.initialize(1n, 0.3).then(() => m.sample({ ...request, maxTokens: Int32Array.of(4) }, addon.createCancelToken(), () => {}))
        .then(() => process.exit(JSON.stringify(process.env) === before ? 0 : 3));`;
    expect(run(script)).toMatchObject({ status: 0, signal: null });
  });

  test('the process waits for what was asked of it and then ends by itself', () => {
    const script = `${preamble}
      const m = model();
      m.initialize(1n, 0.3)
        .then(() => m.sample({ ...request, maxTokens: Int32Array.of(20) }, addon.createCancelToken(), () => {}))
        .then((r) => console.log(r.tokens.length));`;
    expect(run(script)).toMatchObject({ status: 0, signal: null, stdout: '160\n' });
  });

  test('a worker thread may use the engine, end on its own or be ended in the midst of work', () => {
    const directory = mkdtempSync(join(tmpdir(), 'merf-native-'));
    const path = join(directory, 'worker.js');
    writeFileSync(
      path,
      `${preamble}
      const { parentPort } = require('node:worker_threads');
      const m = model();
      m.initialize(1n, 0.3).then(async () => {
        const long = process.env.MODE !== 'finish';
        const done = m.sample(
          long ? request : { ...request, maxTokens: Int32Array.of(10) },
          addon.createCancelToken(), () => {});
        if (long) parentPort.postMessage('working');
        if (process.env.MODE === 'exit') setTimeout(() => process.exit(0), 20);
        const r = await done;
        parentPort.postMessage(r.tokens.length);
      });`,
    );
    const start = `
      const { Worker } = require('node:worker_threads');
      const start = (mode, delay) => new Promise((done) => {
        const w = new Worker(${JSON.stringify(path)}, { env: { ...process.env, MODE: mode } });
        w.on('message', (m) => {
          if (mode === 'finish') console.log(m);
          if (mode === 'terminate') setTimeout(() => w.terminate(), delay);
        });
        w.on('error', (e) => console.log('error', e.message));
        w.on('exit', done);
      });`;
    const several = `${preamble}${start}
      (async () => {
        for (let i = 0; i < 12; ++i) {
          await Promise.all([start('finish'), start('terminate', 3 * i), start('terminate', 30), start('exit')]);
        }
        console.log('end');
      })();`;
    expect(run(several)).toMatchObject({ status: 0, signal: null, stdout: `${'80\n'.repeat(12)}end\n` });
    // The end of a worker that alone has loaded the addon must not unload the engine's code.
    const alone = `${start} start('exit').then(() => setTimeout(() => console.log('end'), 200));`;
    expect(run(alone)).toMatchObject({ status: 0, signal: null, stdout: 'end\n' });
    rmSync(directory, { recursive: true });
  });
});
