// Run by memory.test.ts in a process of its own, since the emulated GPU's memory is set by the environment: asks for
// more than MERF_EMULATION_MEMORY has where that is set, then for what fits, and prints what came of it as JSON.

import { MerfError } from '../../lib/errors.js';
import { defaultModel } from '../../lib/policy/default-model.js';
import { type Forest, type ModelConfig, openModel, Policy } from '../../lib/policy/index.js';

// Many narrow layers: much memory for little work.
const shipped = await openModel(defaultModel());
const narrow = { hiddenSize: 16, layers: 16, heads: 2, kvHeads: 1, headSize: 8, mlpSize: 16 };
const config: ModelConfig = { ...shipped.config, ...narrow };

function sequence(length: number, seed: number): number[] {
  return Array.from({ length }, (_, i) => (seed * 7919 + i * i * 31) % config.vocabSize);
}

/** Completions of 20 tokens under one prompt, so many tokens together. */
function forest(tokens: number): Forest {
  const completions = Array.from({ length: Math.floor((tokens - 20) / 20) }, (_, i) => ({
    tokens: sequence(20, i + 2),
    train: { advantage: i % 2 === 0 ? 1 : -1, logprobs: new Float32Array(20).fill(-6.7) },
  }));
  return [{ tokens: sequence(20, 1), children: completions }] as Forest;
}

async function messageOf(run: () => Promise<unknown>): Promise<string | undefined> {
  if (process.env.MERF_EMULATION_MEMORY === undefined) return undefined;
  try {
    await run();
    return undefined;
  } catch (error) {
    if (error instanceof MerfError && error.code === 'OUT_OF_MEMORY') return error.message;
    throw error;
  }
}

const policy = await Policy.create(config, shipped.tokenizer, {
  device: 'cuda-emulated',
  standardDeviation: 0.3,
  threads: 2,
});
const results: Record<string, unknown> = {};
const loss = { type: 'grpo', entropy: 0.1 } as const;
const gradient = async () =>
  Array.from(await policy.readParameter('model.layers.3.mlp.up_proj.weight', 'gradient'));
const small = forest(60);

// The first call makes the gradients; the one without room comes when they hold something.
await policy.forwardBackward(small, loss);
results.gradient = await gradient();
const before = policy.memory().used;
results.training = await messageOf(() => policy.forwardBackward(forest(4000), loss, { maxTokens: 100_000 }));
results.left = policy.memory().used - before;
results.gradientAfter = (await gradient()).filter((value) => value !== 0).length;
results.scoring = await messageOf(() => policy.score(forest(40_000), { maxTokens: 100_000 }));
const fitting = /about (\d+) would fit/.exec(String(results.training))?.[1];
results.fits =
  fitting === undefined
    ? undefined
    : await messageOf(() => policy.score(forest(Number(fitting)), { maxTokens: 100_000 }));

const prompts = (count: number, length: number) =>
  Array.from({ length: count }, (_, i) => sequence(length, 1000 + i));
results.sampling = await messageOf(() => policy.sample(prompts(6, 1900), { maxTokens: 8, n: 2, seed: 1 }));

// The policy goes on as one that never ran out.
await policy.zeroGradients();
results.stats = await policy.forwardBackward(small, loss);
results.again = await gradient();
results.step = await policy.optimStep({ learningRate: 1e-2, maxGradNorm: 1 });
const [group] = await policy.sample(prompts(1, 30), { maxTokens: 6, n: 2, seed: 1 });
results.tokens = group?.completions.map(({ tokens }) => Array.from(tokens));
policy.dispose();
process.stdout.write(JSON.stringify(results));
