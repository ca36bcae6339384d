// `merf bench --device cuda-emulated --launches`: what a decode step and a training step launch on a GPU and which bytes
// they move, counted by benchmarks/launches.cc.
import { spawn } from 'node:child_process';
import { existsSync } from 'node:fs';
import { availableParallelism } from 'node:os';
import { MerfError, type ModelConfig, openModel } from 'merf';
import { programPath, say } from './paths.js';

/** A kernel, or `copy`, `fill` or the matrix library's `product`, in one step. */
interface Kernel {
  name: string;
  launches: number;
  /** Bytes of device memory, in sectors of 32 that a launch touches; undefined where only launches were counted. */
  read?: number;
  written?: number;
}

/** A line of the program's. */
export interface LaunchCount {
  /** decode, decode-few or training, and the shape's name. */
  case: string;
  shape: Record<string, number>;
  kernels: Kernel[];
  transfers: {
    uploads: number;
    uploaded: number;
    downloads: number;
    downloaded: number;
    synchronizations: number;
    plays: number;
  };
  error?: string;
}

const defaultShapes = ['qwen2.5-0.5b', 'qwen2.5-7b-lora'];
const namedShapes = ['smollm2-135m', 'qwen2.5-0.5b', 'qwen2.5-1.5b', 'qwen2.5-7b-lora'];

/**
 * @param model a shape's name, or a model whose shape to take; undefined: two shapes
 * @throws MerfError UNSUPPORTED where the program was not built, as in a package without the sources, or as `openModel`
 */
export async function launchesText(model: string | undefined): Promise<string> {
  const program = programPath('launches');
  if (!existsSync(program)) {
    throw new MerfError(
      'UNSUPPORTED',
      `Counting launches needs a clone that is built, with the device cuda-emulated: there is no ${program}`,
    );
  }
  const shapes = model === undefined ? defaultShapes : namedShapes.filter((name) => name === model);
  const runs = shapes.flatMap((name) => [`decode/${name}`, `decode-few/${name}`, `training/${name}`]);
  if (model !== undefined && runs.length === 0) runs.push(shapeOf((await openModel(model)).config));
  const counts = (await inTurn(runs, (name) => countLaunches(program, name))).flat();
  return counts.map((count) => launchTable(count, model)).join('\n');
}

function shapeOf(config: ModelConfig): string {
  const { architecture, hiddenSize, layers, heads, kvHeads, headSize, mlpSize, vocabSize } = config;
  const sizes = [hiddenSize, layers, heads, kvHeads, headSize, mlpSize, vocabSize];
  const flags = [config.tiedHead, config.attentionBias].map(Number);
  return `shape:${[architecture, ...sizes, ...flags].join(',')}`;
}

/** Runs `work` for as many names at a time as the machine has threads, since one count takes one thread. */
async function inTurn<T>(names: readonly string[], work: (name: string) => Promise<T>): Promise<T[]> {
  const results = new Array<T>(names.length);
  let next = 0;
  const worker = async () => {
    while (next < names.length) {
      const i = next++;
      results[i] = await work(names[i] as string);
    }
  };
  await Promise.all(Array.from({ length: availableParallelism() }, worker));
  return results;
}

async function countLaunches(program: string, name: string): Promise<LaunchCount[]> {
  say(`counting ${name}`);
  const child = spawn(program, [name], { stdio: ['ignore', 'pipe', 'inherit'] });
  let output = '';
  child.stdout.setEncoding('utf8').on('data', (text) => {
    output += text;
  });
  await new Promise<void>((resolve, reject) => {
    child.on('error', reject).on('close', () => resolve());
  });
  const counts = output
    .split('\n')
    .filter(Boolean)
    .map((line) => JSON.parse(line) as LaunchCount);
  const error = counts.length === 0 ? 'it printed nothing' : counts.find((count) => count.error)?.error;
  if (error !== undefined) throw new MerfError('INTERNAL', `Launches of ${name} were not counted: ${error}`);
  return counts;
}

/** The table of one step, in Markdown. */
export function launchTable({ case: name, shape, kernels, transfers }: LaunchCount, model?: string): string {
  const [step, of] = name.split('/');
  const live = (shape.prompts ?? 0) * (shape.group ?? 0);
  const what =
    step !== 'training'
      ? `one decode step of ${live} completions`
      : `one training step (forward, backward and update) of ${shape.prompts} prompts with ${shape.group} completions each`;
  const bytes = kernels.every(({ read }) => read !== undefined);
  const row = (cells: (string | number)[]) => `| ${cells.join(' | ')} |`;
  const cells = (kernel: Kernel) => [
    kernel.launches,
    ...(bytes ? [kernel.read as number, kernel.written as number] : []),
  ];
  const total: Kernel = { name: 'all', launches: 0, read: 0, written: 0 };
  for (const { launches, read = 0, written = 0 } of kernels) {
    total.launches += launches;
    total.read = (total.read as number) + read;
    total.written = (total.written as number) + written;
  }
  const t = transfers;
  return [
    `### ${of === 'model' ? model : of}: ${what}`,
    '',
    row(['kernel', 'launches', ...(bytes ? ['bytes read', 'bytes written'] : [])]),
    row(['---', '---:', ...(bytes ? ['---:', '---:'] : [])]),
    ...kernels.map((kernel) => row([`\`${kernel.name}\``, ...cells(kernel)])),
    row(['all', ...cells(total)]),
    '',
    `Uploads: ${t.uploads} (${t.uploaded} bytes). Downloads: ${t.downloads} (${t.downloaded} bytes), each of which waits`,
    `for the device. Synchronisations beside them: ${t.synchronizations}. Recordings played: ${t.plays}.`,
    '',
  ].join('\n');
}
