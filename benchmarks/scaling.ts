// How the cost of a GRPO step grows with its tokens, its group, its prompts and the threads.
import { say } from './paths.js';
import { figuresOf, type Machine, machineLines, rounded, table } from './report.js';
import { grpoStep, type StepTimes } from './step.js';
import { type Dtype, promptsOf, randomPolicy, type Sizes, type Workload } from './workloads.js';

/** One size of one series, with all its runs. */
export interface Point {
  series: string;
  x: number;
  sizes: Sizes;
  threads: number;
  runs: StepTimes[];
}

export interface Series {
  name: string;
  /** What x counts. */
  title: string;
  /** What figures are divided by: a step's completions, or 1. */
  per: (sizes: Sizes) => number;
  unit: string;
}

const base: Sizes = { prompts: 1, promptTokens: 256, group: 8, completionTokens: 32 };
const step = 'seconds a step';

export const allSeries: readonly Series[] = [
  {
    name: 'group',
    title: 'completions of a prompt',
    per: ({ group }) => group,
    unit: 'seconds a completion',
  },
  { name: 'prompt', title: 'tokens of the prompt', per: () => 1, unit: step },
  { name: 'completion', title: 'tokens of each completion', per: () => 1, unit: step },
  { name: 'threads', title: 'threads', per: () => 1, unit: step },
];

export function pointsOf(threads: number): Point[] {
  const series = (name: string, xs: readonly number[], sizes: (x: number) => Sizes): Point[] =>
    xs.map((x) => ({ series: name, x, sizes: sizes(x), threads, runs: [] }));
  const counts = [...new Set([1, 2, 4, 8, 16, 32, 64, 128].filter((n) => n < threads).concat(threads))];
  return [
    ...series('group', [4, 8, 16, 32], (group) => ({ ...base, group })),
    ...series('prompt', [128, 256, 512, 1024, 2048], (promptTokens) => ({ ...base, promptTokens })),
    ...series('completion', [16, 32, 64, 128], (completionTokens) => ({ ...base, completionTokens })),
    ...counts.flatMap((count) =>
      series('threads', [count], () => base).map((p) => ({ ...p, threads: count })),
    ),
  ];
}

const maxRounds = 3;

/** Runs the points in turn, once or as often (up to three times) as the seconds allow, each after a step to warm up. */
export async function measureScaling(
  workload: Pick<Workload, 'config' | 'model'>,
  dtype: Dtype,
  threads: number,
  seconds: number,
): Promise<Point[]> {
  const points = pointsOf(threads);
  const begin = performance.now();
  const elapsed = () => (performance.now() - begin) / 1000;
  for (const count of [...new Set(points.map((point) => point.threads))]) {
    const some = points.filter((point) => point.threads === count);
    const policy = await randomPolicy(workload, { dtype, threads: count });
    await grpoStep(policy, [[1, 2, 3, 4]], { group: 2, completionTokens: 4 }, 0);
    const start = elapsed();
    for (let round = 0; round < maxRounds; ++round) {
      const each = round === 0 ? 0 : (elapsed() - start) / round;
      if (elapsed() + each > seconds && round > 0) break;
      for (const { series, x, sizes, runs } of some) {
        const prompts = promptsOf({ ...workload, title: '', sizes });
        // The step before was of another size, whose memory need not be this one's.
        await grpoStep(policy, prompts, sizes, 0);
        const times = await grpoStep(policy, prompts, sizes, round + 1);
        runs.push(times);
        say(`  ${series} ${x}, ${count === 1 ? '1 thread' : `${count} threads`}: ${times.step.toFixed(2)} s`);
      }
    }
    policy.dispose();
  }
  return points;
}

export function scalingMarkdown(
  machine: Machine,
  model: string,
  dtype: Dtype,
  points: readonly Point[],
): string {
  const lines = [
    ...machineLines(machine),
    '',
    `What a GRPO step of merf costs; random weights of ${model}'s shape, ${dtype}. Medians; where not said otherwise, ` +
      `${base.prompts} prompt of ${base.promptTokens} tokens x ${base.group} completions of ${base.completionTokens} tokens.`,
  ];
  for (const { name, title, per, unit } of allSeries) {
    const rows = points
      .filter(({ series }) => series === name)
      .map(({ x, sizes, runs }) => {
        const { step, generation, training } = figuresOf(runs) ?? {};
        const value = (seconds: number | undefined) => rounded(seconds && seconds / per(sizes));
        return [x, value(generation), value(training), value(step), runs.length];
      });
    const head = [`${title}:`, 'generation:', 'training:', 'both:', 'runs:'];
    lines.push('', `${unit[0]?.toUpperCase()}${unit.slice(1)}:`, '', table(head, rows));
  }
  return `${lines.join('\n')}\n`;
}

/** The points as a plot, in SVG; undefined where vega and vega-lite are not installed. */
export async function scalingPlot(points: readonly Point[], title: string): Promise<string | undefined> {
  let vega: typeof import('vega');
  let vegaLite: typeof import('vega-lite');
  try {
    vega = await import('vega');
    vegaLite = await import('vega-lite');
  } catch {
    return undefined;
  }
  const panel = ({ name, title, per, unit }: Series) => ({
    width: 300,
    height: 220,
    data: {
      values: points
        .filter(({ series }) => series === name)
        .flatMap(({ x, sizes, runs }) => {
          const { step, generation, training } = figuresOf(runs) ?? {};
          return Object.entries({ generation, training, both: step }).map(([part, seconds]) => ({
            x,
            part,
            y: (seconds ?? 0) / per(sizes),
          }));
        }),
    },
    mark: { type: 'line', point: true },
    encoding: {
      x: { field: 'x', type: 'quantitative', title },
      y: { field: 'y', type: 'quantitative', title: unit, scale: { zero: true } },
      color: { field: 'part', type: 'nominal', title: '', sort: ['both', 'training', 'generation'] },
    },
  });
  const specification = {
    $schema: 'https://vega.github.io/schema/vega-lite/v6.json',
    background: 'white',
    title,
    columns: 2,
    concat: allSeries.map(panel),
  } as import('vega-lite').TopLevelSpec;
  const view = new vega.View(vega.parse(vegaLite.compile(specification).spec), { renderer: 'none' });
  return view.toSVG();
}
