import { rm } from 'node:fs/promises';
import { join } from 'node:path';
import { parseArgs } from 'node:util';
import { print } from '../lib/cli/output.js';
import { shortPath } from '../lib/cli/paths.js';
import { duration, percent, sparkline } from '../lib/cli/terminal.js';
import { type Evaluation, evaluate, pairedDifference, type RowResult } from '../lib/evaluate/index.js';
import { packageRoot } from '../lib/package-root.js';
import { defaultModel, Policy } from '../lib/policy/index.js';
import { knightsAndKnaves } from '../lib/tasks/knights-and-knaves/index.js';
import { Trainer } from '../lib/train/trainer.js';

const { values } = parseArgs({
  options: {
    steps: { type: 'string', default: '20' },
    puzzles: { type: 'string', default: '128' },
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
const task = await knightsAndKnaves.open({ people: 3 });
const testRows = task.rows({ split: 'test', seed: 0 });
const heldOut = Array.from({ length: puzzles }, (_, i) => testRows.at(i));
const folder = join(packageRoot(), 'runs', 'demo');
const maxTokens = 192;

const views = ['none', 'full'] as const;
type Validation = Record<(typeof views)[number], { evaluation: Evaluation; rows: RowResult[] }>;

interface Recipe {
  name: string;
  mark: string;
  settings: { motivation: string; learnUnder?: string };
}

const recipes: readonly Recipe[] = [
  { name: 'RLVR', mark: 'r', settings: { motivation: 'none' } },
  { name: 'MeRF', mark: 'm', settings: { motivation: 'full' } },
  {
    name: 'MeRF, then none',
    mark: 'n',
    settings: { motivation: `full@0,none@${Math.round(steps / 2)}`, learnUnder: 'both' },
  },
];

async function validate(policy: Policy): Promise<Validation> {
  const under = async (motivation: (typeof views)[number]) => {
    const rows: RowResult[] = [];
    const onRow = (row: RowResult) => rows.push(row);
    const evaluation = await evaluate(policy, task, heldOut, {
      samples: 2,
      maxTokens,
      seed: 1,
      motivation,
      onRow,
    });
    return { evaluation, rows };
  };
  return { none: await under('none'), full: await under('full') };
}

/** Trains the shipped model from its start by a recipe, and shows the reward as it goes. */
async function train({ name, settings }: Recipe) {
  const out = join(folder, name.toLowerCase().replaceAll(/\W+/g, '-'));
  await rm(out, { recursive: true, force: true });
  const policy = await Policy.load(model);
  const rewards: number[] = [];
  const begun = performance.now();
  try {
    const trainer = new Trainer({
      ...settings,
      policy,
      task,
      out,
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
          `${name.padEnd(15)}  step ${String(event.step).padStart(3)}/${steps}  reward ${reward.toFixed(2).padStart(5)}  ` +
          `correct ${percent(Number(correct)).padStart(6)}  ${sparkline(rewards, 40)}`;
        if (live) process.stdout.write(`\r\x1b[2K${line.slice(0, (process.stdout.columns ?? 100) - 1)}`);
        else if (event.step % 5 === 0 || event.step === steps) process.stdout.write(`${line}\n`);
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

const cell = ({ evaluation: { accuracy, accuracyError } }: Validation['none']) =>
  `${percent(accuracy).padStart(6)} ± ${(100 * accuracyError).toFixed(1)}`;

/** How much more accurate a recipe left the model than the first one did. */
function less(first: Validation, other: Validation, view: (typeof views)[number]): string {
  if (first === other) return '';
  const { difference, error } = pairedDifference(other[view].rows, first[view].rows);
  return `${difference < 0 ? '-' : '+'}${(100 * Math.abs(difference)).toFixed(1)} ± ${(100 * error).toFixed(1)}`;
}

print(
  `Knights and knaves with three people, ${shortPath(model)}, ${steps} steps of 8 puzzles x 8 completions.\n` +
    `Validated on ${puzzles} held-out puzzles, 2 completions each, temperature 1.\n\n`,
);
const base = await Policy.load(model, { trainable: false });
const device = `${base.device.description}, ${base.device.threads} threads`;
const before = await validate(base);
base.dispose();
const { accuracy, clusters } = before.none.evaluation;
console.log(
  `before: accuracy ${percent(accuracy)} without and ${percent(before.full.evaluation.accuracy)} with motivation ` +
    `(${duration(elapsed())})\n`,
);
const runs = [];
for (const recipe of recipes) runs.push({ ...recipe, ...(await train(recipe)) });
const [rlvr] = runs as [(typeof runs)[number]];

console.log(
  `\nMean reward of the training completions (${runs.map(({ mark, name }) => `${mark}: ${name}`).join(', ')}, *: several)`,
);
console.log(chart(runs.map(({ mark, rewards }) => ({ mark, values: rewards }))));
const table = [
  ['', 'without motivation', 'less RLVR', 'with motivation', 'less RLVR'],
  ['before', cell(before.none), '', cell(before.full), ''],
  ...runs.map(({ name, validation }) => [
    `after ${name}`,
    cell(validation.none),
    less(rlvr.validation, validation, 'none'),
    cell(validation.full),
    less(rlvr.validation, validation, 'full'),
  ]),
];
print(`
Accuracy, with its standard error over the ${clusters} distinct puzzles; differences puzzle by puzzle.
${table
  .map((row) =>
    row
      .map((text, i) => text.padEnd(i === 0 ? 23 : 21))
      .join('')
      .trimEnd(),
  )
  .join('\n')}

What to look for: the first column, accuracy when nobody tells the rules, after the last recipe (drawn under the rules,
learned with and without them, then trained without) against RLVR, which has to find out by chance what the rules suggest.
Training took ${runs.map(({ name, seconds }) => `${duration(seconds)} by ${name}`).join(', ')}, everything together ${duration(elapsed())}, on ${device}.
Metrics, completions and models are in ${shortPath(folder)}.
`);
