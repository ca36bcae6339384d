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
import { conclusion } from './seed-model/notes.js';
import { startingPolicy } from './seed-model/start.js';

const { values } = parseArgs({
  options: {
    out: { type: 'string', default: 'models/merf-mini' },
    'practice-steps': { type: 'string', default: '26000' },
    'habit-steps': { type: 'string', default: '2000' },
    checkpoint: { type: 'string' },
    layers: { type: 'string', default: '4' },
    heads: { type: 'string', default: '4' },
    threads: { type: 'string', default: '1' },
    'learning-rate': { type: 'string', default: '1.5e-3' },
  },
});
const practiceSteps = Number(values['practice-steps']);
const steps = practiceSteps + Number(values['habit-steps']);
const tokenizerLessons = 600;

const lessons = {
  seed: 20_260,
  examplesPerLesson: 8,
  withRules: { practice: 0.3, habits: 0.7 },
  threePeople: 0.7,
  temperature: 0.4,
};
const corpus = new Corpus({ ...lessons, practiceLessons: practiceSteps });

const texts: string[] = [];
const sample = new Corpus({ ...lessons, practiceLessons: tokenizerLessons / 2 });
for (let i = 0; i < tokenizerLessons; i++) {
  const { system, examples } = await sample.lesson(i);
  texts.push(
    system.content ?? '',
    ...examples.flatMap(({ question, completion }) => [question.content ?? '', completion]),
  );
}
const policy = await startingPolicy(
  {
    ...modelConfig,
    layers: Number(values.layers),
    heads: Number(values.heads),
    kvHeads: Number(values.heads),
    headSize: 128 / Number(values.heads),
  },
  tokenizerFiles(texts),
  {
    seed: 1,
    threads: Number(values.threads),
  },
);
console.log(
  `${(policy.parameterCount / 1e6).toFixed(2)} million parameters, ${policy.tokenizer.size} tokens`,
);

const task = await knightsAndKnaves.open({ people: 3 });
const source = task.rows({ split: 'test', seed: 0 });
const heldOut = Array.from({ length: 256 }, (_, i) => source.at(i));

// Settings are those of `merf evaluate --prompts 256 --samples 2 --max-tokens 192 --seed 1`.
async function report(policy: Policy, rows: number): Promise<void> {
  for (const motivation of ['none', 'full', 'adverse'].slice(0, rows === 32 ? 1 : 3) as (
    | 'none'
    | 'full'
    | 'adverse'
  )[]) {
    let careful = 0;
    let carefulAndRight = 0;
    const result = await evaluate(policy, task, heldOut.slice(0, rows), {
      motivation,
      samples: 2,
      maxTokens: 192,
      seed: 1,
      onGroup: ({ episodes }) => {
        for (const { reward, completion } of episodes) {
          if (reward.parts.format?.case !== 'demanded' || !completion.text.includes(conclusion)) continue;
          careful++;
          if (reward.parts.correctness?.case === 'right') carefulAndRight++;
        }
      },
    });
    const format = result.cases.format?.demanded ?? 0;
    console.log(
      `  motivation ${motivation.padEnd(7)} accuracy ${(100 * result.accuracy).toFixed(1)}%  format ` +
        `${(100 * format).toFixed(1)}%  reward ${result.reward.toFixed(2)}  length ${result.length.toFixed(1)}  ` +
        `entropy ${result.entropy.toFixed(2)}  careful ${((100 * careful) / (2 * rows)).toFixed(1)}%, ` +
        `right where careful ${((100 * carefulAndRight) / careful).toFixed(1)}%`,
    );
  }
}

// The rate stays up while reasoning is practised, and falls while habits are learned.
function rateAt(step: number): number {
  const learningRate = Number(values['learning-rate']);
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
  if (step % 1000 === 0 && step !== steps) {
    await report(policy, 32);
    await policy.save(values.out, { dtype: 'bf16' });
    await policy.saveState(`${values.out}-${step}`);
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
