import { createHash } from 'node:crypto';
import { existsSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { parseArgs } from 'node:util';
import { evaluate } from '../lib/evaluate/index.js';
import { Policy } from '../lib/policy/index.js';
import { knightsAndKnaves } from '../lib/tasks/knights-and-knaves/index.js';
import { learningRateAt } from '../lib/train/schedule.js';
import { varied } from './seed-model/answers.js';
import { Corpus } from './seed-model/corpus.js';
import { lessonTree } from './seed-model/forest.js';
import { modelConfig, tokenizerFiles } from './seed-model/model.js';
import { conclusion } from './seed-model/notes.js';
import { startingPolicy } from './seed-model/start.js';

const { values } = parseArgs({
  options: {
    out: { type: 'string', default: 'models/merf-mini' },
    'practice-steps': { type: 'string', default: '12000' },
    'habit-steps': { type: 'string', default: '6000' },
    checkpoint: { type: 'string' },
    threads: { type: 'string', default: '1' },
  },
});
const practiceSteps = Number(values['practice-steps']);
const steps = practiceSteps + Number(values['habit-steps']);
type View = 'none' | 'full' | 'adverse';
const learningRate = 1.5e-3;
const tokenizerLessons = 600;
const stepsPerCheckpoint = 1000;

const lessons = {
  seed: 20_260,
  examplesPerLesson: 8,
  withRules: { practice: 0.3, habits: 0.7 },
  threePeople: 0.7,
  temperature: { practice: 0.4, habits: 0.2 },
};
const corpus = new Corpus({ ...lessons, practiceLessons: practiceSteps });

const texts: string[] = [];
const sample = new Corpus({
  ...lessons,
  practiceLessons: tokenizerLessons / 2,
  temperature: { practice: 0.4, habits: 0.4 },
  habits: varied,
});
for (let i = 0; i < tokenizerLessons; i++) {
  const { system, examples } = await sample.lesson(i);
  texts.push(
    system.content ?? '',
    ...examples.flatMap(({ question, completion }) => [question.content ?? '', completion]),
  );
}
const policy = await startingPolicy(modelConfig, tokenizerFiles(texts), {
  seed: 1,
  threads: Number(values.threads),
});
console.log(
  `${(policy.parameterCount / 1e6).toFixed(2)} million parameters, ${policy.tokenizer.size} tokens`,
);

const task = await knightsAndKnaves.open({ people: 3 });
const source = task.rows({ split: 'test', seed: 0 });
const heldOut = Array.from({ length: 256 }, (_, i) => source.at(i));

/**
 * Says how the policy does on held-out puzzles, with the settings of `merf evaluate --samples 2 --max-tokens 192 --seed 1`,
 * and how often notes that come to their end, in the demanded format, are right.
 */
async function report(policy: Policy, puzzles: number, motivations: readonly View[]): Promise<void> {
  for (const motivation of motivations) {
    let finished = 0;
    let right = 0;
    const result = await evaluate(policy, task, heldOut.slice(0, puzzles), {
      motivation,
      samples: 2,
      maxTokens: 192,
      seed: 1,
      onGroup: ({ episodes }) => {
        for (const { reward, completion } of episodes) {
          if (reward.parts.format?.case !== 'demanded' || !completion.text.includes(conclusion)) continue;
          finished++;
          if (reward.parts.correctness?.case === 'right') right++;
        }
      },
    });
    const share = (part: number) => `${(100 * part).toFixed(1)}%`;
    console.log(
      `  motivation ${motivation.padEnd(7)} accuracy ${share(result.accuracy)}  format ` +
        `${share(result.cases.format?.demanded ?? 0)}  reward ${result.reward.toFixed(2)}  length ` +
        `${result.length.toFixed(1)}  entropy ${result.entropy.toFixed(2)}  finished notes ` +
        `${share(finished / (2 * puzzles))}, right ${share(right / Math.max(1, finished))}`,
    );
  }
}

// The rate stays up while reasoning is practised, and falls while habits are learned.
function rateAt(step: number): number {
  return step <= practiceSteps
    ? learningRateAt(step, { kind: 'constant', learningRate, warmupSteps: 100 })
    : learningRateAt(step - practiceSteps, {
        kind: 'cosine',
        learningRate,
        decaySteps: steps - practiceSteps,
        minLearningRate: 3e-5,
      });
}

const batch = async (step: number) => [lessonTree(await corpus.lesson(step), policy.tokenizer)];

const started = performance.now();
const done = values.checkpoint === undefined ? 0 : Number(values.checkpoint.match(/\d+$/)?.[0]);
if (values.checkpoint !== undefined) await policy.loadState(values.checkpoint);
let next = await batch(done);
let smoothed = Number.NaN;
let tokens = 0;
for (let step = done + 1; step <= steps; step++) {
  const training = policy.forwardBackward(next, { type: 'cross_entropy' });
  next = await batch(step);
  const { loss, tokens: trained } = await training;
  await policy.optimStep({
    learningRate: rateAt(step),
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
  if (step % stepsPerCheckpoint === 0 && step !== steps) {
    await report(policy, 32, ['none']);
    await policy.save(values.out, { dtype: 'bf16' });
    await policy.saveState(`${values.out}-${step}`);
  }
}

await policy.save(values.out, { dtype: 'bf16' });
policy.dispose();
const stored = await Policy.load(values.out);
await report(stored, heldOut.length, ['none', 'full', 'adverse']);
stored.dispose();
const weights = join(values.out, 'model.safetensors');
if (existsSync(weights)) {
  const bytes = readFileSync(weights);
  console.log(
    `${weights}: ${bytes.length} bytes, sha256 ${createHash('sha256').update(bytes).digest('hex')}`,
  );
}
