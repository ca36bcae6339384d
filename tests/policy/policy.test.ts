import { existsSync, readdirSync, readFileSync, statSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterAll, afterEach, beforeAll, describe, expect, test } from '@jest/globals';
import { countTokens, forestOf } from '../../lib/policy/branches.js';
import { type CompletionGroup, type Forest, Policy, type SampleChunk } from '../../lib/policy/index.js';
import { relativeError } from '../support/compare.js';
import {
  expectFailure,
  ggufFields,
  ggufFile,
  ggufTensors,
  temporaryDirectory,
  tinyConfig,
  tokenizerFiles,
  writeTinyModel,
} from './helpers.js';

let directory: { path: string; remove: () => void };
let model: string;
const open = new Set<Policy>();
let count = 0;

beforeAll(() => {
  directory = temporaryDirectory();
  model = writeTinyModel(join(directory.path, 'tiny'));
});
afterAll(() => directory.remove());
afterEach(() => {
  for (const policy of open) policy.dispose();
  open.clear();
});

async function load(path = model, options: Parameters<typeof Policy.load>[1] = {}): Promise<Policy> {
  const policy = await Policy.load(path, { dtype: 'f32', ...options });
  open.add(policy);
  return policy;
}

const fresh = (name: string) => join(directory.path, `${name}-${count++}`);
const prompt = [40, 41, 42, 43, 44];
const completions = [
  [50, 51, 52],
  [60, 61, 62, 63, 64],
  [70, 71],
];

function forest(logprobs?: number): Forest {
  return [
    {
      tokens: prompt,
      children: completions.map((tokens, i) => ({
        tokens,
        train: {
          advantage: [1, -0.5, 0.25][i],
          ...(logprobs !== undefined && { logprobs: tokens.map(() => logprobs) }),
        },
      })),
    },
  ];
}

async function gradients(policy: Policy): Promise<Map<string, Float32Array>> {
  const all = new Map<string, Float32Array>();
  for (const { name } of policy.parameters()) all.set(name, await policy.readParameter(name, 'gradient'));
  return all;
}

async function values(policy: Policy): Promise<Map<string, Float32Array>> {
  const all = new Map<string, Float32Array>();
  for (const { name } of policy.parameters()) all.set(name, await policy.readParameter(name));
  return all;
}

const optimizer = { learningRate: 1e-3, weightDecay: 0.01, maxGradNorm: 1 };

async function train(policy: Policy, steps: number): Promise<void> {
  for (let i = 0; i < steps; ++i) {
    await policy.forwardBackward(forest(), { type: 'grpo' });
    expect(await policy.optimStep(optimizer)).toMatchObject({ applied: true });
  }
}

