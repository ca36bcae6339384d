// examples/own-model.ts: the gradient that it puts together from merf's kernels is right, and it learns.
import { readFileSync } from 'node:fs';
import { expect, test } from '@jest/globals';
import { CharModel, pack, predictions, randomNumbers, train } from '../../examples/own-model.js';
import { lossWeights, openDevice } from '../../lib/kernels/index.js';

const device = openDevice('cpu');
const prompts = [
  [0, 3, 2, 1, 8],
  [5, 5, 7, 0, 8],
];
const completions = [
  [
    [1, 2, 3, 0],
    [1, 4, 3, 6],
  ],
  [
    [0, 7, 5, 5],
    [2, 2, 2, 2],
  ],
];

test('the forest holds each prompt once, and hides completions from each other', () => {
  const { tokens, positions, visibleUntil, rows } = pack(prompts, completions);
  expect(tokens).toEqual(
    [prompts[0], ...(completions[0] as number[][]), prompts[1], ...(completions[1] as number[][])].flat(),
  );
  expect(positions.slice(0, 13)).toEqual([0, 1, 2, 3, 4, 5, 6, 7, 8, 5, 6, 7, 8]);
  expect(Array.from(visibleUntil.slice(0, 13))).toEqual([13, 13, 13, 13, 13, 9, 9, 9, 9, 13, 13, 13, 13]);
  expect(rows).toEqual([
    [4, 5, 6, 7, 8],
    [4, 9, 10, 11, 12],
    [17, 18, 19, 20, 21],
    [17, 22, 23, 24, 25],
  ]);
});

/** The model's loss in float64 from its hidden states, computed apart from the kernels, attention included. */
function lossOf(model: CharModel): number {
  const { forest, rows, targets } = predictions(prompts, completions);
  const { tokens, positions, qkv, out, head } = model.parameters;
  const [H, heads] = [32, 4];
  const D = H / heads;
  const at = (values: Float32Array, row: number, i: number) => values[row * H + i] as number;
  const x = forest.tokens.map((token, t) =>
    Array.from(
      { length: H },
      (_, i) => at(tokens.value, token, i) + at(positions.value, forest.positions[t] as number, i),
    ),
  );
  const times = (weights: Float32Array, row: number, vector: readonly number[]) =>
    vector.reduce((sum, value, i) => sum + value * at(weights, row, i), 0);
  const projected = x.map((row) => Array.from({ length: 3 * H }, (_, j) => times(qkv.value, j, row)));
  const attended = x.map((_, i) =>
    Array.from({ length: H }, (__, h) => {
      const first = Math.floor(h / D) * D;
      let [sum, value] = [0, 0];
      for (let j = 0; j <= i; j++) {
        if (i >= (forest.visibleUntil[j] as number)) continue;
        let score = 0;
        for (let d = first; d < first + D; d++) {
          score += ((projected[i] as number[])[d] as number) * ((projected[j] as number[])[H + d] as number);
        }
        const weight = Math.exp(score / Math.sqrt(D));
        sum += weight;
        value += weight * ((projected[j] as number[])[2 * H + h] as number);
      }
      return value / sum;
    }),
  );
  const states = x.map((row, t) =>
    row.map((value, j) => value + times(out.value, j, attended[t] as number[])),
  );
  let loss = 0;
  for (const [r, row] of rows.entries()) {
    const logits = Array.from({ length: 9 }, (_, v) => times(head.value, v, states[row] as number[]));
    const total = Math.log(logits.reduce((sum, logit) => sum + Math.exp(logit), 0));
    loss += (total - (logits[targets[r] as number] as number)) / rows.length;
  }
  return loss;
}

test('loss and gradient are those of float64, along every parameter', async () => {
  const random = randomNumbers(3);
  const model = new CharModel(device, random);
  const { forest, rows, targets, sequences } = predictions(prompts, completions);
  const weights = device.tensor(lossWeights({ aggregation: 'token_mean', sequences, completions: 4 }));
  const { loss } = await model.forwardBackward(forest, rows, targets, { kind: 'cross_entropy', weights });
  expect(loss).toBeCloseTo(lossOf(model), 5);
  for (const { value, gradient } of Object.values(model.parameters)) {
    const before = value.slice();
    const direction = value.map(() => 2 * random() - 1);
    const moved = (step: number) => {
      for (const [i, v] of before.entries()) value[i] = v + step * (direction[i] as number);
      return lossOf(model);
    };
    const step = 1e-2;
    const slope = (moved(step) - moved(-step)) / (2 * step);
    value.set(before);
    const expected = gradient.reduce((sum, g, i) => sum + g * (direction[i] as number), 0);
    expect(Math.abs(slope)).toBeGreaterThan(1e-3);
    expect(Math.abs(slope - expected) / Math.abs(slope)).toBeLessThan(1e-2);
  }
});

test('what is sampled with a log-probability is scored with it', async () => {
  const model = new CharModel(device, randomNumbers(5));
  const drawn = await model.sample(prompts, 2, 1);
  const { forest, rows, targets, sequences } = predictions(prompts, drawn.completions);
  const weights = device.tensor(lossWeights({ aggregation: 'token_mean', sequences, completions: 4 }));
  const { logprobs } = await model.forwardBackward(forest, rows, targets, { kind: 'cross_entropy', weights });
  const sampled = drawn.logprobs.flat(2);
  expect(sampled).toHaveLength(16);
  for (const [i, logprob] of logprobs.entries()) expect(logprob).toBeCloseTo(sampled[i] as number, 4);
});

test('it learns from examples and then from rewards', async () => {
  const losses: number[] = [];
  const rewards: number[] = [];
  await train({
    supervisedSteps: 10,
    grpoSteps: 30,
    onStep: ({ kind, loss, reward }) => {
      if (kind === 'supervised') losses.push(loss);
      else rewards.push(reward as number);
    },
  });
  const mean = (values: readonly number[]) => values.reduce((sum, value) => sum + value, 0) / values.length;
  expect(losses[0]).toBeGreaterThan(2);
  expect(losses.at(-1)).toBeLessThan(0.8 * (losses[0] as number));
  expect(mean(rewards.slice(-5))).toBeGreaterThan(mean(rewards.slice(0, 5)) + 0.2);
}, 120_000);

test('it needs no part of merf but the kernels', () => {
  const text = readFileSync(new URL('../../examples/own-model.ts', import.meta.url), 'utf8');
  const imported = [...text.matchAll(/from '([^']+)'/g)].map(([, module]) => module);
  expect(imported.sort()).toEqual(['merf/kernels', 'node:url']);
});
