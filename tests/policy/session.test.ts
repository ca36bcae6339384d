import { join } from 'node:path';
import { afterAll, afterEach, beforeAll, expect, test } from '@jest/globals';
import {
  type CompletionGroup,
  type EndedCompletion,
  forestOf,
  Policy,
  type SampleChunk,
} from '../../lib/policy/index.js';
import { expectFailure, temporaryDirectory, writeTinyModel } from './helpers.js';

let directory: { path: string; remove: () => void };
let model: string;
const open = new Set<Policy>();

beforeAll(() => {
  directory = temporaryDirectory();
  model = writeTinyModel(join(directory.path, 'tiny'));
});
afterAll(() => directory.remove());
afterEach(() => {
  for (const policy of open) policy.dispose();
  open.clear();
});

async function load(options: Parameters<typeof Policy.load>[1] = {}): Promise<Policy> {
  const policy = await Policy.load(model, { device: 'cpu', dtype: 'f32', exact: true, ...options });
  open.add(policy);
  return policy;
}

const ids = (first: number, count: number) =>
  Array.from({ length: count }, (_, i) => 3 + ((first + 7 * i) % 250));
const motivation = ids(11, 37);
const rollout = [
  [...motivation, ...ids(1, 9)],
  [...motivation, ...ids(2, 4)],
];
const evaluation = [
  [...motivation, ...ids(3, 6)],
  [...motivation, ...ids(4, 1)],
];

/** Tokens that a call computed and found. */
async function counted(policy: Policy, call: () => Promise<unknown>) {
  policy.resetCacheStatistics();
  await call();
  const { tokensPrefilled, tokensReused } = await policy.cacheStatistics();
  return { tokensPrefilled, tokensReused };
}

/** Episodes of several turns, `group` for each prompt; the environment answers with `reply` tokens. */
async function turns(policy: Policy, count: number, group = 2, reply = 5): Promise<CompletionGroup[][]> {
  const all: CompletionGroup[][] = [];
  let prompts: number[][] = rollout;
  for (let turn = 0; turn < count; ++turn) {
    const first = turn === 0;
    const groups = await policy.sample(prompts, {
      n: first ? group : 1,
      maxTokens: 11,
      seed: 9,
      ...(!first && {
        keys: prompts.map((_, p) => Math.floor(p / group)),
        firstIndices: prompts.map((_, p) => turn * 100 + (p % group)),
      }),
    });
    all.push(groups);
    prompts = groups.flatMap(({ promptTokens, completions }, g) =>
      completions.map(({ tokens }, c) => [...promptTokens, ...tokens, ...ids(20 + 2 * g + c, reply)]),
    );
  }
  return all;
}

test('turns prefill their new tokens alone, and are the turns that a policy without a session draws', async () => {
  for (const dtype of ['f32', 'bf16'] as const) {
    const policy = await load({ dtype });
    const drawn = await turns(policy, 4);
    const completions = drawn.map((groups) => groups.flatMap((group) => group.completions));
    const { tokensPrefilled, tokensReused, bytes } = await policy.cacheStatistics();
    // The last token of a turn, which is drawn and not fed, and what the environment says.
    expect(tokensPrefilled).toBe(motivation.length + 9 + 4 + 3 * 4 * 6);
    expect(tokensReused).toBeGreaterThan(3 * motivation.length);
    expect(bytes).toBeGreaterThan(0);

    const plain = await load({ dtype, sessionBytes: 0 });
    expect(await turns(plain, 4)).toEqual(drawn);
    expect(await plain.cacheStatistics()).toMatchObject({ tokensReused: 0, bytes: 0 });
    // Turns have streams of their own.
    const texts = completions.flat().map(({ tokens }) => tokens.join());
    expect(new Set(texts).size).toBe(texts.length);

    // Whole episodes, trained on as the policy is that drew them.
    const last = drawn.at(-1) as CompletionGroup[];
    const stats = await policy.forwardBackward(
      forestOf(
        last.map(({ promptTokens, completions: [completion] }) => ({
          promptTokens,
          completions: [
            {
              tokens: completion?.tokens ?? [],
              train: { advantage: 1, logprobs: completion?.logprobs ?? [] },
            },
          ],
        })),
      ),
      { type: 'grpo' },
    );
    expect(stats.ratio).toEqual({ mean: 1, min: 1, max: 1 });
  }
});