describe('loading', () => {
  test('a directory and a GGUF file of the same weights give the same logits', async () => {
    const path = join(directory.path, 'tiny.gguf');
    writeFileSync(path, ggufFile(ggufFields(), ggufTensors()));
    const [fromDirectory, fromGguf] = [await load(), await load(path)];
    expect(fromGguf.config).toEqual(fromDirectory.config);
    const logits = await fromDirectory.logits(prompt);
    expect(logits).toHaveLength(prompt.length * tinyConfig.vocabSize);
    expect(Math.max(...logits) - Math.min(...logits)).toBeGreaterThan(0.1);
    expect(await fromGguf.logits(prompt)).toEqual(logits);
  });

  test('chooses f32 for a small model, and refuses what there is not', async () => {
    const policy = await load(model, { dtype: 'auto' });
    expect(policy.dtype).toBe('f32');
    expect(policy.device.name).toBe('cpu');
    expect(policy.contextLength).toBe(128);
    await expectFailure(() => load(model, { device: 'abacus' }), 'INVALID_ARGUMENT', 'device', 'abacus');
    await expectFailure(() => load(model, { dtype: 'f16' as 'f32' }), 'INVALID_ARGUMENT', 'dtype');
    await expectFailure(() => load(model, { threads: -1 }), 'INVALID_ARGUMENT', 'threads');
    await expectFailure(() => load(join(directory.path, 'no.gguf')), 'FILE_NOT_FOUND', 'no.gguf');
    await expectFailure(() => load(model, { signal: AbortSignal.abort() }), 'ABORTED');
    await expectFailure(() => Policy.load(undefined as unknown as string), 'INVALID_ARGUMENT', 'path');
  });

  test('refuses a tokenizer that merges to more tokens than the model has rows', async () => {
    const files = tokenizerFiles();
    const model = files.tokenizer.model as { vocab: Record<string, number> };
    model.vocab = { ...model.vocab, x: 400 };
    const path = writeTinyModel(fresh('large'), { 'tokenizer.json': JSON.stringify(files.tokenizer) });
    await expectFailure(() => load(path), 'MALFORMED_FILE', '272 tokens', '401');
  });

  test('takes an added token without a row, until it is used', async () => {
    const files = tokenizerFiles();
    (files.tokenizer.added_tokens as object[]).push({ id: 400, content: '<x>', special: true });
    const path = writeTinyModel(fresh('unused'), {
      'tokenizer.json': JSON.stringify(files.tokenizer),
      'generation_config.json': JSON.stringify({ eos_token_id: [0, 400] }),
    });
    const policy = await load(path);
    const [group] = await policy.sample(['hello'], { maxTokens: 4, stop: ['<x>'] });
    expect(group?.completions[0]?.tokens.length).toBeGreaterThan(0);
    await expectFailure(() => policy.sample(['a<x>']), 'INVALID_ARGUMENT', /prompts\[0\]/, '400');
  });

  test('random weights are a function of the seed', async () => {
    const create = async (seed: number) => {
      const policy = await Policy.create(tinyConfig, tokenizerFiles(), { seed, dtype: 'f32' });
      open.add(policy);
      return policy.logits(prompt);
    };
    expect(await create(1)).toEqual(await create(1));
    expect(await create(2)).not.toEqual(await create(1));
    const bad = { ...tinyConfig, heads: 3 };
    await expectFailure(() => Policy.create(bad, tokenizerFiles()), 'INVALID_ARGUMENT', 'config.heads');
    await expectFailure(
      () => Policy.create({ ...tinyConfig, layers: 0 }, tokenizerFiles()),
      'INVALID_ARGUMENT',
      'layers',
    );
  });
});

