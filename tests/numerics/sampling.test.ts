import { afterAll, beforeAll, expect, test } from '@jest/globals';
import { Policy, type SampleOptions } from '../../lib/policy/index.js';
import { fixturePath } from '../support/fixtures.js';
import { report } from '../support/report.js';
import { chiSquareTest } from '../support/statistics.js';

let policy: Policy;
const prompt = [35, 267, 75, 73, 74, 86, 260];

beforeAll(async () => {
  policy = await Policy.load(fixturePath('llama'), { dtype: 'f32' });
});
afterAll(() => policy.dispose());

/** The exact distribution that options ask for, [vocabSize], from logits in float64. */
function distribution(logits: Float32Array, options: SampleOptions): Float64Array {
  const { temperature = 1, topK = 0, topP = 1, minP = 0 } = options;
  const softmax = (scores: Float64Array) => {
    const top = Math.max(...scores);
    const exps = scores.map((score) => Math.exp(score - top));
    const sum = exps.reduce((a, b) => a + b, 0);
    return exps.map((e) => e / sum);
  };
  const probabilities = softmax(Float64Array.from(logits, (logit) => logit / temperature));
  const order = Array.from(probabilities.keys()).sort(
    (a, b) => (probabilities[b] as number) - (probabilities[a] as number),
  );
  const kept = new Set(topK > 0 ? order.slice(0, topK) : order);
  if (topP < 1) {
    const mass = [...kept].reduce((sum, i) => sum + (probabilities[i] as number), 0);
    let before = 0;
    for (const i of kept) {
      if (before >= topP * mass) kept.delete(i);
      before += probabilities[i] as number;
    }
  }
  const largest = probabilities[order[0] as number] as number;
  for (const i of kept) if ((probabilities[i] as number) < minP * largest) kept.delete(i);
  const restricted = probabilities.map((p, i) => (kept.has(i) ? p : 0));
  const total = restricted.reduce((a, b) => a + b, 0);
  return restricted.map((p) => p / total);
}

test.each<[string, SampleOptions]>([
  ['temperature 1', {}],
  ['temperature 0.7', { temperature: 0.7 }],
  ['temperature 2', { temperature: 2 }],
  ['top-k 10', { topK: 10 }],
  ['top-p 0.8', { topP: 0.8 }],
  ['min-p 0.05', { minP: 0.05 }],
  ['all of them', { temperature: 1.5, topK: 40, topP: 0.9, minP: 0.02 }],
])('first tokens are drawn with the exact probabilities: %s', async (_, options) => {
  const draws = 20_000;
  const vocabSize = policy.config.vocabSize;
  const logits = (await policy.logits(prompt)).slice(-vocabSize);
  const exact = distribution(logits, options);
  const [group] = await policy.sample([prompt], { ...options, n: draws, maxTokens: 1, seed: 3 });
  const counts = new Int32Array(vocabSize);
  for (const { tokens, samplingLogprobs } of group?.completions ?? []) {
    const token = tokens[0] as number;
    counts[token] = (counts[token] as number) + 1;
    expect(Math.abs((samplingLogprobs[0] as number) - Math.log(exact[token] as number))).toBeLessThan(1e-4);
  }
  expect(chiSquareTest(counts, exact)).toBeGreaterThan(1e-3);
});

test('what is sampled with a log-probability is scored with it, over 1,000 tokens', async () => {
  const prompts = [prompt, [...prompt, 78, 89], [91, 85, 265, 270]];
  const groups = await policy.sample(prompts, {
    n: 8,
    maxTokens: 60,
    temperature: 1.3,
    topP: 0.95,
    seed: 11,
  });
  const forest = groups.map(({ promptTokens, completions }) => ({
    tokens: promptTokens,
    children: completions.map(({ tokens }) => ({ tokens, train: {} })),
  }));
  const { logprobs, entropies } = await policy.score(forest, { temperature: 1.3 });
  const completions = groups.flatMap((group) => group.completions);
  let tokens = 0;
  let gap = 0;
  completions.forEach((completion, i) => {
    for (let t = 0; t < completion.tokens.length; ++t) {
      ++tokens;
      gap = Math.max(gap, Math.abs((completion.logprobs[t] as number) - (logprobs[i]?.[t] as number)));
      gap = Math.max(gap, Math.abs((completion.entropies[t] as number) - (entropies[i]?.[t] as number)));
    }
  });
  report(`sample against score, largest gap over ${tokens} tokens`, gap);
  expect(tokens).toBeGreaterThanOrEqual(1000);
  expect(gap).toBeLessThan(1e-5);
});

test('a completion does not depend on what else is in the batch', async () => {
  const options = { n: 3, maxTokens: 20, seed: 5 };
  const others = [[40], [...prompt, 84]];
  const [alone] = await policy.sample([prompt], { ...options, keys: [17] });
  const together = await policy.sample([others[0] as number[], prompt, others[1] as number[]], {
    ...options,
    keys: [1, 17, 2],
  });
  expect(together[1]?.completions.map(({ tokens }) => Array.from(tokens))).toEqual(
    alone?.completions.map(({ tokens }) => Array.from(tokens)),
  );
});
