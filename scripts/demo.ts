import { rm } from 'node:fs/promises';
import { join } from 'node:path';
import { parseArgs } from 'node:util';
import { shortPath } from '../lib/cli/paths.js';
import { duration, percent, sparkline } from '../lib/cli/terminal.js';
import { type Evaluation, evaluate } from '../lib/evaluate/index.js';
import { packageRoot } from '../lib/package-root.js';
import { defaultModel, Policy } from '../lib/policy/index.js';
import { knightsAndKnaves } from '../lib/tasks/knights-and-knaves/index.js';
import { Trainer } from '../lib/train/trainer.js';

const { values } = parseArgs({
  options: {
    steps: { type: 'string', default: '60' },
    puzzles: { type: 'string', default: '256' },
    seed: { type: 'string', default: '0' },
    'learning-rate': { type: 'string', default: '2e-4' },
    model: { type: 'string' },
  },
});
const model = values.model ?? defaultModel();
const steps = Number(values.steps);
const puzzles = Number(values.puzzles);
const seed = Number(values.seed);

const started = performance.now();
const elapsed = () => (performance.now() - started) / 1000;
const live = process.stdout.isTTY === true;
const task = await knightsAndKnaves.open({ people: 2 });
const testRows = task.rows({ split: 'test', seed: 0 });
const heldOut = Array.from({ length: puzzles }, (_, i) => testRows.at(i));
const folder = join(packageRoot(), 'runs', 'demo');
const maxTokens = 192;

type Validation = Record<'none' | 'full', Evaluation>;

async function validate(policy: Policy): Promise<Validation> {
  const options = { samples: 2, maxTokens, seed: 1 };
  return {
    none: await evaluate(policy, task, heldOut, { ...options, motivation: 'none' }),
    full: await evaluate(policy, task, heldOut, { ...options, motivation: 'full' }),
  };
}

/** Trains the shipped model from its start with the motivation given, and shows the reward as it goes. */
async function train(name: string, motivation: 'none' | 'full') {
  const out = join(folder, motivation === 'full' ? 'merf' : 'rlvr');
  await rm(out, { recursive: true, force: true });
  const policy = await Policy.load(model);
  const rewards: number[] = [];
  const begun = performance.now();
  try {
    const trainer = new Trainer({
      policy,
      task,
      out,
      motivation,
      steps,
      seed,
      promptsPerStep: 8,
      groupSize: 8,
      maxTokens,
      learningRate: Number(values['learning-rate']),
      warmupSteps: 3,
      saveEvery: 0,
      onEvent: (event) => {
        if (event.type !== 'step') return;
        const { reward, correct } = event.metrics;
        if (typeof reward !== 'number') return;
        rewards.push(reward);
        const line =
          `${name}  step ${String(event.step).padStart(3)}/${steps}  reward ${reward.toFixed(2).padStart(5)}  ` +
          `correct ${percent(Number(correct)).padStart(6)}  ${sparkline(rewards, 40)}`;
        if (live) process.stdout.write(`\r\x1b[2K${line.slice(0, (process.stdout.columns ?? 100) - 1)}`);
        else if (event.step % 10 === 0 || event.step === steps) process.stdout.write(`${line}\n`);
      },
    });
    await trainer.run();
    const seconds = (performance.now() - begun) / 1000;
    if (live) process.stdout.write('\n');
    return { validation: await validate(policy), rewards, seconds };
  } finally {
    policy.dispose();
  }
}

function chart(curves: readonly { mark: string; values: readonly number[] }[]): string {
  const width = 60;
  const height = 10;
  const least = -3;
  const greatest = 3;
  const grid = Array.from({ length: height }, () => new Array<string>(width).fill(' '));
  for (const { mark, values: points } of curves) {
    for (let x = 0; x < width; x++) {
      const from = Math.floor((x * points.length) / width);
      const stretch = points.slice(from, Math.max(from + 1, Math.floor(((x + 1) * points.length) / width)));
      const mean = stretch.reduce((sum, value) => sum + value, 0) / stretch.length;
      const y = Math.round(((greatest - mean) / (greatest - least)) * (height - 1));
      const row = grid[Math.min(height - 1, Math.max(0, y))] as string[];
      row[x] = row[x] === ' ' ? mark : '*';
    }
  }
  const label = (y: number) => (greatest - (y * (greatest - least)) / (height - 1)).toFixed(1).padStart(5);
  return [
    ...grid.map((row, y) => `${label(y)} |${row.join('')}`),
    `      +${'-'.repeat(width)}`,
    `       step 1${`step ${steps}`.padStart(width - 6)}`,
  ].join('\n');
}

const cell = ({ accuracy, accuracyError, reward }: Evaluation) =>
  `${percent(accuracy).padStart(6)} ±${(100 * accuracyError).toFixed(1).padStart(4)}  ${reward.toFixed(2).padStart(6)}`;

function tableLine(name: string, validation: Validation): string {
  return `${name.padEnd(14)} ${cell(validation.none)}    ${cell(validation.full)}`;
}

console.log(
  `Two-person knights and knaves, ${shortPath(model)}, ${steps} steps of 8 puzzles x 8 completions.\n` +
    `Validated on ${puzzles} held-out puzzles, 2 completions each, temperature 1.\n`,
);
const base = await Policy.load(model, { trainable: false });
const device = `${base.device.description}, ${base.device.threads} threads`;
const before = await validate(base);
base.dispose();
console.log(
  `before: accuracy ${percent(before.none.accuracy)} without and ${percent(before.full.accuracy)} with motivation ` +
    `(${duration(elapsed())})\n`,
);
const rlvr = await train('RLVR', 'none');
const merf = await train('MeRF', 'full');

console.log('\nMean reward of the training completions (r: RLVR, m: MeRF, *: both)');
console.log(
  chart([
    { mark: 'r', values: rlvr.rewards },
    { mark: 'm', values: merf.rewards },
  ]),
);
console.log(`
               validated without motivation    with motivation
               accuracy       reward           accuracy       reward
${tableLine('before', before)}
${tableLine('after RLVR', rlvr.validation)}
${tableLine('after MeRF', merf.validation)}

Training took ${duration(rlvr.seconds)} by RLVR and ${duration(merf.seconds)} by MeRF, everything together ${duration(elapsed())}, on ${device}.
Metrics, completions and models are in ${shortPath(folder)}/rlvr and ${shortPath(folder)}/merf.`);