describe('sample', () => {
  test('gives groups with the log-probabilities that score gives', async () => {
    const policy = await load();
    const groups = await policy.sample([prompt, 'hello', { messages: [{ role: 'user', content: 'hi' }] }], {
      n: 3,
      maxTokens: 12,
      seed: 5,
    });
    expect(groups).toHaveLength(3);
    expect(groups[0]?.promptTokens).toEqual(prompt);
    for (const { promptTokens, completions: group } of groups) {
      expect(group).toHaveLength(3);
      const scores = await policy.score([
        { tokens: promptTokens, children: group.map(({ tokens }) => ({ tokens, train: {} })) },
      ]);
      group.forEach((completion, i) => {
        expect(completion.tokens.length).toBeGreaterThan(0);
        expect(completion.tokens.length).toBeLessThanOrEqual(12);
        const ends = new Set(policy.tokenizer.eosIds);
        expect(completion.text).toBe(policy.tokenizer.decode(completion.tokens, { skip: ends }));
        expect(completion.finishReason === 'length').toBe(
          completion.tokens.length === 12 && ![0, 2].includes(completion.tokens[11] as number),
        );
        completion.logprobs.forEach((logprob, t) => {
          expect(Math.abs(logprob - (scores.logprobs[i]?.[t] as number))).toBeLessThan(1e-5);
          expect(
            Math.abs((completion.entropies[t] as number) - (scores.entropies[i]?.[t] as number)),
          ).toBeLessThan(1e-4);
        });
      });
    }
  });

  test('draws a completion whatever else is in the batch', async () => {
    const policy = await load();
    const options = { n: 2, maxTokens: 10, seed: 9 };
    const [alone] = await policy.sample([prompt], { ...options, keys: [7] });
    const together = await policy.sample([[1, 5, 6], prompt, [...prompt, 8]], {
      ...options,
      keys: [1, 7, 2],
    });
    expect(together[1]?.completions.map(({ tokens }) => tokens)).toEqual(
      alone?.completions.map(({ tokens }) => tokens),
    );
    expect(alone?.completions[0]?.tokens).not.toEqual(alone?.completions[1]?.tokens);
    const [other] = await policy.sample([prompt], { ...options, keys: [8] });
    expect(other?.completions[0]?.tokens).not.toEqual(alone?.completions[0]?.tokens);
    const [reseeded] = await policy.sample([prompt], { ...options, keys: [7], seed: 10n });
    expect(reseeded?.completions[0]?.tokens).not.toEqual(alone?.completions[0]?.tokens);
  });

  test('gives equal prompts, and prompts within prompts, completions of their own', async () => {
    const policy = await load();
    const options = { maxTokens: 8, seed: 3 };
    const groups = await policy.sample([prompt, prompt.slice(0, 3), prompt], { ...options, keys: [1, 2, 1] });
    expect(groups[0]?.completions).toEqual(groups[2]?.completions);
    const [inner] = await policy.sample([prompt.slice(0, 3)], { ...options, keys: [2] });
    expect(groups[1]?.completions[0]?.tokens).toEqual(inner?.completions[0]?.tokens);
  });

  test('stops at strings and ids, and says so', async () => {
    const policy = await load();
    const [free] = await policy.sample([prompt], { maxTokens: 30, seed: 2 });
    const tokens = free?.completions[0]?.tokens ?? new Int32Array(0);
    expect(tokens.length).toBeGreaterThan(5);
    const fourth = tokens[3] as number;
    const first = tokens.indexOf(fourth);
    const [byId] = await policy.sample([prompt], { maxTokens: 30, seed: 2, stopTokenIds: [fourth] });
    expect(byId?.completions[0]).toMatchObject({ tokens: tokens.slice(0, first + 1), finishReason: 'stop' });

    // No special token has this letter in its name.
    const ascii = policy.tokenizer.encode('b')[0] as number;
    const found = await policy.sample([prompt], { n: 64, maxTokens: 60, seed: 4, stop: ['b'] });
    const stopped = found[0]?.completions.filter(({ finishReason }) => finishReason === 'stop_string') ?? [];
    expect(stopped.length).toBeGreaterThan(0);
    for (const completion of stopped) {
      expect(completion.text).toMatch(/b$/);
      expect(completion.text.indexOf('b')).toBe(completion.text.length - 1);
      expect(completion.tokens.at(-1)).toBe(ascii);
    }
  });

  test('writes special tokens into the text, finds them as stop strings, and leaves the end token out', async () => {
    const policy = await load();
    const name = '<|im_start|>';
    const [group] = await policy.sample([prompt], { n: 256, maxTokens: 60, seed: 4, stop: [`${name}`] });
    const completions = group?.completions ?? [];
    const stopped = completions.filter(({ finishReason }) => finishReason === 'stop_string');
    expect(stopped.length).toBeGreaterThan(0);
    for (const { text, tokens } of stopped) {
      expect(text.endsWith(name)).toBe(true);
      expect(text.indexOf(name)).toBe(text.length - name.length);
      expect(tokens.at(-1)).toBe(1);
    }
    const ended = completions.filter(({ finishReason }) => finishReason === 'stop');
    expect(ended.length).toBeGreaterThan(0);
    for (const { text, tokens } of ended) {
      expect([0, 2]).toContain(tokens.at(-1));
      expect(text).toBe(policy.tokenizer.decode(tokens.slice(0, -1)));
    }
  });

  test('streams what it draws', async () => {
    const policy = await load();
    const chunks: SampleChunk[] = [];
    const groups = await policy.sample([prompt, [1, 2]], {
      n: 2,
      maxTokens: 15,
      seed: 6,
      onToken: (chunk) => chunks.push(chunk),
    });
    groups.forEach((group, p) => {
      group.completions.forEach((completion, c) => {
        const own = chunks.filter((chunk) => chunk.prompt === p && chunk.completion === c);
        expect(own.flatMap(({ tokens }) => tokens)).toEqual(Array.from(completion.tokens));
        expect(completion.text.startsWith(own.map(({ text }) => text).join(''))).toBe(true);
      });
    });
  });

  test('fills the context and no more', async () => {
    const policy = await load();
    const long = Array.from({ length: 120 }, (_, i) => 10 + i);
    const [group] = await policy.sample([long], { maxTokens: 1000, seed: 1, n: 8 });
    for (const { tokens, finishReason } of group?.completions ?? []) {
      expect(tokens.length).toBeLessThanOrEqual(8);
      if (finishReason === 'length') expect(tokens.length).toBe(8);
    }
    const full = [...long, ...long].slice(0, 128);
    await expectFailure(() => policy.sample([prompt, full]), 'CONTEXT_EXCEEDED', '128', /prompts\[1\]/);
  });

  test.each([
    [{ n: 0 }, 'n'],
    [{ n: 1.5 }, 'n'],
    [{ maxTokens: 0 }, 'maxTokens'],
    [{ temperature: -1 }, 'temperature'],
    [{ temperature: Number.NaN }, 'temperature'],
    [{ topK: -1 }, 'topK'],
    [{ topP: 0 }, 'topP'],
    [{ topP: 1.1 }, 'topP'],
    [{ minP: 2 }, 'minP'],
    [{ seed: -1 }, 'seed'],
    [{ seed: 2n ** 64n }, 'seed'],
    [{ keys: [1, 2] }, 'keys'],
    [{ keys: [-1] }, 'keys'],
    [{ stop: [''] }, 'stop'],
    [{ stop: 'text' }, 'stop'],
    [{ stopTokenIds: [272] }, 'stopTokenIds'],
  ])('refuses %p', async (options, part) => {
    const policy = await load();
    await expectFailure(() => policy.sample([prompt], options as object), 'INVALID_ARGUMENT', part);
  });

  test('refuses prompts that are none', async () => {
    const policy = await load();
    for (const bad of [[[]], [[272]], [[-1]], [[1.5]], [5], [null], [''], [{ messages: [] }]]) {
      await expectFailure(() => policy.sample(bad as never), 'INVALID_ARGUMENT');
    }
    await expectFailure(() => policy.sample('hello' as never), 'INVALID_ARGUMENT', 'prompts');
    expect(await policy.sample([])).toEqual([]);
  });

  test('can be aborted before and in the middle, and works on afterwards', async () => {
    const policy = await load();
    await expectFailure(() => policy.sample([prompt], { signal: AbortSignal.abort() }), 'ABORTED');
    const controller = new AbortController();
    const options = { n: 512, maxTokens: 123, signal: controller.signal, onToken: () => controller.abort() };
    await expectFailure(() => policy.sample([prompt], options), 'ABORTED');
    expect(await policy.sample([prompt], { maxTokens: 4 })).toHaveLength(1);
  });
});

