// A trainer that brings a model of its own, on merf's kernels alone: attention over the token forest and its backward, token
// sampling, group advantages and the fused loss. The rest, embeddings and projections, is arithmetic on Float32Arrays. The
// model learns to write four letters backwards, first from examples, then by GRPO from rewards.
//
//   npx tsx examples/own-model.ts [supervised steps] [GRPO steps]
import { pathToFileURL } from 'node:url';
import {
  attention,
  attentionBackward,
  type Device,
  fusedPolicyLoss,
  groupAdvantages,
  lossWeights,
  openDevice,
  type PolicyLossOptions,
  sampleTokens,
} from 'merf/kernels';

const letters = 'abcdefgh';
const separator = letters.length;
const vocabulary = letters.length + 1;
const length = 4;
const promptLength = length + 1;
const [hidden, heads] = [32, 4];

/** A packed forest: prompts, and under each its completions. Key j is visible to i where j <= i < visibleUntil[j]. */
interface Forest {
  tokens: number[];
  positions: number[];
  visibleUntil: Int32Array;
  /** The row before each token of each completion, and one for the token that would follow it. */
  rows: number[][];
}

/** Packs prompts with their completions; every prompt is there once, whatever the number of its completions. */
export function pack(prompts: readonly number[][], completions: readonly (readonly number[][])[]): Forest {
  const forest = { tokens: [] as number[], positions: [] as number[], rows: [] as number[][] };
  const ends: number[] = [];
  for (const [p, prompt] of prompts.entries()) {
    const start = forest.tokens.length;
    prompt.forEach((token, i) => {
      forest.tokens.push(token);
      forest.positions.push(i);
    });
    const last = forest.tokens.length - 1;
    for (const completion of completions[p] as readonly number[][]) {
      const rows = [last];
      const end = forest.tokens.length + completion.length;
      completion.forEach((token, i) => {
        rows.push(forest.tokens.length);
        forest.tokens.push(token);
        forest.positions.push(prompt.length + i);
        ends[forest.tokens.length - 1] = end;
      });
      forest.rows.push(rows);
    }
    for (let i = start; i <= last; i++) ends[i] = forest.tokens.length;
  }
  return { ...forest, visibleUntil: Int32Array.from(ends) };
}

/** x [m, k] times the transposed w [n, k]: [m, n]. */
function project(x: Float32Array, w: Float32Array, k: number): Float32Array {
  const [m, n] = [x.length / k, w.length / k];
  const y = new Float32Array(m * n);
  for (let i = 0; i < m; i++) {
    for (let j = 0; j < n; j++) {
      let sum = 0;
      for (let l = 0; l < k; l++) sum += (x[i * k + l] as number) * (w[j * k + l] as number);
      y[i * n + j] = sum;
    }
  }
  return y;
}

/** The backward of `project`, given dy [m, n]: adds to dw [n, k], returns dx [m, k]. */
function projectBackward(dy: Float32Array, x: Float32Array, w: Float32Array, dw: Float32Array, k: number) {
  const [m, n] = [x.length / k, w.length / k];
  const dx = new Float32Array(x.length);
  for (let i = 0; i < m; i++) {
    for (let j = 0; j < n; j++) {
      const d = dy[i * n + j] as number;
      for (let l = 0; l < k; l++) {
        dx[i * k + l] = (dx[i * k + l] as number) + d * (w[j * k + l] as number);
        dw[j * k + l] = (dw[j * k + l] as number) + d * (x[i * k + l] as number);
      }
    }
  }
  return dx;
}

/** A weight with its gradient and Adam's moments. */
class Parameter {
  readonly gradient: Float32Array;
  readonly #moments: [Float32Array, Float32Array];

  constructor(readonly value: Float32Array) {
    this.gradient = new Float32Array(value.length);
    this.#moments = [new Float32Array(value.length), new Float32Array(value.length)];
  }

  /** AdamW without weight decay (arXiv:1711.05101); zeroes the gradient. */
  update(step: number, learningRate: number): void {
    const [first, second] = this.#moments;
    for (const [i, g] of this.gradient.entries()) {
      first[i] = 0.9 * (first[i] as number) + 0.1 * g;
      second[i] = 0.99 * (second[i] as number) + 0.01 * g * g;
      const [m, v] = [(first[i] as number) / (1 - 0.9 ** step), (second[i] as number) / (1 - 0.99 ** step)];
      this.value[i] = (this.value[i] as number) - (learningRate * m) / (Math.sqrt(v) + 1e-8);
    }
    this.gradient.fill(0);
  }
}

/** One layer of attention between embeddings of tokens and positions, and a head. */
export class CharModel {
  readonly parameters: Record<'tokens' | 'positions' | 'qkv' | 'out' | 'head', Parameter>;
  #steps = 0;

