// A GRPO trainer of one's own, on the four primitives: sample, score, forwardBackward, optimStep.
//
//   npx tsx examples/own-trainer.ts [steps]
import { defaultModel, forestOf, getTask, groupAdvantages, Policy, parseCompletion } from 'merf';

const steps = Number(process.argv[2] ?? 15);
const promptsPerStep = 8;
const groupSize = 8;
const maxTokens = 160;
const learningRate = 1e-4;
const klCoefficient = 0.001;
// What the prompt says about the reward: 'full' is MeRF, 'none' the plain RLVR baseline.
const motivation = 'full';

const task = await getTask('knights-and-knaves', { people: 2 });
const rows = task.rows({ split: 'train', seed: 0 });
const policy = await Policy.load(defaultModel());
const reference = await Policy.load(defaultModel(), { trainable: false });

for (let step = 1; step <= steps; step++) {
  const started = performance.now();

  // 1. Rollout: a group of completions for each prompt.
  const batch = Array.from({ length: promptsPerStep }, (_, i) => rows.at((step - 1) * promptsPerStep + i));
  const prompts = batch.map((row) => ({ messages: task.messages(row, motivation) }));
  const groups = await policy.sample(prompts, { n: groupSize, maxTokens, seed: step });

  // 2. Reward: the specification that wrote the motivation scores every completion.
  const scores = await Promise.all(
    groups.map((group, i) =>
      Promise.all(
        group.completions.map((completion) =>
          task.spec.score(parseCompletion({ raw: completion.text }), batch[i]),
        ),
      ),
    ),
  );
  const rewards = scores.map((group) => group.map((score) => score.total));

  // 3. Advantage: each completion against the others of its group.
  const advantages = await groupAdvantages(rewards);

  // 4. The batch as a token forest: the motivation at the root, then the questions, then their completions.
  const branches = groups.map((group, i) => ({
    promptTokens: group.promptTokens,
    completions: group.completions.map((completion, j) => ({
      tokens: completion.tokens,
      train: {
        advantage: advantages[i]?.[j],
        // Sampled at temperature 1 from these weights: the importance ratio's denominator.
        logprobs: completion.logprobs,
        referenceLogprobs: undefined as Float32Array | undefined,
      },
    })),
  }));

  // 5. KL reference: how likely the weights at the start find the same tokens.
  const { logprobs } = await reference.score(forestOf(branches));
  for (const [i, completion] of branches.flatMap((branch) => branch.completions).entries()) {
    completion.train.referenceLogprobs = logprobs[i];
  }

  // 6. Update.
  const stats = await policy.forwardBackward(forestOf(branches), { type: 'grpo', kl: klCoefficient });
  const { gradientNorm } = await policy.optimStep({ learningRate, maxGradNorm: 1 });

  const all = rewards.flat();
  const highest = task.spec.bounds().greatest;
  console.log(
    `step ${String(step).padStart(2)}`,
    `reward ${(all.reduce((sum, reward) => sum + reward, 0) / all.length).toFixed(3)}`,
    `correct ${((100 * all.filter((reward) => reward === highest).length) / all.length).toFixed(1)}%`,
    `entropy ${stats.entropy.toFixed(3)}`,
    `kl ${stats.kl.toFixed(5)}`,
    `ratio ${stats.ratio.min.toFixed(4)}..${stats.ratio.max.toFixed(4)}`,
    `gradient ${gradientNorm.toFixed(3)}`,
    `${((performance.now() - started) / 1000).toFixed(1)}s`,
  );
}

await policy.save('runs/own-trainer');
console.log('Saved to runs/own-trainer: merf evaluate --model runs/own-trainer --task knights-and-knaves');
policy.dispose();
reference.dispose();