describe('forwardBackward and optimStep', () => {
  test('add the same gradient in whatever batches', async () => {
    const policy = await load();
    const whole = await policy.forwardBackward(forest(-5.5), { type: 'dapo' });
    const expected = await gradients(policy);
    await policy.zeroGradients();
    const parts = await policy.forwardBackward(forest(-5.5), { type: 'dapo' }, { maxTokens: 8 });
    expect(parts.loss).toBeCloseTo(whole.loss, 6);
    expect(parts.tokens).toBe(10);
    for (const [name, gradient] of await gradients(policy)) {
      const reference = expected.get(name) as Float32Array;
      const norm = Math.hypot(...reference);
      const difference = Math.hypot(...gradient.map((g, i) => g - (reference[i] as number)));
      expect(difference).toBeLessThanOrEqual(1e-5 * norm);
    }
  });

  test.each([
    ['all weights', {}],
    ['adapters', { lora: { rank: 4 } }],
    ['bf16', { dtype: 'bf16' as const }],
  ])(
    'take what sampling kept, for the same gradient and while the weights are the same: %s',
    async (_, options) => {
      const policy = await load(model, { ...options, profile: true });
      const prompts = [
        [4, 8, 15, 16, 23, 42],
        [4, 8, 15, 16, 7],
        [9, 3],
      ];
      const sampling = { n: 3, maxTokens: 9, seed: 5 };
      const groups = await policy.sample(prompts, { ...sampling, keepActivations: 2 ** 28 });
      const withAdvantages = (groups: CompletionGroup[]) =>
        forestOf(
          groups.map(({ promptTokens, completions }) => ({
            promptTokens,
            completions: completions.map(({ tokens, logprobs }, i) => ({
              tokens,
              train: { advantage: i - 1, logprobs },
            })),
          })),
        );
      const sampled = withAdvantages(groups);
      /** The products of a forward pass that a call makes, by layer. */
      const products = async (maxTokens?: number, forest = sampled) => {
        policy.takeProfile();
        await policy.forwardBackward(forest, { type: 'grpo' }, { maxTokens });
        const calls = policy.takeProfile().filter(({ name }) => name.startsWith('linear '));
        return calls.reduce((sum, { calls }) => sum + calls, 0) / policy.config.layers;
      };
      // An adapter adds two to each of the four, and one in the backward.
      const adapters = 'lora' in options ? 1 : 0;
      const all = 4 + 12 * adapters;
      const rest = 1 + 6 * adapters;
      const keep = () => policy.sample(prompts, { ...sampling, keepActivations: 2 ** 28 });
      expect(await products()).toBe(rest);
      const kept = await gradients(policy);
      await policy.zeroGradients();
      expect(await keep()).toEqual(groups);
      await products(8);
      const keptInMicroBatches = await gradients(policy);

      // Gradients that are not 0 stay where they are, and what is kept beside them serves as often as it is asked for.
      await keep();
      expect(await gradients(policy)).toEqual(keptInMicroBatches);
      expect(await products()).toBe(rest);
      expect(await products()).toBe(rest);
      const thrice = await gradients(policy);
      await policy.zeroGradients();

      expect(await policy.sample(prompts, sampling)).toEqual(groups);
      expect(await products()).toBe(all);
      for (const [name, expected] of await gradients(policy)) {
        if (expected.every((value) => value === 0)) continue;
        const third = thrice.get(name)?.map((value) => value / 3);
        for (const actual of [kept.get(name), keptInMicroBatches.get(name), third]) {
          expect(relativeError(actual as Float32Array, expected)).toBeLessThan(
            'dtype' in options ? 0.03 : 1e-5,
          );
        }
      }
      await policy.zeroGradients();

      // What stands in gradients that are 0 has gone once they are read, or have been added to.
      await keep();
      for (const gradient of (await gradients(policy)).values())
        expect(gradient.every((g) => g === 0)).toBe(true);
      expect(await products()).toBe(all);
      await policy.zeroGradients();
      await keep();
      expect(await products()).toBe(rest);
      expect(await products()).toBe(all);
      await policy.zeroGradients();
      const controller = new AbortController();
      const onToken = () => controller.abort();
      await expect(
        policy.sample(prompts, { ...sampling, keepActivations: 2 ** 28, onToken, signal: controller.signal }),
      ).rejects.toMatchObject({ code: 'ABORTED' });
      for (const gradient of (await gradients(policy)).values())
        expect(gradient.every((g) => g === 0)).toBe(true);
      // The forest then has a completion that was not sampled beside those that were.
      const train = { advantage: 1, logprobs: [-5, -5] };
      const more = [...sampled, { tokens: [30, 31], children: [{ tokens: [32, 33], train }] }];
      // Nothing depends on the last token of a completion.
      const tokens = countTokens(sampled) - prompts.length * sampling.n;
      expect(await products(tokens, more)).toBe(2 * all);
      const expected = await gradients(policy);
      await policy.zeroGradients();
      await keep();
      expect(await products(tokens, more)).toBe(all + rest);
      for (const [name, actual] of await gradients(policy)) {
        const reference = expected.get(name) as Float32Array;
        if (reference.every((value) => value === 0)) continue;
        expect(relativeError(actual, reference)).toBeLessThan('dtype' in options ? 0.03 : 1e-5);
      }

      await policy.zeroGradients();

      // Completions that begin alike.
      const greedy = { ...sampling, temperature: 0 };
      const alike = withAdvantages(await policy.sample(prompts, { ...greedy, keepActivations: 2 ** 28 }));
      expect(await products(undefined, alike)).toBe(rest);
      await policy.zeroGradients();

      // Too little room; a completion that was not sampled; other weights.
      await policy.sample(prompts, { ...sampling, keepActivations: 1000 });
      expect(await products()).toBe(all);
      await policy.sample([[1, 2]], { ...sampling, keepActivations: 2 ** 28 });
      expect(await products()).toBe(all);
      await policy.sample(prompts, { ...sampling, keepActivations: 2 ** 28 });
      await policy.optimStep({ learningRate: 1e-4 });
      expect(await products()).toBe(all);
    },
  );

  test('take the policy itself where old log-probabilities are missing: the ratio is 1', async () => {
    const policy = await load();
    const stats = await policy.forwardBackward(forest(), { type: 'grpo' });
    expect(stats.ratio).toEqual({ mean: 1, min: 1, max: 1 });
    expect(stats.loss).toBeCloseTo(-(1 - 0.5 + 0.25) / 3, 5);
    const scores = await policy.score(forest());
    expect(stats.logprobs.map((row) => row.length)).toEqual([3, 5, 2]);
    for (const [i, row] of stats.logprobs.entries()) {
      for (const [t, value] of row.entries()) expect(value).toBeCloseTo(scores.logprobs[i]?.[t] as number, 4);
    }
  });

  test('raise the probability of what had a positive advantage', async () => {
    const policy = await load();
    const before = await policy.score(forest());
    await train(policy, 5);
    const after = await policy.score(forest());
    const total = (row?: Float32Array) => Array.from(row ?? []).reduce((sum, value) => sum + value, 0);
    expect(total(after.logprobs[0])).toBeGreaterThan(total(before.logprobs[0]));
    expect(total(after.logprobs[1])).toBeLessThan(total(before.logprobs[1]));
    expect(policy.optimizerStep).toBe(5);
  });

  test('leave masked tokens out', async () => {
    const policy = await load();
    const masked: Forest = [
      { tokens: prompt, children: [{ tokens: [50, 51], train: { advantage: 1, mask: [0, 0] } }] },
    ];
    const stats = await policy.forwardBackward(masked, { type: 'grpo' });
    expect(stats).toMatchObject({ loss: 0, tokens: 0 });
    for (const gradient of (await gradients(policy)).values())
      expect(gradient.every((g) => g === 0)).toBe(true);
  });

  test('say that a loss is not finite, and leave no gradients', async () => {
    const policy = await load();
    await policy.forwardBackward(forest(), { type: 'grpo' });
    const loss = { type: 'grpo', clipLow: 0, clipHigh: 1e30 } as const;
    expect(await policy.forwardBackward(forest(-1e4), loss)).toMatchObject({ finite: false });
    for (const gradient of (await gradients(policy)).values())
      expect(gradient.every((g) => g === 0)).toBe(true);
  });

  test('can be aborted, and leave no part of a batch behind', async () => {
    const policy = await load();
    const many: Forest = Array.from({ length: 400 }, () => forest(-5)[0] as Forest[number]);
    const controller = new AbortController();
    const running = policy.forwardBackward(
      many,
      { type: 'grpo' },
      { maxTokens: 15, signal: controller.signal },
    );
    setTimeout(() => controller.abort(), 20);
    await expectFailure(() => running, 'ABORTED');
    const allZero = async () =>
      [...(await gradients(policy)).values()].every((gradient) => gradient.every((g) => g === 0));
    expect(await allZero()).toBe(true);
    // One that never began leaves nothing of an earlier call either.
    await policy.forwardBackward(forest(-5), { type: 'grpo' });
    expect(await allZero()).toBe(false);
    const aborted = { signal: AbortSignal.abort() };
    await expectFailure(() => policy.forwardBackward(forest(-5), { type: 'grpo' }, aborted), 'ABORTED');
    expect(await allZero()).toBe(true);
    await train(policy, 1);
  });

  test('refuse bad options', async () => {
    const policy = await load();
    const { optimStep } = { optimStep: (o: object) => policy.optimStep({ learningRate: 1, ...o }) };
    for (const [key, value] of [
      ['learningRate', -1],
      ['learningRate', Number.NaN],
      ['beta1', 1],
      ['beta2', -0.1],
      ['epsilon', '1'],
      ['epsilon', 0],
      ['epsilon', 1e-40],
      ['maxGradNorm', -1],
      ['learningRate', 1e-50],
      ['maxGradNorm', 1e-50],
    ]) {
      await expectFailure(() => optimStep({ [key as string]: value }), 'INVALID_ARGUMENT', key as string);
    }
    await expectFailure(
      () => policy.forwardBackward(forest(), { type: 'ppo' as 'grpo' }),
      'INVALID_ARGUMENT',
      'ppo',
    );
    await expectFailure(
      () => policy.forwardBackward(forest(), { type: 'grpo' }, { maxTokens: 0 }),
      'INVALID_ARGUMENT',
      'maxTokens',
    );
    await expectFailure(() => policy.score([{ tokens: [1, 272], train: {} }]), 'INVALID_ARGUMENT', '272');
    await expectFailure(() => policy.logits([]), 'INVALID_ARGUMENT', 'tokens');
  });

  test('say where an update left weights that are not finite', async () => {
    const policy = await load();
    await policy.forwardBackward(forest(), { type: 'grpo' });
    await expectFailure(
      () => policy.optimStep({ learningRate: 1e38 }),
      'NON_FINITE',
      'layernorm.weight that are not finite: the learning rate 1e+38 is too high',
    );
  });

  test('need a trainable policy', async () => {
    const policy = await load(model, { trainable: false });
    await expectFailure(() => policy.forwardBackward(forest(), { type: 'grpo' }), 'UNSUPPORTED', 'trainable');
    await expectFailure(() => policy.optimStep(optimizer), 'UNSUPPORTED', 'trainable');
    await expectFailure(() => policy.saveState(fresh('state')), 'UNSUPPORTED', 'trainable');
    expect((await policy.score(forest())).logprobs).toHaveLength(3);
  });
});