test('an evaluation reuses the motivation of a rollout, and a change of the weights ends that', async () => {
  const policy = await load();
  const sample = (prompts: number[][]) => policy.sample(prompts, { n: 2, maxTokens: 6, seed: 1 });
  const first = await sample(rollout);
  expect(await counted(policy, () => sample(evaluation))).toEqual({ tokensPrefilled: 7, tokensReused: 37 });
  // Prompts that are known cost their last tokens alone, and get the same completions.
  expect(
    await counted(policy, async () => {
      expect(await sample(rollout)).toEqual(first);
    }),
  ).toEqual({ tokensPrefilled: 2, tokensReused: 48 });

  const forest = forestOf(
    first.map(({ promptTokens, completions }) => ({
      promptTokens,
      completions: completions.map(({ tokens, logprobs }, i) => ({
        tokens,
        train: { advantage: i - 0.5, logprobs },
      })),
    })),
  );
  await policy.score(forest);
  await policy.forwardBackward(forest, { type: 'grpo' });
  expect(await counted(policy, () => sample(rollout))).toEqual({ tokensPrefilled: 2, tokensReused: 48 });
  await policy.optimStep({ learningRate: 1e-3 });
  expect((await policy.cacheStatistics()).bytes).toBe(0);
  expect(await counted(policy, () => sample(rollout))).toEqual({ tokensPrefilled: 50, tokensReused: 0 });

  // A training state changes them, too.
  const state = join(directory.path, 'state');
  await policy.saveState(state);
  expect(await counted(policy, () => sample(rollout))).toEqual({ tokensPrefilled: 2, tokensReused: 48 });
  await policy.loadState(state);
  expect(await counted(policy, () => sample(rollout))).toEqual({ tokensPrefilled: 50, tokensReused: 0 });
});

test('activations that are kept for an update are computed, and what they give is found again', async () => {
  const policy = await load();
  const options = { n: 2, maxTokens: 6, seed: 1 };
  await policy.sample(rollout, options);
  const keeping = { ...options, keepActivations: 2 ** 24 };
  expect(await counted(policy, () => policy.sample(evaluation, keeping))).toEqual({
    tokensPrefilled: 44,
    tokensReused: 0,
  });
  expect(await counted(policy, () => policy.sample(evaluation, options))).toEqual({
    tokensPrefilled: 2,
    tokensReused: 42,
  });
});

test('what was used longest ago goes first where memory is short', async () => {
  // A page: 32 tokens of 2 layers, keys and values of 2 heads of 8 numbers.
  const page = 32 * 2 * 2 * 2 * 8 * 4;
  const policy = await load({ sessionBytes: 5 * page });
  const prefilled = async (first: number) => {
    const { tokensPrefilled } = await counted(policy, () =>
      policy.sample([ids(first, 64)], { maxTokens: 1, seed: 1 }),
    );
    expect((await policy.cacheStatistics()).bytes).toBeLessThanOrEqual(5 * page);
    return tokensPrefilled;
  };
  const seen: number[] = [];
  for (const first of [1, 2, 1, 3, 1, 3, 2]) seen.push(await prefilled(first));
  // One page of the second is left when it comes again.
  expect(seen).toEqual([64, 64, 1, 64, 1, 1, 32]);
  await expectFailure(() => load({ sessionBytes: -1 }), 'INVALID_ARGUMENT', 'sessionBytes');
  await expectFailure(() => load({ sessionBytes: 1.5 }), 'INVALID_ARGUMENT', 'sessionBytes');
});

test('completions are told of as they end, with lengths of their own', async () => {
  const policy = await load();
  const order: string[] = [];
  const ended: EndedCompletion[] = [];
  const chunks: SampleChunk[] = [];
  const groups = await policy.sample([rollout[0] as number[], ids(5, 3), ids(6, 2)], {
    n: 2,
    maxTokens: [2, 60, 7],
    seed: 4,
    onToken: (chunk) => {
      chunks.push(chunk);
      order.push(`token ${chunk.prompt}`);
    },
    onCompletion: (completion) => {
      ended.push(completion);
      order.push(`end ${completion.prompt}`);
    },
  });
  const lengths = groups.map(({ completions }) => completions.map(({ tokens }) => tokens.length));
  expect(lengths[0]).toEqual([2, 2]);
  expect(Math.max(...(lengths[1] as number[]))).toBeGreaterThan(20);
  expect(Math.max(...(lengths[1] as number[]))).toBeLessThanOrEqual(60);
  expect(lengths[2]).toEqual([7, 7]);
  expect(ended).toHaveLength(6);
  groups.forEach(({ completions }, prompt) => {
    completions.forEach(({ text, tokens, finishReason, samplingLogprobs }, completion) => {
      expect(ended.filter((each) => each.prompt === prompt && each.completion === completion)).toEqual([
        { prompt, completion, text, tokens, finishReason },
      ]);
      const own = chunks.filter((chunk) => chunk.prompt === prompt && chunk.completion === completion);
      expect(own.flatMap((chunk) => chunk.samplingLogprobs)).toEqual(Array.from(samplingLogprobs));
    });
  });
  // The short ones while the long ones go on.
  expect(order.lastIndexOf('end 0')).toBeLessThan(order.lastIndexOf('token 1'));
  expect(order.lastIndexOf('end 2')).toBeLessThan(order.lastIndexOf('token 1'));
  await expectFailure(() => policy.sample([[1]], { maxTokens: [1, 2] }), 'INVALID_ARGUMENT', 'maxTokens');
  await expectFailure(() => policy.sample([[1]], { maxTokens: [0] }), 'INVALID_ARGUMENT', /maxTokens\[0\]/);
});
