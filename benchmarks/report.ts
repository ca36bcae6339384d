// What was measured, as it is written: JSON with every run, and Markdown with medians and ratios.
import { mkdirSync, writeFileSync } from 'node:fs';
import { join, relative } from 'node:path';
import { type MatrixRates, type Parts, peakRate } from './floor.js';
import type { OperatorLine } from './operators.js';
import { root, say } from './paths.js';
import { type EngineRuns, keepingNone, motivationTokens } from './rounds.js';
import type { StepTimes } from './step.js';
import type { Dtype, Sizes } from './workloads.js';

/** The machine on which a figure was measured, and when. */
export interface Machine {
  date: string;
  processor: string;
  isa: string;
  threads: number;
  memoryBytes: number;
  versions: Record<string, string>;
}

/** The steps measured in one dtype. */
export interface Steps {
  dtype: Dtype;
  /** Seconds; absent where there is no matrix rate. */
  floor?: Parts | undefined;
  engines: EngineRuns[];
  /** merf's steps with common tokens in front of all prompts. */
  motivation: StepTimes[];
  /** merf's steps whose rollouts keep more or less than is the default of what the update would compute again. */
  keeping?: EngineRuns[] | undefined;
}

export interface Report extends Machine {
  matrixRate?: MatrixRates | undefined;
  workload: { model: string } & Sizes;
  steps: Steps[];
  operators: OperatorLine[];
}

// ---- figures

export function median(values: readonly number[]): number {
  const sorted = [...values].sort((a, b) => a - b);
  const at = (i: number) => sorted[i] ?? Number.NaN;
  return (at(Math.floor((sorted.length - 1) / 2)) + at(Math.floor(sorted.length / 2))) / 2;
}

/** Medians over the runs. */
export interface Figures {
  generation: number;
  tokensPerSecond: number;
  training?: number;
  step?: number;
}

/** undefined where there are no runs. */
export function figuresOf(runs: readonly StepTimes[]): Figures | undefined {
  const [first] = runs;
  if (first === undefined) return undefined;
  const of = (value: (run: StepTimes) => number | undefined) => median(runs.map((run) => value(run) ?? 0));
  const figures: Figures = {
    generation: of(({ generation }) => generation),
    tokensPerSecond: of(({ tokens, generation }) => tokens / generation),
  };
  if (first.training !== undefined) figures.training = of(({ training }) => training);
  if (first.step !== undefined) figures.step = of(({ step }) => step);
  return figures;
}

export interface Goal {
  what: string;
  value: number;
  wanted: number;
  /** true: the value must not be above what is wanted; false: not below it. */
  most: boolean;
  unit: string;
}

/** What merf is meant to reach, of those for which there are measurements. */
export function goalsOf({ floor, engines, motivation, keeping }: Steps): Goal[] {
  const merf = engines.find(({ name }) => name === 'merf');
  const own = figuresOf(merf?.runs ?? []);
  if (own?.step === undefined) return [];
  const goals: Goal[] = [];
  const add = (what: string, value: number | undefined, wanted: number, most: boolean, unit = 'x') => {
    if (value !== undefined) goals.push({ what, value, wanted, most, unit });
  };
  add('a step, in floors', floor && own.step / floor.step, 1.3, true);
  for (const { name, runs } of keeping ?? []) {
    if (name === keepingNone) continue;
    const step = figuresOf(runs)?.step;
    add(`a step, ${name.replace(/^merf, /, '')}, in floors`, floor && step && step / floor.step, 1.3, true);
  }
  add('generation, in its part of the floor', floor && own.generation / floor.generation, 1.5, true);
  const llama = figuresOf(engines.find(({ name }) => name === 'llama.cpp')?.runs ?? []);
  const faster = llama && own.tokensPerSecond / llama.tokensPerSecond;
  add("generated tokens/s, in llama.cpp's", faster, 10, false);
  add('peak memory', merf?.peakBytes && merf.peakBytes / 1e9, 3, true, ' GB');
  const motivated = figuresOf(motivation)?.step;
  add(
    `a step with a motivation of ${motivationTokens} tokens, in steps without`,
    motivated && motivated / own.step,
    1.08,
    true,
  );
  return goals;
}