describe('save', () => {
  test('writes a model that loads with the same weights', async () => {
    const policy = await load();
    await train(policy, 2);
    const path = fresh('saved');
    await policy.save(path);
    const again = await load(path);
    expect(await values(again)).toEqual(await values(policy));
    expect(await again.logits(prompt)).toEqual(await policy.logits(prompt));
    expect(again.tokenizer.eosIds).toEqual(policy.tokenizer.eosIds);
    expect(again.tokenizer.applyChatTemplate([{ role: 'user', content: 'x' }])).toBe(
      policy.tokenizer.applyChatTemplate([{ role: 'user', content: 'x' }]),
    );
  });

  test('turns a GGUF file into a Hugging Face directory', async () => {
    const gguf = join(directory.path, 'convert.gguf');
    writeFileSync(gguf, ggufFile(ggufFields(), ggufTensors()));
    const policy = await load(gguf);
    const path = fresh('converted');
    await policy.save(path);
    const again = await load(path);
    expect(again.config).toEqual(policy.config);
    expect(await again.logits(prompt)).toEqual(await policy.logits(prompt));
    expect(again.tokenizer.encode('hello <|im_end|> né')).toEqual(
      policy.tokenizer.encode('hello <|im_end|> né'),
    );
    expect(again.tokenizer.eosIds).toEqual(policy.tokenizer.eosIds);
  });

  test('rounds to bfloat16 where asked to', async () => {
    const policy = await load();
    const path = fresh('rounded');
    await policy.save(path, { dtype: 'bf16' });
    expect(JSON.parse(readFileSync(join(path, 'config.json'), 'utf8'))).toMatchObject({
      torch_dtype: 'bfloat16',
    });
    const rounded = await values(await load(path));
    for (const [name, exact] of await values(policy)) {
      rounded.get(name)?.forEach((value, i) => {
        expect(Math.abs(value - (exact[i] as number))).toBeLessThanOrEqual(
          Math.abs(exact[i] as number) * 2 ** -8,
        );
      });
    }
  });

  test('divides the weights where asked to', async () => {
    const policy = await load();
    const path = fresh('sharded');
    await policy.save(path, { maxShardBytes: 40_000 });
    const shards = readdirSync(path).filter((name) => name.endsWith('.safetensors'));
    expect(shards.length).toBeGreaterThan(1);
    expect(shards).not.toContain('model.safetensors');
    for (const shard of shards) expect(statSync(join(path, shard)).size).toBeLessThan(44_000);
    expect(await values(await load(path))).toEqual(await values(policy));
    await expectFailure(() => policy.save(path, { maxShardBytes: 0 }), 'INVALID_ARGUMENT', 'maxShardBytes');
  });

  test('keeps other files of the directory and replaces its own', async () => {
    const policy = await load();
    const path = writeTinyModel(fresh('kept'), {
      'notes.txt': 'mine',
      'model-00001-of-00002.safetensors': 'old shard',
    });
    await policy.save(path);
    expect(readFileSync(join(path, 'notes.txt'), 'utf8')).toBe('mine');
    expect(existsSync(join(path, 'model-00001-of-00002.safetensors'))).toBe(false);
    expect(await values(await load(path))).toEqual(await values(policy));
    await expectFailure(() => policy.save(join(path, 'notes.txt')), 'INVALID_ARGUMENT', 'notes.txt');
    await expectFailure(() => policy.save(join(path, 'notes.txt', 'deeper')), 'INVALID_ARGUMENT', 'deeper');
    expect(readFileSync(join(path, 'notes.txt'), 'utf8')).toBe('mine');
  });
});

