// A GRPO trainer of one's own, on the four primitives: sample, score, forwardBackward, optimStep.
//
//   npx tsx examples/own-trainer.ts [steps]
import { branchesOf, collect, defaultModel, forestOf, getTask, groupAdvantages, Policy } from 'merf';

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

  // 1. Rollout and reward: a group of episodes for each prompt, sampled at temperature 1 from these weights, and judged
  //    by the specification that wrote the motivation.
  const batch = Array.from({ length: promptsPerStep }, (_, i) => rows.at((step - 1) * promptsPerStep + i));
  const groups = await collect(policy, task, batch, { n: groupSize, maxTokens, motivation, seed: step });
  const rewards = groups.map(({ episodes }) => episodes.map(({ reward }) => reward.total));

  // 2. Advantage: each episode against the others of its group.
  const advantages = await groupAdvantages(rewards);

  // 3. KL reference: how likely the weights at the start find the same tokens.
  const { logprobs } = await reference.score(forestOf(branchesOf(groups)));

  // 4. The batch as a token forest: the motivation at the root, then the questions, then what followed them. Each of the
  //    model's turns brings its log-probabilities, the importance ratio's denominator.
  const branches = branchesOf(groups, ({ group, episode, turn }) => ({
    advantage: advantages[group]?.[episode],
    referenceLogprobs: logprobs[turn],
  }));

  // 5. Update.
  const stats = await policy.forwardBackward(forestOf(branches), { type: 'grpo', kl: klCoefficient });
  const { gradientNorm } = await policy.optimStep({ learningRate, maxGradNorm: 1 });

  const all = groups.flatMap(({ episodes }) => episodes.map(({ reward }) => reward));
  console.log(
    `step ${String(step).padStart(2)}`,
    `reward ${(all.reduce((sum, { total }) => sum + total, 0) / all.length).toFixed(3)}`,
    `correct ${((100 * all.filter((reward) => task.spec.isHighest(reward)).length) / all.length).toFixed(1)}%`,
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