// ---- Markdown

type Cell = string | number | undefined;

/** Columns whose head ends with ":" are aligned right. */
export function table(head: readonly string[], rows: readonly (readonly Cell[])[]): string {
  const line = (cells: readonly Cell[]) => `| ${cells.map((cell) => cell ?? '').join(' | ')} |`;
  return [
    line(head.map((name) => name.replace(/:$/, ''))),
    line(head.map((name) => (name.endsWith(':') ? '---:' : '---'))),
    ...rows.map(line),
  ].join('\n');
}

export const rounded = (value: number | undefined): string =>
  value === undefined
    ? ''
    : value >= 100
      ? Math.round(value).toLocaleString('en-US')
      : String(Number(value.toPrecision(3)));

export function machineLines({ date, processor, isa, threads, memoryBytes, versions }: Machine): string[] {
  const memory = `${Math.round(memoryBytes / 2 ** 30)} GiB of memory`;
  const engines = Object.entries(versions).map(([name, version]) => `${name} ${version}`);
  return [
    `# ${processor}`,
    '',
    `${date}; ${threads} ${threads === 1 ? 'thread' : 'threads'}, ${isa}, ${memory}. ${engines.join(', ')}.`,
  ];
}

export function markdown(report: Report): string {
  const { workload: w, matrixRate, steps, operators } = report;
  const lines = [
    ...machineLines(report),
    '',
    '## A GRPO step',
    '',
    `Random weights of ${w.model}'s shape; ${w.prompts} prompts of ${w.promptTokens} tokens x ${w.group} completions of ` +
      `${w.completionTokens} tokens, sampled at temperature 1; one update without KL. Medians of steps that ` +
      'follow one to warm up. Ratios above 1: merf takes less time or memory.',
  ];
  for (const step of steps) lines.push('', ...stepLines(step, matrixRate));
  if (operators.length > 0) {
    lines.push(
      '',
      '## Operators',
      '',
      'Milliseconds; the peer is the fastest of those measured. A ratio above 1: merf takes less time.',
      '',
      table(['operator', 'type', 'merf:', 'PyTorch:', 'ratio:', 'which'], operatorRows(operators)),
    );
  }
  return `${lines.join('\n')}\n`;
}