describe('saveState and loadState', () => {
  test.each(['f32', 'bf16'] as const)('go on bit for bit: %s', async (dtype) => {
    const policy = await load(model, { dtype });
    await train(policy, 2);
    const path = fresh('state');
    await policy.saveState(path);
    await train(policy, 3);

    const resumed = await load(model, { dtype });
    await resumed.loadState(path);
    expect(resumed.optimizerStep).toBe(2);
    await train(resumed, 3);
    expect(await values(resumed)).toEqual(await values(policy));
    expect(resumed.optimizerStep).toBe(5);
  });

  test('refuse a state of another model, or one that was cut or changed, and change nothing', async () => {
    const policy = await load();
    const path = fresh('state');
    await policy.saveState(path);
    const other = await Policy.create({ ...tinyConfig, mlpSize: 64 }, tokenizerFiles(), { dtype: 'f32' });
    open.add(other);
    await expectFailure(() => other.loadState(path), 'RESUME_MISMATCH', 'mlpSize 64 but found 48');

    await train(policy, 1);
    const before = await values(policy);
    const file = join(path, 'state.safetensors');
    const bytes = readFileSync(file);
    writeFileSync(file, bytes.subarray(0, bytes.length - 4));
    await expectFailure(() => policy.loadState(path), 'MALFORMED_FILE', 'state.safetensors');
    const flipped = Buffer.from(bytes);
    flipped[bytes.length - 100] = (flipped[bytes.length - 100] as number) ^ 1;
    writeFileSync(file, flipped);
    await expectFailure(() => policy.loadState(path), 'MALFORMED_FILE', 'SHA-256');
    writeFileSync(join(path, 'state.json'), '{}');
    await expectFailure(() => policy.loadState(path), 'MALFORMED_FILE', 'state.json');
    await expectFailure(() => policy.loadState(fresh('none')), 'FILE_NOT_FOUND', 'state.json');
    expect(await values(policy)).toEqual(before);
    expect(policy.optimizerStep).toBe(1);
  });
});

describe('dispose', () => {
  test('ends the policy', async () => {
    const policy = await load();
    const queued = policy.score(forest());
    policy.dispose();
    policy.dispose();
    await queued.catch((error) => expect(error).toMatchObject({ code: 'DISPOSED' }));
    for (const run of [
      () => policy.sample([prompt]),
      () => policy.score(forest()),
      () => policy.forwardBackward(forest(), { type: 'grpo' }),
      () => policy.optimStep(optimizer),
      () => policy.save(fresh('x')),
      () => policy.loadState('x'),
      () => policy.memory(),
      () => policy.parameters(),
    ]) {
      await expectFailure(run, 'DISPOSED');
    }
  });

  test('calls run in the order in which they were made', async () => {
    const policy = await load();
    const order: string[] = [];
    const note = (name: string) => () => order.push(name);
    await Promise.all([
      policy.forwardBackward(forest(), { type: 'grpo' }).then(note('forwardBackward')),
      policy.optimStep(optimizer).then(note('optimStep')),
      policy.score(forest()).then(note('score')),
      policy.sample([prompt], { maxTokens: 2 }).then(note('sample')),
    ]);
    expect(order).toEqual(['forwardBackward', 'optimStep', 'score', 'sample']);
  });
});
