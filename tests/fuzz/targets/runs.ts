import { createHash } from 'node:crypto';
import { mkdtempSync, readdirSync, readFileSync, rmSync, statSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join, relative } from 'node:path';
import { readConfigFile, sftFileSchema, trainSchema } from '../../../lib/cli/config.js';
import { gather } from '../../../lib/cli/runs.js';
import { Policy } from '../../../lib/policy/policy.js';
import { knightsAndKnaves } from '../../../lib/tasks/index.js';
import { listCheckpoints } from '../../../lib/train/checkpoint.js';
import { readSavedRun } from '../../../lib/train/loop.js';
import { MetricsLog, readMetrics } from '../../../lib/train/metrics.js';
import { Trainer } from '../../../lib/train/trainer.js';
import { tinyConfig, writeTinyModel } from '../../policy/tiny-model.js';
import { FakePolicy } from '../../train/fake-policy.js';
import { fakeTask } from '../../train/fake-task.js';
import type { Draw } from '../draw.js';
import { hostileText, mutateBytes, mutatedJsonText, mutateText } from '../mutate.js';
import { type Input, type Target, writeInput } from '../target.js';

const yaml = `# A run.
task: knights-and-knaves
people: 2-3
steps: 20
groupSize: 8
learningRate: 1e-5
motivation: suboptimal=0.5,none=0.5
learn_under: same
curriculum: people=2,3,4@0.8
stop: ["</answer>", 'x']
evaluateMotivations: &a [suboptimal, none]
motivations: *a
model: ./model
data: rows.jsonl
`;

const config: Target = {
  name: 'config-file',
  // Each of three readings may take 5 s.
  seconds: 20,
  make(draw): Input {
    const line = draw.pick([
      `steps: ${hostileText(draw).slice(0, 200)}`,
      `motivation: ${draw.pick(['template:x.txt', 'none@5,suboptimal', hostileText(draw).slice(0, 200)])}`,
      `a: &a [x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b]\nd: [*c,*c,*c,*c,*c]`,
      `x: ${'['.repeat(draw.pick([10, 200, 2000]))}`,
      `? ${'{'.repeat(draw.pick([2, 500]))}\n: 1`,
      `<<: *a`,
      `__proto__: { steps: 3 }`,
      `constructor: 1`,
      `then: 1`,
      `steps: !!js/function 'x'`,
      `steps: !!binary x`,
      `steps: .inf`,
      `steps: 2001-01-01`,
    ]);
    const json = { task: 'countdown', steps: 3, out: 'x', stop: ['a'], curriculum: 'numbers=3,4', seed: 1 };
    if (draw.chance(0.3)) return { 'run.json': mutatedJsonText(draw, json) };
    const text = draw.chance(0.5) ? `${yaml}${line}\n` : `${line}\n`;
    return { 'run.yaml': draw.chance(0.6) ? mutateText(draw, text) : text };
  },
  async run(input, folder) {
    writeInput(folder, input);
    const path = join(folder, 'run.yaml' in input ? 'run.yaml' : 'run.json');
    await readConfigFile(path, trainSchema(undefined)).catch(expected);
    await readConfigFile(path, sftFileSchema(undefined)).catch(expected);
    return readConfigFile(path, trainSchema(knightsAndKnaves as never));
  },
};

function expected(error: unknown): void {
  if ((error as Error).name !== 'MerfError') throw error;
}

/** All files below a folder, by their path in it. */
function filesOf(folder: string): Record<string, Uint8Array> {
  const files: Record<string, Uint8Array> = {};
  for (const name of readdirSync(folder, { recursive: true }) as string[]) {
    const path = join(folder, name);
    if (statSync(path).isFile()) files[relative(folder, path)] = new Uint8Array(readFileSync(path));
  }
  return files;
}

function inScratch<T>(use: (folder: string) => Promise<T>): Promise<T> {
  const folder = mkdtempSync(join(tmpdir(), 'merf-fuzz-'));
  return use(folder).finally(() => rmSync(folder, { recursive: true, force: true }));
}

// ---- runs of a trainer

