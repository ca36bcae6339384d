import { type CompletionGroup, defaultKeepActivations, type Forest, forestOf, type Policy } from 'merf';
import type { Sizes } from './workloads.js';

/** Seconds of one GRPO step and its parts, and the tokens that were generated. */
export interface StepTimes {
  generation: number;
  /** Forward and backward pass and update. Absent where an engine generates alone. */
  training?: number;
  step?: number;
  tokens: number;
  /** The largest between a token's log-probability where it was drawn and where it was trained on, in nats. */
  gap?: number;
}

/** One update on completions sampled for it; it keeps the bytes of activations that a trainer does by default. */
export async function grpoStep(
  policy: Policy,
  prompts: readonly number[][],
  { group, completionTokens }: Pick<Sizes, 'group' | 'completionTokens'>,
  seed: number,
  keepActivations = Math.floor(defaultKeepActivations(policy) * 2 ** 30),
): Promise<Required<StepTimes>> {
  const start = performance.now();
  const options = { n: group, maxTokens: completionTokens, seed, keepActivations };
  const groups = await policy.sample(prompts, options);
  const sampled = performance.now();
  const { ratio } = await policy.forwardBackward(forestWith(groups), { type: 'grpo' });
  await policy.optimStep({ learningRate: 1e-6, maxGradNorm: 1 });
  const end = performance.now();
  return {
    generation: (sampled - start) / 1000,
    training: (end - sampled) / 1000,
    step: (end - start) / 1000,
    tokens: groups.reduce(
      (sum, { completions }) => sum + completions.reduce((n, { tokens }) => n + tokens.length, 0),
      0,
    ),
    gap: Math.max(Math.log(ratio.max), -Math.log(ratio.min)),
  };
}

/** Advantages alternate: no time depends on their values. */
export function forestWith(groups: readonly CompletionGroup[]): Forest {
  return forestOf(
    groups.map(({ promptTokens, completions }) => ({
      promptTokens,
      completions: completions.map(({ tokens, logprobs }, i) => ({
        tokens,
        train: { advantage: i % 2 === 0 ? 1 : -1, logprobs },
      })),
    })),
  );
}
