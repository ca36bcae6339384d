import { createHash } from 'node:crypto';
import { existsSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { parseArgs } from 'node:util';
import { evaluate } from '../lib/evaluate/index.js';
import { Policy } from '../lib/policy/index.js';
import { knightsAndKnaves } from '../lib/tasks/knights-and-knaves/index.js';
import { learningRateAt } from '../lib/train/schedule.js';
import { Corpus } from './seed-model/corpus.js';
import { lessonTree } from './seed-model/forest.js';
import { modelConfig, tokenizerFiles } from './seed-model/model.js';

const { values } = parseArgs({
  options: {
    out: { type: 'string', default: 'models/merf-mini' },
    steps: { type: 'string', default: '7000' },
    threads: { type: 'string', default: '1' },
    'learning-rate': { type: 'string', default: '3e-3' },
  },
});
const steps = Number(values.steps);
const tokenizerLessons = 600;

const corpus = new Corpus({
  seed: 20_260,
  examplesPerLesson: 8,
  practiceLessons: Math.round(0.5 * steps),
  withRules: 0.7,
  threePeople: 0.1,
  temperature: 0.7,
});

const texts: string[] = [];
for (let i = 0; i < tokenizerLessons; i++) {
  const { system, examples } = await corpus.lesson(i);
  texts.push(
    system.content ?? '',
    ...examples.flatMap(({ question, completion }) => [question.content ?? '', completion]),
  );
}
const policy = await Policy.create(modelConfig, tokenizerFiles(texts), {
  seed: 1,
  standardDeviation: 0.06,
  dtype: 'f32',
  threads: Number(values.threads),
});
console.log(
  `${(policy.parameterCount / 1e6).toFixed(2)} million parameters, ${policy.tokenizer.size} tokens`,
);

const task = await knightsAndKnaves.open({ people: 2 });
const source = task.rows({ split: 'test', seed: 0 });
const heldOut = Array.from({ length: 256 }, (_, i) => source.at(i));

// Settings are those of `merf evaluate --prompts 256 --samples 2 --max-tokens 192 --seed 1`.
async function report(policy: Policy, rows: number): Promise<void> {
  for (const motivation of ['none', 'full', 'adverse'] as const) {
    const result = await evaluate(policy, task, heldOut.slice(0, rows), {
      motivation,
      samples: 2,
      maxTokens: 192,
      seed: 1,
    });
    const format = result.cases.format?.demanded ?? 0;
    console.log(
      `  motivation ${motivation.padEnd(7)} accuracy ${(100 * result.accuracy).toFixed(1)}%  format ` +
        `${(100 * format).toFixed(1)}%  reward ${result.reward.toFixed(2)}  length ${result.length.toFixed(1)}  ` +
        `entropy ${result.entropy.toFixed(2)}`,
    );
  }
}

const batch = async (step: number) => [lessonTree(await corpus.lesson(step), policy.tokenizer)];

const started = performance.now();
let next = await batch(0);
let smoothed = Number.NaN;
let tokens = 0;
for (let step = 1; step <= steps; step++) {
  const training = policy.forwardBackward(next, { type: 'cross_entropy' });
  next = await batch(step);
  const { loss, tokens: trained } = await training;
  await policy.optimStep({
    learningRate: learningRateAt(step, {
      kind: 'cosine',
      learningRate: Number(values['learning-rate']),
      warmupSteps: 100,
      decaySteps: steps,
      minLearningRate: 3e-5,
    }),
    beta2: 0.98,
    weightDecay: 0.05,
    maxGradNorm: 1,
  });
  tokens += trained;
  smoothed = Number.isNaN(smoothed) ? loss : 0.98 * smoothed + 0.02 * loss;
  if (step % 100 === 0) {
    const seconds = (performance.now() - started) / 1000;
    console.log(
      `step ${step}/${steps}  loss ${smoothed.toFixed(4)}  ${tokens} tokens  ${seconds.toFixed(0)} s`,
    );
  }
  if (step % 500 === 0 && step !== steps) {
    await report(policy, 64);
    await policy.save(values.out, { dtype: 'bf16' });
  }
}

await policy.save(values.out, { dtype: 'bf16' });
policy.dispose();
const stored = await Policy.load(values.out);
await report(stored, heldOut.length);
stored.dispose();
const weights = join(values.out, 'model.safetensors');
if (existsSync(weights)) {
  const bytes = readFileSync(weights);
  console.log(
    `${weights}: ${bytes.length} bytes, sha256 ${createHash('sha256').update(bytes).digest('hex')}`,
  );
}