  /** @param random numbers in [0, 1) */
  constructor(
    readonly device: Device,
    random: () => number,
  ) {
    const weight = (rows: number, scale: number) =>
      new Parameter(Float32Array.from({ length: rows * hidden }, () => scale * (2 * random() - 1)));
    this.parameters = {
      tokens: weight(vocabulary, 1),
      positions: weight(promptLength + length, 1),
      qkv: weight(3 * hidden, 0.3),
      out: weight(hidden, 0.3),
      head: weight(vocabulary, 0.3),
    };
  }

  /** The hidden states [T, hidden] that the head reads, and what the backward needs. */
  async forward({ tokens, positions, visibleUntil }: Forest) {
    const p = this.parameters;
    const embedded = new Float32Array(tokens.length * hidden);
    for (const [t, token] of tokens.entries()) {
      for (let h = 0; h < hidden; h++) {
        const at = (positions[t] as number) * hidden + h;
        embedded[t * hidden + h] =
          (p.tokens.value[token * hidden + h] as number) + (p.positions.value[at] as number);
      }
    }
    const qkv = project(embedded, p.qkv.value, hidden);
    const part = (from: number) => {
      const values = new Float32Array(embedded.length);
      for (let t = 0; t < tokens.length; t++) {
        values.set(qkv.subarray((3 * t + from) * hidden, (3 * t + from + 1) * hidden), t * hidden);
      }
      return this.device.tensor(values, { shape: [tokens.length, heads, hidden / heads] });
    };
    const inputs = { q: part(0), k: part(1), v: part(2), visibleUntil };
    const result = await attention(inputs);
    const attended = await result.out.read();
    const states = project(attended, p.out.value, hidden);
    for (const [i, x] of embedded.entries()) states[i] = (states[i] as number) + x;
    const dispose = () => {
      for (const tensor of [inputs.q, inputs.k, inputs.v, result.out, result.lse]) tensor.dispose();
    };
    return { states, embedded, attended, inputs, result, dispose };
  }

  /** Adds the gradient of the loss over the given rows and targets, and returns the loss and log-probabilities. */
  async forwardBackward(forest: Forest, rows: Int32Array, targets: Int32Array, options: PolicyLossOptions) {
    const p = this.parameters;
    const pass = await this.forward(forest);
    const T = forest.tokens.length;
    using states = this.device.tensor(pass.states, { shape: [T, hidden] });
    using weight = this.device.tensor(p.head.value, { shape: [vocabulary, hidden] });
    const loss = await fusedPolicyLoss({ ...options, hidden: states, weight, rows, targets });
    const [dstates, dhead, logprobs] = await Promise.all([
      loss.dhidden.read(),
      loss.dweight.read(),
      loss.logprobs.read(),
    ]);
    for (const [i, g] of dhead.entries()) p.head.gradient[i] = (p.head.gradient[i] as number) + g;

    const dattended = projectBackward(dstates, pass.attended, p.out.value, p.out.gradient, hidden);
    using dout = this.device.tensor(dattended, { shape: [T, heads, hidden / heads] });
    const { dq, dk, dv } = await attentionBackward({ ...pass.inputs, ...pass.result, dout });
    const parts = await Promise.all([dq.read(), dk.read(), dv.read()]);
    const dqkv = new Float32Array(3 * T * hidden);
    for (let t = 0; t < T; t++) {
      parts.forEach((part, i) => {
        dqkv.set(part.subarray(t * hidden, (t + 1) * hidden), (3 * t + i) * hidden);
      });
    }
    const dembedded = projectBackward(dqkv, pass.embedded, p.qkv.value, p.qkv.gradient, hidden);
    const add = (parameter: Parameter, row: number, h: number, g: number) => {
      parameter.gradient[row * hidden + h] = (parameter.gradient[row * hidden + h] as number) + g;
    };
    for (const [t, token] of forest.tokens.entries()) {
      for (let h = 0; h < hidden; h++) {
        const g = (dembedded[t * hidden + h] as number) + (dstates[t * hidden + h] as number);
        add(p.tokens, token, h, g);
        add(p.positions, forest.positions[t] as number, h, g);
      }
    }
    pass.dispose();
    for (const tensor of [loss.logprobs, loss.entropies, loss.dhidden, loss.dweight, dq, dk, dv])
      tensor.dispose();
    return { loss: loss.loss, logprobs };
  }

