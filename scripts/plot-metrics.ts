// Draws runs side by side as one SVG: training reward over steps, and held-out accuracy under each view of the
// motivation at the steps that were evaluated.
//
//   npx tsx scripts/plot-metrics.ts --out plot.svg MeRF=runs/merf RLVR=runs/rlvr

import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { parseArgs } from 'node:util';
import * as vega from 'vega';
import { compile, type TopLevelSpec } from 'vega-lite';
import { readMetrics } from '../lib/train/metrics.js';

interface RewardPoint {
  run: string;
  step: number;
  reward: number;
}

interface AccuracyPoint {
  run: string;
  step: number;
  view: string;
  accuracy: number;
}

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: { out: { type: 'string' }, title: { type: 'string', default: '' } },
});
if (!values.out || positionals.length === 0) {
  console.error('usage: npx tsx scripts/plot-metrics.ts --out FILE.svg [--title TEXT] NAME=RUN_FOLDER ...');
  process.exit(2);
}

const rewards: RewardPoint[] = [];
const accuracies: AccuracyPoint[] = [];
for (const argument of positionals) {
  const [run, folder] = argument.split('=');
  if (!run || !folder) {
    console.error(`Expected NAME=RUN_FOLDER but received ${argument}`);
    process.exit(2);
  }
  for (const row of readMetrics(join(folder, 'metrics.jsonl'))) {
    if (typeof row.reward === 'number') rewards.push({ run, step: row.step, reward: row.reward });
    const views = (row.evaluation ?? {}) as Record<string, { accuracy: number }>;
    for (const [view, { accuracy }] of Object.entries(views)) {
      accuracies.push({ run, step: row.step, view: `motivation: ${view}`, accuracy });
    }
  }
}

const color = {
  field: 'run',
  type: 'nominal',
  title: 'trained as',
  scale: { scheme: 'category10' },
} as const;
const step = { field: 'step', type: 'quantitative', title: 'training step' } as const;
const specification: TopLevelSpec = {
  $schema: 'https://vega.github.io/schema/vega-lite/v6.json',
  background: 'white',
  ...(values.title ? { title: values.title } : {}),
  hconcat: [
    {
      width: 380,
      height: 260,
      title: 'reward of the training completions (line: running mean of 5 steps)',
      data: { values: rewards },
      layer: [
        {
          mark: { type: 'point', size: 12, opacity: 0.45 },
          encoding: { x: step, y: { field: 'reward', type: 'quantitative', scale: { zero: false } }, color },
        },
        {
          transform: [
            {
              window: [{ op: 'mean', field: 'reward', as: 'mean' }],
              frame: [-4, 0],
              sort: [{ field: 'step' }],
              groupby: ['run'],
            },
          ],
          mark: { type: 'line' },
          encoding: { x: step, y: { field: 'mean', type: 'quantitative', title: 'reward' }, color },
        },
      ],
    },
    {
      width: 380,
      height: 260,
      title: 'accuracy on held-out puzzles',
      data: { values: accuracies },
      mark: { type: 'line', point: true },
      encoding: {
        x: step,
        y: { field: 'accuracy', type: 'quantitative', axis: { format: '.0%' }, scale: { zero: true } },
        color,
        strokeDash: { field: 'view', type: 'nominal', title: 'validated with' },
      },
    },
  ],
};
const view = new vega.View(vega.parse(compile(specification).spec), { renderer: 'none' });
writeFileSync(values.out, await view.toSVG());
