// What a trainer with a model of its own asks of kernels, at sizes of a small model, by merf and by loops in JavaScript.
import { attention, attentionBackward, fusedPolicyLoss, openDevice, sampleTokens } from 'merf/kernels';
import * as plain from './plain.js';

export interface Sizes {
  tokens: number;
  heads: number;
  headSize: number;
  /** Rows that are drawn, and rows of the loss. */
  batch: number;
  rows: number;
  hidden: number;
  vocabulary: number;
  /** Completions of the forest under one prompt that is as long as each of them. */
  completions: number;
}

export const smallModel: Sizes = {
  tokens: 288,
  heads: 8,
  headSize: 64,
  batch: 32,
  rows: 128,
  hidden: 256,
  vocabulary: 4096,
  completions: 8,
};

/** The arrays that all contestants are given, from -1 to 1. */
export function inputsOf(sizes: Sizes) {
  let state = 1;
  const numbers = (length: number) =>
    Float32Array.from({ length }, () => {
      state = (Math.imul(state ^ (state >>> 15), 2246822519) + 374761393) | 0;
      return state / 2 ** 31;
    });
  const { tokens, heads, headSize, batch, rows, hidden, vocabulary, completions } = sizes;
  const size = tokens * heads * headSize;
  const each = tokens / (completions + 1);
  return {
    q: numbers(size),
    k: numbers(size),
    v: numbers(size),
    dout: numbers(size),
    causal: new Int32Array(tokens).fill(tokens),
    forest: Int32Array.from({ length: tokens }, (_, t) =>
      t < each ? tokens : (Math.floor(t / each) + 1) * each,
    ),
    logits: numbers(batch * vocabulary).map((x) => 5 * x),
    shares: numbers(batch).map((x) => Math.abs(x)),
    states: numbers(rows * hidden),
    head: numbers(vocabulary * hidden),
    targets: numbers(rows).map((x) => Math.floor(Math.abs(x) * (vocabulary - 1))),
    advantages: numbers(rows),
    oldLogprobs: numbers(rows).map((x) => Math.log(1 / vocabulary) + x),
  };
}

export type Inputs = ReturnType<typeof inputsOf>;

export const caseNames = ['attention', 'attention over a forest', 'sampling', 'policy loss'] as const;
export type CaseName = (typeof caseNames)[number];

/** What a contestant does in each case, from typed arrays to typed arrays; what is left out it cannot do. */
export type Contestant = Partial<Record<CaseName, () => Promise<Float32Array[]>>>;

export function byMerf(inputs: Inputs, sizes: Sizes): Contestant {
  const device = openDevice('cpu');
  const { tokens, heads, headSize, batch, rows, hidden, vocabulary } = sizes;
  const shape = [tokens, heads, headSize];
  const attend = async (visibleUntil: Int32Array) => {
    using q = device.tensor(inputs.q, { shape });
    using k = device.tensor(inputs.k, { shape });
    using v = device.tensor(inputs.v, { shape });
    using dout = device.tensor(inputs.dout, { shape });
    const { out, lse } = await attention({ q, k, v, visibleUntil });
    const { dq, dk, dv } = await attentionBackward({ q, k, v, visibleUntil, out, lse, dout });
    const results = await Promise.all([out, dq, dk, dv].map((tensor) => tensor.read()));
    for (const tensor of [out, lse, dq, dk, dv]) tensor.dispose();
    return results;
  };
  return {
    attention: () => attend(inputs.causal),
    'attention over a forest': () => attend(inputs.forest),
    sampling: async () => {
      using logits = device.tensor(inputs.logits, { shape: [batch, vocabulary] });
      const keys = Uint32Array.from({ length: 2 * batch }, (_, i) => i);
      const drawn = await sampleTokens({ logits, keys, positions: new Int32Array(batch), seed: 1 });
      const tokens = await drawn.tokens.read();
      for (const tensor of Object.values(drawn)) tensor.dispose();
      return [Float32Array.from(tokens)];
    },
    'policy loss': async () => {
      using states = device.tensor(inputs.states, { shape: [rows, hidden] });
      using weight = device.tensor(inputs.head, { shape: [vocabulary, hidden] });
      using weights = device.tensor(new Float32Array(rows).fill(1 / rows));
      using advantages = device.tensor(inputs.advantages);
      using oldLogprobs = device.tensor(inputs.oldLogprobs);
      const result = await fusedPolicyLoss({
        hidden: states,
        weight,
        weights,
        advantages,
        oldLogprobs,
        rows: Int32Array.from({ length: rows }, (_, i) => i),
        targets: Int32Array.from(inputs.targets),
      });
      const gradients = await Promise.all([result.dhidden.read(), result.dweight.read()]);
      for (const tensor of [result.logprobs, result.entropies, result.dhidden, result.dweight])
        tensor.dispose();
      return [Float32Array.of(result.loss), ...gradients];
    },
  };
}

export function byLoops(inputs: Inputs, sizes: Sizes): Contestant {
  const { q, k, v, dout } = inputs;
  const attend = async (visibleUntil: Int32Array) => {
    const result = plain.attention(q, k, v, visibleUntil, sizes);
    const { dq, dk, dv } = plain.attentionBackward(q, k, v, visibleUntil, { ...result, dout }, sizes);
    return [result.out, dq, dk, dv];
  };
  return {
    attention: () => attend(inputs.causal),
    'attention over a forest': () => attend(inputs.forest),
    sampling: async () => [
      Float32Array.from(plain.sampleTokens(inputs.logits, sizes.vocabulary, inputs.shares)),
    ],
    'policy loss': async () => {
      const { states, head, targets, advantages, oldLogprobs } = inputs;
      const result = plain.policyLoss(
        states,
        head,
        Int32Array.from(targets),
        advantages,
        oldLogprobs,
        sizes.hidden,
      );
      return [Float32Array.of(result.loss), result.dhidden, result.dweight];
    },
  };
}