  update(learningRate: number): void {
    this.#steps += 1;
    for (const parameter of Object.values(this.parameters)) parameter.update(this.#steps, learningRate);
  }

  /** Draws `n` completions of each prompt, and their log-probabilities. */
  async sample(prompts: readonly number[][], n: number, seed: number) {
    const completions = prompts.map(() => Array.from({ length: n }, () => [] as number[]));
    const logprobs = prompts.map(() => Array.from({ length: n }, () => [] as number[]));
    const all = completions.flat();
    for (let drawn = 0; drawn < length; drawn++) {
      const forest = pack(prompts, completions);
      const { states, dispose } = await this.forward(forest);
      const last = new Float32Array(all.length * hidden);
      for (const [b, rows] of forest.rows.entries()) {
        const row = rows[drawn] as number;
        last.set(states.subarray(row * hidden, (row + 1) * hidden), b * hidden);
      }
      const values = project(last, this.parameters.head.value, hidden);
      using logits = this.device.tensor(values, { shape: [all.length, vocabulary] });
      const sampled = await sampleTokens({
        logits,
        keys: Uint32Array.from({ length: 2 * all.length }, (_, i) => (i % 2 === 0 ? i / 2 : 0)),
        positions: new Int32Array(all.length).fill(drawn),
        seed,
      });
      const [tokens, scores] = await Promise.all([sampled.tokens.read(), sampled.logprobs.read()]);
      for (const tensor of Object.values(sampled)) tensor.dispose();
      dispose();
      for (const [b, completion] of all.entries()) {
        completion.push(tokens[b] as number);
        (logprobs.flat()[b] as number[]).push(scores[b] as number);
      }
    }
    return { completions, logprobs };
  }
}

/** The rows that predict the completions' tokens, those tokens, and to which completion each belongs. */
export function predictions(prompts: readonly number[][], completions: readonly (readonly number[][])[]) {
  // Nothing depends on the last token of a completion, so it is a target alone.
  const forest = pack(
    prompts,
    completions.map((group) => group.map((completion) => completion.slice(0, -1))),
  );
  const all = completions.flat();
  return {
    forest,
    rows: Int32Array.from(forest.rows.flat()),
    targets: Int32Array.from(all.flat()),
    sequences: Int32Array.from(all.flatMap((completion, i) => completion.map(() => i))),
  };
}

export interface TrainOptions {
  supervisedSteps: number;
  grpoSteps: number;
  onStep?: (step: { kind: 'supervised' | 'grpo'; step: number; loss: number; reward?: number }) => void;
}

/** Trains a new model, and returns it. */
export async function train({ supervisedSteps, grpoSteps, onStep }: TrainOptions): Promise<CharModel> {
  const random = randomNumbers(7);
  const device = openDevice('cpu');
  const model = new CharModel(device, random);
  const draw = () => Array.from({ length }, () => Math.floor(random() * letters.length));
  const promptOf = (word: readonly number[]) => [...word, separator];
  const floats = (values: Iterable<number>) => device.tensor(Float32Array.from(values));

  for (let step = 1; step <= supervisedSteps; step++) {
    const words = Array.from({ length: 32 }, draw);
    const { forest, rows, targets, sequences } = predictions(
      words.map(promptOf),
      words.map((word) => [word.toReversed()]),
    );
    using weights = floats(lossWeights({ aggregation: 'token_mean', sequences, completions: words.length }));
    const { loss } = await model.forwardBackward(forest, rows, targets, { kind: 'cross_entropy', weights });
    model.update(0.01);
    onStep?.({ kind: 'supervised', step, loss });
  }

  for (let step = 1; step <= grpoSteps; step++) {
    // 1. Rollout and reward: the share of the letters that are right.
    const words = Array.from({ length: 8 }, draw);
    const { completions, logprobs } = await model.sample(words.map(promptOf), 8, step);
    const rewards = completions.map((group, i) => {
      const right = (words[i] as number[]).toReversed();
      return group.map((completion) => completion.filter((token, j) => token === right[j]).length / length);
    });
    // 2. Advantages, each completion's for all of its tokens.
    const compared = await groupAdvantages(rewards);
    const { forest, rows, targets, sequences } = predictions(words.map(promptOf), completions);
    using advantages = floats(compared.flat().flatMap((advantage) => Array<number>(length).fill(advantage)));
    using oldLogprobs = floats(logprobs.flat(2));
    using weights = floats(
      lossWeights({ aggregation: 'sequence_mean', sequences, completions: completions.flat().length }),
    );
    // 3. Update.
    const { loss } = await model.forwardBackward(forest, rows, targets, { weights, advantages, oldLogprobs });
    model.update(0.003);
    const all = rewards.flat();
    onStep?.({ kind: 'grpo', step, loss, reward: all.reduce((sum, reward) => sum + reward, 0) / all.length });
  }
  return model;
}

/** Numbers in [0, 1), the same for the same seed (mulberry32). */
export function randomNumbers(seed: number): () => number {
  let state = seed;
  return () => {
    state = (state + 0x6d2b79f5) | 0;
    let t = Math.imul(state ^ (state >>> 15), 1 | state);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
}

if (import.meta.url === pathToFileURL(process.argv[1] ?? '').href) {
  const [supervisedSteps = 10, grpoSteps = 60] = process.argv.slice(2).map(Number);
  await train({
    supervisedSteps,
    grpoSteps,
    onStep: ({ kind, step, loss, reward }) => {
      if (step % 10 !== 0) return;
      const earned = reward === undefined ? '' : ` reward ${reward.toFixed(3)}`;
      console.log(`${kind} step ${String(step).padStart(3)} loss ${loss.toFixed(4)}${earned}`);
    },
  });
}
