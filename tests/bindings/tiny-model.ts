import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { resolve } from 'node:path';
import type { NativeBatch, NativeLoss, NativeModelConfig, NativeSampleRequest } from '../../lib/native.js';

/** Whether the addon was built with the address sanitizer, which keeps freed memory for a while. */
export const sanitized = process.env.MERF_SANITIZED === '1';
/** Whether the tests that repeat themselves do so as often as nobody waits for: npm run test:sanitize -- --long. */
export const long = process.env.MERF_LONG_TESTS === '1';

/** A tiny model, and what its primitives are given in the tests of the addon. */
export const config: NativeModelConfig = {
  hiddenSize: 32,
  layers: 2,
  heads: 4,
  kvHeads: 2,
  headSize: 8,
  mlpSize: 48,
  vocabSize: 40,
  rmsNormEps: 1e-6,
  tiedHead: true,
  attentionBias: true,
  outputBias: false,
  mlpBias: false,
  maxPositions: 4096,
  rope: { inverseFrequencies: Float32Array.of(1, 0.3, 0.1, 0.03), attentionScale: 1 },
  dtype: 'f32',
};
export const cpu = { name: 'cpu', threads: 1 };
export const batch: NativeBatch = {
  tokens: Int32Array.of(1, 2, 3, 4, 5, 6),
  positions: Int32Array.of(0, 1, 2, 3, 2, 3),
  visibleUntil: Int32Array.of(6, 6, 4, 4, 6, 6),
  sourceRows: Int32Array.of(1, 2, 1, 4),
  targets: Int32Array.of(3, 4, 5, 6),
};
export const loss: NativeLoss = {
  kind: 'policy_gradient_clip',
  clipLow: 0.2,
  clipHigh: 0.2,
  klCoefficient: 0,
  entropyCoefficient: 0,
  aggregation: 'token_mean',
  sequences: Int32Array.of(0, 0, 1, 2),
  completions: 3,
  advantages: Float32Array.of(1, 1, -1, -1),
  oldLogprobs: Float32Array.of(-3, -3, -3, -3),
};
export const request: NativeSampleRequest = {
  tokens: Int32Array.of(1, 2, 3),
  positions: Int32Array.of(0, 1, 1),
  visibleUntil: Int32Array.of(3, 2, 3),
  promptRows: Int32Array.of(1, 2),
  counts: Int32Array.of(2, 1),
  keys: Uint32Array.of(1, 0, 2, 0, 3, 0),
  seed: 5n,
  maxTokens: Int32Array.of(12, 12),
  temperature: 1,
  topK: 0,
  topP: 1,
  minP: 0,
  stopTokens: new Int32Array(0),
  stopStrings: [],
  maxLiveSequences: 0,
};
export const optimizer = {
  learningRate: 1e-3,
  beta1: 0.9,
  beta2: 0.999,
  epsilon: 1e-8,
  weightDecay: 0,
  maxGradNorm: 1,
};

const addonFile = resolve(process.env.MERF_PREBUILD ?? '.', 'build/Release/merf.node');

/** JavaScript of a value; of typed arrays, bigints and what JSON has. */
function source(value: unknown): string {
  if (typeof value === 'bigint') return `${value}n`;
  if (ArrayBuffer.isView(value)) {
    return `${value.constructor.name}.from([${Array.from(value as Int32Array).join()}])`;
  }
  if (Array.isArray(value)) return `[${value.map(source).join()}]`;
  if (typeof value === 'object' && value !== null) {
    return `{${Object.entries(value).map(([key, of]) => `${key}:${source(of)}`)}}`;
  }
  return String(JSON.stringify(value));
}

/** What scripts of `runScript` begin with: the addon, `config` with `changes`, a model of it, and `train()`, a step with all primitives. */
export function preamble(changes: Partial<NativeModelConfig> = {}, threads = 1): string {
  return `
    const addon = require(${JSON.stringify(addonFile)});
    const config = ${source({ ...config, ...changes })};
    const cpu = ${source({ ...cpu, threads })};
    const model = addon.createModel(config, cpu, true);
    const token = () => addon.createCancelToken();
    const train = async () => {
      const { tokens } = await model.sample(${source(request)}, token(), () => {});
      await model.score(${source(batch)}, token());
      await model.forwardBackward(${source(batch)}, ${source(loss)}, token());
      await model.optimStep(${source(optimizer)});
      return tokens.length;
    };`;
}

/** How a program ended that ran the script. */
export async function runScript(script: string, nodeOptions: string[] = []) {
  const child = spawn(process.execPath, [...nodeOptions, '-e', script], {
    stdio: ['ignore', 'pipe', 'pipe'],
    timeout: 120_000,
  });
  let stdout = '';
  let stderr = '';
  child.stdout.setEncoding('utf8').on('data', (text: string) => {
    stdout += text;
  });
  child.stderr.setEncoding('utf8').on('data', (text: string) => {
    stderr += text;
  });
  const [status, signal] = (await once(child, 'close')) as [number | null, string | null];
  return { status, signal, stdout, stderr };
}
