// Trains one model by several recipes and seeds, evaluates every result on the same held-out rows, and prints what the
// recipes come to, with paired differences. Runs that are done are not done again, and one that was cut off goes on.
//
//   npx tsx scripts/compare-recipes.ts examples/rules/shipped.yaml --seeds 0,1,2,3,4 [--recipes RLVR,MeRF] [--out FOLDER]

import { existsSync, mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join, resolve } from 'node:path';
import { parseArgs } from 'node:util';
import { parse } from 'yaml';
import { z } from 'zod';
import { writeFileAtomically } from '../lib/atomic-files.js';
import { print } from '../lib/cli/output.js';
import { type Evaluation, evaluate, pairedDifference, type RowResult } from '../lib/evaluate/index.js';
import { defaultModel, Policy } from '../lib/policy/index.js';
import { parseMotivationView } from '../lib/prompt/motivation.js';
import { getTask } from '../lib/tasks/registry.js';
import { heldOutRows } from '../lib/train/evaluation.js';
import { Trainer } from '../lib/train/trainer.js';

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    seeds: { type: 'string', default: '0' },
    recipes: { type: 'string' },
    out: { type: 'string' },
    model: { type: 'string' },
  },
});
const [file] = positionals;
if (file === undefined) {
  console.error(
    'usage: npx tsx scripts/compare-recipes.ts FILE.yaml [--seeds 0,1] [--recipes A,B] [--out FOLDER]',
  );
  process.exit(2);
}

const settings = z.record(z.string(), z.unknown());
const plan = z
  .strictObject({
    model: z.string().optional(),
    dtype: z.enum(['f32', 'bf16']).optional(),
    task: z.looseObject({ name: z.string() }),
    training: settings,
    evaluation: z.strictObject({
      rows: z.int(),
      samples: z.int(),
      maxTokens: z.int(),
      seed: z.int().default(1),
    }),
    /** The recipe that the others are compared with, each by what it sets beside `training`. */
    baseline: z.string(),
    recipes: z.record(z.string(), settings),
  })
  .parse(parse(readFileSync(file, 'utf8')));

const views = ['none', 'full'] as const;
type View = (typeof views)[number];
interface Result {
  evaluations: Record<View, Evaluation>;
  rows: Record<View, RowResult[]>;
}

const { name: taskName, ...taskOptions } = plan.task;
const task = await getTask(taskName, taskOptions);
const heldOut = await heldOutRows(task, plan.evaluation.rows);
const model = values.model ?? plan.model ?? defaultModel();
const out = resolve(values.out ?? join('runs', 'recipes'));
const seeds = values.seeds.split(',').map(Number);
const names = values.recipes?.split(',') ?? Object.keys(plan.recipes);
const loading = plan.dtype ? { dtype: plan.dtype } : {};
mkdirSync(out, { recursive: true });

async function resultOf(folder: string, path: string): Promise<Result> {
  const kept = join(folder, 'evaluation.json');
  if (existsSync(kept)) return JSON.parse(readFileSync(kept, 'utf8')) as Result;
  const policy = await Policy.load(path, { trainable: false, ...loading });
  const result = { evaluations: {}, rows: { none: [], full: [] } } as unknown as Result;
  const { samples, maxTokens, seed } = plan.evaluation;
  for (const view of views) {
    result.evaluations[view] = await evaluate(policy, task, heldOut, {
      samples,
      maxTokens,
      seed,
      motivation: parseMotivationView(view),
      onRow: (row) => result.rows[view].push(row),
    });
  }
  policy.dispose();
  writeFileAtomically(kept, JSON.stringify(result));
  return result;
}

async function train(recipe: string, seed: number): Promise<Result> {
  const folder = join(out, recipe.replaceAll(/[^\w-]+/g, '-'), `seed-${seed}`);
  const trained = join(folder, 'model');
  if (!existsSync(trained)) {
    const policy = await Policy.load(model, loading);
    const resume = existsSync(join(folder, 'run.json'));
    const trainer = new Trainer({
      ...plan.training,
      ...plan.recipes[recipe],
      policy,
      task,
      seed,
      out: folder,
      resume,
    });
    const started = performance.now();
    await trainer.run();
    policy.dispose();
    print(`${recipe}, seed ${seed}: ${((performance.now() - started) / 1000).toFixed(0)} s\n`);
  }
  return resultOf(folder, trained);
}

const percent = (share: number) => (100 * share).toFixed(1);
const mean = (numbers: readonly number[]) => numbers.reduce((sum, one) => sum + one, 0) / numbers.length;

const start = join(out, 'start');
mkdirSync(start, { recursive: true });
const before = await resultOf(start, model);
const results = new Map<string, Result[]>();
for (const seed of seeds) {
  for (const name of names) results.set(name, [...(results.get(name) ?? []), await train(name, seed)]);
}

const baseline = results.get(plan.baseline);
const lines = [
  `${heldOut.length} held-out rows (${before.evaluations.none.clusters} distinct) x ${plan.evaluation.samples}, seeds ${seeds.join(', ')}; accuracy in %`,
  '',
  `| recipe | without motivation | mean | less ${plan.baseline} | with | mean | less ${plan.baseline} |`,
  '| --- | --- | --- | --- | --- | --- | --- |',
  `| before | ${percent(before.evaluations.none.accuracy)} | | | ${percent(before.evaluations.full.accuracy)} | | |`,
];
for (const [name, all] of results) {
  const cells = views.flatMap((view) => {
    const accuracies = all.map(({ evaluations }) => evaluations[view].accuracy);
    // All seeds are evaluated on the same rows: a row's accuracy over the seeds is one value, its cluster the row.
    return [
      accuracies.map(percent).join(', '),
      percent(mean(accuracies)),
      baseline && name !== plan.baseline ? difference(overSeeds(all, view), overSeeds(baseline, view)) : '',
    ];
  });
  lines.push(`| ${name} | ${cells.join(' | ')} |`);
}
if (baseline && seeds.length > 1) {
  const others = [...results].filter(([name]) => name !== plan.baseline);
  lines.push(
    '',
    `Less ${plan.baseline} of the same seed, without motivation; with`,
    '',
    `| seed | ${others.map(([name]) => name).join(' | ')} |`,
    `| --- |${' --- |'.repeat(others.length)}`,
    ...seeds.map((seed, i) => {
      const cells = others.map(([, all]) =>
        views
          .map((view) => difference((all[i] as Result).rows[view], (baseline[i] as Result).rows[view]))
          .join('; '),
      );
      return `| ${seed} | ${cells.join(' | ')} |`;
    }),
  );
}

function difference(rows: readonly RowResult[], others: readonly RowResult[]): string {
  const paired = pairedDifference(rows, others);
  return `${percent(paired.difference)} ± ${percent(paired.error)}`;
}

/** Each row's mean accuracy over the seeds. */
function overSeeds(all: readonly Result[], view: View): RowResult[] {
  return (all[0] as Result).rows[view].map(({ identity }, i) => ({
    identity,
    accuracy: mean(all.map(({ rows }) => (rows[view][i] as RowResult).accuracy)),
  }));
}

print(`${lines.join('\n')}\n`);
writeFileSync(join(out, 'table.md'), `${lines.join('\n')}\n`);