async function trainer(out: string, steps: number) {
  return new Trainer({
    policy: new FakePolicy().asPolicy,
    task: await fakeTask({ rows: 12 }),
    out,
    steps,
    promptsPerStep: 2,
    groupSize: 2,
    maxTokens: 4,
    learningRate: 0.5,
    saveEvery: 1,
    keepCheckpoints: 2,
    replay: 2,
    ...(steps > 0 && { resume: steps > 2 }),
  } as ConstructorParameters<typeof Trainer>[0]);
}

let finishedRun: Promise<Input> | undefined;

function runFiles(): Promise<Input> {
  finishedRun ??= inScratch(async (folder) => {
    await (await trainer(join(folder, 'run'), 2)).run();
    return filesOf(join(folder, 'run'));
  });
  return finishedRun;
}

const ownFiles = /(?:^|\/)(?:run\.json|progress\.json|trainer\.json|metrics\.jsonl|motivation\.jsonl)$/;

/** One of a run's own files is another, cut short, or missing. */
function damaged(draw: Draw, files: Input, which: RegExp): Input {
  const name = draw.pick(
    Object.keys(files)
      .filter((path) => which.test(path))
      .sort(),
  );
  const { [name]: content, ...rest } = files;
  if (draw.chance(0.05)) return rest;
  const bytes = Buffer.from(content as Uint8Array);
  if (draw.chance(0.3)) return { ...rest, [name]: mutateBytes(draw, bytes) };
  if (name.endsWith('.jsonl')) {
    const lines = bytes.toString().split('\n').filter(Boolean);
    const at = draw.below(lines.length);
    lines[at] = mutatedJsonText(draw, JSON.parse(lines[at] ?? '{}') as object);
    return { ...rest, [name]: lines.join('\n') };
  }
  return { ...rest, [name]: mutatedJsonText(draw, JSON.parse(bytes.toString()) as object) };
}

const run: Target = {
  name: 'run-folder',
  make: async (draw) => damaged(draw, await runFiles(), ownFiles),
  async run(input, folder) {
    const out = join(folder, 'run');
    writeInput(out, input);
    for (const read of [
      () => readSavedRun(out),
      () => readMetrics(join(out, 'metrics.jsonl')),
      () => new MetricsLog(join(out, 'motivation.jsonl')).truncate(1),
      () => listCheckpoints(join(out, 'checkpoints')),
      () => gather({ resume: out }, trainSchema(undefined), 'grpo', 'run'),
    ]) {
      try {
        await read();
      } catch (error) {
        expected(error);
      }
    }
    return (await trainer(out, 3)).run();
  },
};

// ---- training states

interface States {
  readonly policy: Policy;
  readonly files: Input;
}

let states: Promise<States> | undefined;

function trainingStates(): Promise<States> {
  states ??= inScratch(async (folder) => {
    const path = writeTinyModel(join(folder, 'model'));
    const policy = await Policy.load(path, { device: 'cpu', threads: 1, dtype: 'f32', trainable: true });
    await policy.saveState(join(folder, 'state'));
    return { policy, files: filesOf(join(folder, 'state')) };
  });
  return states;
}

const state: Target = {
  name: 'training-state',
  async make(draw) {
    const { files } = await trainingStates();
    if (draw.chance(0.4)) return damaged(draw, files, /state\.json$/);
    const weights = mutateBytes(
      draw,
      files['state.safetensors'] as Uint8Array,
      0,
      draw.chance(0.8) ? 4000 : undefined,
    );
    const json = JSON.parse(Buffer.from(files['state.json'] as Uint8Array).toString()) as Record<
      string,
      unknown
    >;
    const sha256 = createHash('sha256').update(weights).digest('hex');
    const text = JSON.stringify({ ...json, ...(draw.chance(0.9) && { sha256, bytes: weights.length }) });
    return { 'state.json': text, 'state.safetensors': weights };
  },
  async run(input, folder) {
    writeInput(folder, input);
    const { policy } = await trainingStates();
    await policy.loadState(folder);
    const tokens = [1, 2, 3, tinyConfig.vocabSize - 1];
    await policy.score([{ tokens, train: {} }]);
  },
};

export const runTargets: readonly Target[] = [config, run, state];
