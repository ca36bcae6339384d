import { afterAll, beforeAll, describe, expect, test } from '@jest/globals';
import { type Forest, type Loss, Policy, type Segment } from '../../lib/policy/index.js';
import { largestGap, relativeError } from '../support/compare.js';
import { type FixtureTensor, fixturePath, readJson, readTensors } from '../support/fixtures.js';
import { report } from '../support/report.js';

interface Expected {
  text: string;
  tokens: number[];
  greedy: number[];
  batch: { root: number[]; groups: { question: number[]; completions: number[][] }[]; advantages: number[] };
  crossEntropy: number;
  grpo: { loss: number; clipLow: number; clipHigh: number; kl: number };
  encodings: { text: string; ids: number[]; decoded: string }[];
  chat: { messages: { role: 'system' | 'user'; content: string }[]; rendered: string };
}

describe.each(['llama', 'qwen2'])('%s agrees with transformers', (name) => {
  const expected = readJson<Expected>(`${name}/expected.json`);
  let tensors: Map<string, FixtureTensor>;
  let policy: Policy;
  /** Per completion, cut from the fixture's concatenation. */
  let old: Float32Array[];
  let reference: Float32Array[];

  const floats = (key: string) => tensors.get(key)?.data as Float32Array;
  const completions = expected.batch.groups.flatMap((group) => group.completions);

  function byCompletion(values: Float32Array): Float32Array[] {
    const starts = completions.map((_, i) =>
      completions.slice(0, i).reduce((sum, { length }) => sum + length, 0),
    );
    return completions.map(({ length }, i) => values.subarray(starts[i], (starts[i] as number) + length));
  }

  function completionSegment(tokens: number[], index: number): Segment {
    const advantage = expected.batch.advantages[index];
    return { tokens, train: { advantage, logprobs: old[index], referenceLogprobs: reference[index] } };
  }

  /** The motivation is the root, questions its children, completions theirs. */
  function sharedForest(): Forest {
    let index = 0;
    const children = expected.batch.groups.map(({ question, completions }) => ({
      tokens: question,
      children: completions.map((tokens) => completionSegment(tokens, index++)),
    }));
    return [{ tokens: expected.batch.root, children }];
  }

  /** Every completion with a prompt of its own. */
  function unsharedForest(): Forest {
    let index = 0;
    return expected.batch.groups.flatMap(({ question, completions }) =>
      completions.map((tokens) => ({
        tokens: [...expected.batch.root, ...question],
        children: [completionSegment(tokens, index++)],
      })),
    );
  }

  async function gradients(forest: Forest, loss: Loss, maxTokens?: number) {
    const stats = await policy.forwardBackward(forest, loss, { maxTokens });
    const found = new Map<string, Float32Array>();
    for (const { name } of policy.parameters()) found.set(name, await policy.readParameter(name, 'gradient'));
    await policy.zeroGradients();
    return { stats, gradients: found };
  }

  /** The parameter whose gradient is furthest off, and by how much relative to its norm. */
  function worst(actual: Map<string, Float32Array>, expectedOf: (name: string) => ArrayLike<number>) {
    const errors = [...actual].map(([name, gradient]) => ({
      name,
      error: relativeError(gradient, expectedOf(name)),
    }));
    return errors.reduce((a, b) => (a.error >= b.error ? a : b));
  }

  beforeAll(async () => {
    tensors = readTensors(fixturePath(`${name}/expected.safetensors`));
    old = byCompletion(floats('old_logprobs'));
    reference = byCompletion(floats('reference_logprobs'));
    policy = await Policy.load(fixturePath(name), { dtype: 'f32' });
  });
  afterAll(() => policy.dispose());

  test('texts, ids and the rendered chat', () => {
    for (const { text, ids, decoded } of expected.encodings) {
      expect(policy.tokenizer.encode(text)).toEqual(ids);
      expect(policy.tokenizer.decode(ids)).toBe(decoded);
    }
    const rendered = policy.tokenizer.applyChatTemplate(expected.chat.messages, {
      addGenerationPrompt: true,
    });
    expect(rendered).toBe(expected.chat.rendered);
  });

  test('logits within 1e-5', async () => {
    const logits = await policy.logits(expected.tokens);
    const gap = largestGap(logits, floats('logits'));
    report(`${name}: logits, largest gap to transformers`, gap);
    expect(gap).toBeLessThan(1e-5);
  });

  test('log-probabilities and entropies of a forest within 1e-5', async () => {
    const scores = await policy.score(sharedForest());
    const flat = (rows: Float32Array[]) => Float32Array.from(rows.flatMap((row) => Array.from(row)));
    expect(largestGap(flat(scores.logprobs), floats('logprobs'))).toBeLessThan(1e-5);
    expect(largestGap(flat(scores.entropies), floats('entropies'))).toBeLessThan(1e-5);
  });

  test('the greedy continuation', async () => {
    const options = { temperature: 0, maxTokens: expected.greedy.length };
    const [group] = await policy.sample([expected.tokens], options);
    expect(Array.from(group?.completions[0]?.tokens ?? [])).toEqual(expected.greedy);
  });

  const grpo: Loss = { type: 'grpo', ...expected.grpo };
  describe.each([
    ['cross_entropy', { type: 'cross_entropy' } as Loss, expected.crossEntropy],
    ['grpo', grpo, expected.grpo.loss],
  ])('%s', (key, loss, value) => {
    test('loss within 1e-5 and the gradient of every parameter within 1e-4', async () => {
      const { stats, gradients: found } = await gradients(sharedForest(), loss);
      expect(stats.loss).toBeCloseTo(value, 5);
      const names = [...tensors.keys()]
        .filter((n) => n.startsWith(`${key}/`))
        .map((n) => n.slice(key.length + 1));
      expect([...found.keys()].sort()).toEqual(names.sort());
      const { name: furthest, error } = worst(found, (parameter) => floats(`${key}/${parameter}`));
      report(`${name}: ${key}, relative error of the worst gradient (${furthest})`, error);
      expect({ furthest, within: error < 1e-4 }).toEqual({ furthest, within: true });
    });

    test('a forest, its sequences unshared, and small batches give one loss and gradient', async () => {
      const shared = await gradients(sharedForest(), loss);
      for (const other of [
        await gradients(unsharedForest(), loss),
        await gradients(sharedForest(), loss, 40),
      ]) {
        expect(Math.abs(other.stats.loss - shared.stats.loss)).toBeLessThan(1e-6);
        const { name: furthest, error } = worst(
          other.gradients,
          (parameter) => shared.gradients.get(parameter) ?? [],
        );
        report(`${name}: ${key}, relative change of the worst gradient by sharing`, error);
        expect({ furthest, within: error < 1e-5 }).toEqual({ furthest, within: true });
      }
    });
  });

  test('the embedding of the padding token, read and predicted, is trained as the tied head alone', async () => {
    const padding = readJson<{ tokens: number[]; gradients: Record<string, number[][]> }>('padding.json');
    const [first, ...rest] = padding.tokens;
    const forest = [{ tokens: [first as number], children: [{ tokens: rest, train: {} }] }];
    await policy.forwardBackward(forest, { type: 'cross_entropy' });
    const gradient = await policy.readParameter('model.embed_tokens.weight', 'gradient');
    await policy.zeroGradients();
    const wanted = (padding.gradients[name] as number[][]).flat();
    expect(largestGap(gradient.subarray(0, wanted.length), wanted)).toBeLessThan(1e-5);
  });
});