function stepLines(steps: Steps, matrixRate: MatrixRates | undefined): string[] {
  const { dtype, floor, engines } = steps;
  const merf = engines.find(({ name }) => name === 'merf');
  const own = figuresOf(merf?.runs ?? []);
  const cellsOf = (
    { step, generation, training, tokensPerSecond }: Figures,
    bytes: number | undefined,
  ): Cell[] => [step, generation, training, tokensPerSecond, bytes && bytes / 1e9].map(rounded);
  const rows: Cell[][] = engines.map(({ name, runs, peakBytes, error }) => {
    const figures = figuresOf(runs);
    if (figures === undefined) return [name, ...Array(8).fill(''), error];
    const { step, tokensPerSecond } = figures;
    const ratio = (theirs?: number, ours?: number) =>
      name === 'merf' || theirs === undefined || ours === undefined ? '' : rounded(theirs / ours);
    return [
      name,
      ...cellsOf(figures, peakBytes),
      ratio(step, own?.step),
      ratio(own?.tokensPerSecond, tokensPerSecond),
      ratio(peakBytes, merf?.peakBytes),
      `${runs.length}${error === undefined ? '' : `, then ${error}`}`,
    ];
  });
  const motivated = figuresOf(steps.motivation);
  if (motivated !== undefined) {
    const name = `merf, ${motivationTokens} common tokens in front`;
    rows.splice(1, 0, [name, ...cellsOf(motivated, undefined), '', '', '', steps.motivation.length]);
  }
  const kept = (steps.keeping ?? []).flatMap(({ name, runs, peakBytes }): Cell[][] => {
    const figures = figuresOf(runs);
    return figures === undefined ? [] : [[name, ...cellsOf(figures, peakBytes), '', '', '', runs.length]];
  });
  rows.splice(motivated === undefined ? 1 : 2, 0, ...kept);
  const rate = peakRate(matrixRate, dtype);
  if (floor !== undefined && rate !== undefined) {
    const times = [floor.step, floor.generation, floor.training].map(rounded);
    const name = `the floor, at ${rounded(rate)} GFLOP/s`;
    rows.push([name, ...times, '', '', own?.step ? rounded(floor.step / own.step) : '', '', '', '']);
  }
  const columns = ['step, s:', 'generation, s:', 'training, s:', 'generated tokens/s:', 'peak memory, GB:'];
  const ratios = ['step, ratio:', 'tokens/s, ratio:', 'memory, ratio:', 'runs:'];
  const lines = [`### ${dtype}`, '', table(['engine', ...columns, ...ratios], rows)];
  const goals = goalsOf(steps).map(({ what, value, wanted, most, unit }) => {
    const met = most ? value <= wanted : value >= wanted;
    return [
      what,
      `${rounded(value)}${unit}`,
      `${most ? 'at most' : 'at least'} ${wanted}${unit}`,
      met ? 'met' : 'missed',
    ];
  });
  const gaps = (merf?.runs ?? []).flatMap(({ gap }) => gap ?? []);
  if (gaps.length > 0) {
    lines.push(
      '',
      "Largest gap between a token's log-probability where merf drew it and where it trained on it, in nats: " +
        `${Math.max(...gaps).toPrecision(2)}.`,
    );
  }
  if (goals.length > 0) lines.push('', table(['goal', 'measured:', 'wanted:', ''], goals));
  return lines;
}

const operatorMetrics: Record<string, string> = {
  forward_ms: 'forward',
  forward_backward_ms: 'forward + backward',
  ms: '',
};

function operatorRows(lines: readonly OperatorLine[]): Cell[][] {
  return lines
    .filter(({ engine }) => engine === 'merf')
    .flatMap((merf): Cell[][] => {
      if (merf.metrics === undefined) return [[merf.case, merf.dtype, '', '', '', merf.error]];
      const peers = lines.filter(
        (line) => line.case === merf.case && line.dtype === merf.dtype && line.engine !== 'merf',
      );
      return Object.entries(operatorMetrics).flatMap(([key, what]) => {
        const ours = merf.metrics?.[key];
        if (ours === undefined) return [];
        const [best] = peers
          .map(({ engine, metrics }) => ({ engine, value: metrics?.[key] ?? Number.POSITIVE_INFINITY }))
          .sort((a, b) => a.value - b.value);
        const name = `${merf.case}${what === '' ? '' : `, ${what}`}`;
        if (best === undefined || best.value === Number.POSITIVE_INFINITY)
          return [[name, merf.dtype, rounded(ours), '', '', '']];
        const which = best.engine.replace('PyTorch, ', '');
        return [[name, merf.dtype, rounded(ours), rounded(best.value), rounded(best.value / ours), which]];
      });
    });
}

// ---- files

/** Writes `files` (by what their names end with) for the machine's processor, and says where. */
export function writeResults(
  processor: string,
  folder: string | undefined,
  files: Record<string, string>,
): void {
  const out = folder ?? join(root, 'benchmarks', 'results');
  const name = processor
    .replaceAll(/[^A-Za-z0-9]+/g, '-')
    .replace(/-$/, '')
    .toLowerCase();
  mkdirSync(out, { recursive: true });
  for (const [ending, text] of Object.entries(files)) {
    const path = join(out, `${name}${ending}`);
    writeFileSync(path, text);
    say(`Written: ${relative(process.cwd(), path) || path}`);
  }
}
