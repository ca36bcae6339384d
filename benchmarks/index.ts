// `merf bench` (`npm run bench` in a clone): how fast this machine rolls out and trains.
import { execFileSync, spawnSync } from 'node:child_process';
import { existsSync, mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { cpus, tmpdir } from 'node:os';
import { dirname, join, relative } from 'node:path';
import { monitorEventLoopDelay } from 'node:perf_hooks';
import {
  type CompletionGroup,
  countTokens,
  defaultModel,
  type Forest,
  forestOf,
  getTask,
  MerfError,
  type ModelConfig,
  Policy,
  readTokenizerFiles,
} from 'merf';

export interface BenchOptions {
  /** Measured beside merf. Default: those that are installed. */
  peers?: string[];
  /** The folder that the table is written to, as Markdown and as JSON. Default benchmarks/results in the package. */
  out?: string;
}

/** Completion tokens a second. */
interface Rates {
  name: string;
  rollout: number;
  training: number;
}

/** One model and the prompts it is measured on. */
interface Workload {
  title: string;
  policy: Policy;
  prompts: number[][];
  /** Completions of each prompt, and the most tokens of each. */
  group: number;
  maxTokens: number;
  repetitions: number;
  /** How a peer makes the same model. */
  peerModel: { model: string } | { config: Record<string, unknown> };
}

interface Result {
  title: string;
  dtype: string;
  parameters: number;
  prompts: number;
  group: number;
  completionTokens: number;
  /** Tokens that the forest computes once, and those of the same sequences side by side. */
  distinctTokens: number;
  unsharedTokens: number;
  /** The longest that the event loop was held up while merf rolled out and trained, in milliseconds. */
  longestBlock: number;
  rates: Rates[];
}

const root = dirname(createRequire(import.meta.url).resolve('merf/package.json'));
const say = (line: string) => process.stderr.write(`${line}\n`);

// The shape of SmolLM2-135M.
const mediumConfig: ModelConfig = {
  architecture: 'llama',
  hiddenSize: 576,
  layers: 30,
  heads: 9,
  kvHeads: 3,
  headSize: 64,
  mlpSize: 1536,
  vocabSize: 49_152,
  rmsNormEps: 1e-5,
  tiedHead: true,
  attentionBias: false,
  outputBias: false,
  mlpBias: false,
  maxPositions: 2048,
  rope: { type: 'default', theta: 100_000 },
};

export async function bench(options: BenchOptions = {}): Promise<void> {
  const start = performance.now();
  const python = findPyTorch(options.peers);
  const machine = { processor: cpus()[0]?.model ?? 'unknown', matrixRate: matrixRate() };
  const results: Result[] = [];
  for (const make of [shippedModel, mediumModel]) {
    const workload = await make();
    results.push(await measure(workload, python));
  }
  const report = markdown(machine, results);
  process.stdout.write(`\n${report}`);
  const folder = options.out ?? join(root, 'benchmarks', 'results');
  const name = machine.processor.replaceAll(/[^A-Za-z0-9]+/g, '-').toLowerCase();
  mkdirSync(folder, { recursive: true });
  writeFileSync(join(folder, `${name}.md`), report);
  writeFileSync(join(folder, `${name}.json`), `${JSON.stringify({ ...machine, results }, null, 2)}\n`);
  const seconds = Math.round((performance.now() - start) / 1000);
  say(`Written to ${relative(process.cwd(), join(folder, name)) || name}.{md,json} after ${seconds} s`);
}

// ---- what is measured

async function shippedModel(): Promise<Workload> {
  const path = defaultModel();
  const policy = await Policy.load(path);
  const task = await getTask('knights-and-knaves', { people: 2 });
  const rows = task.rows({ split: 'train', seed: 0 });
  const prompts = Array.from({ length: 8 }, (_, i) => {
    const text = policy.tokenizer.applyChatTemplate(task.messages(rows.at(i), 'full'), {
      addGenerationPrompt: true,
    });
    return policy.tokenizer.encode(text);
  });
  const limits = { group: 8, maxTokens: 256, repetitions: 9 };
  return { title: 'merf-mini, 2-person puzzles', policy, prompts, ...limits, peerModel: { model: path } };
}

async function mediumModel(): Promise<Workload> {
  const policy = await Policy.create(mediumConfig, await readTokenizerFiles(defaultModel()), { seed: 1 });
  const c = mediumConfig;
  const config = {
    model_type: c.architecture,
    hidden_size: c.hiddenSize,
    num_hidden_layers: c.layers,
    num_attention_heads: c.heads,
    num_key_value_heads: c.kvHeads,
    head_dim: c.headSize,
    intermediate_size: c.mlpSize,
    vocab_size: c.vocabSize,
    rms_norm_eps: c.rmsNormEps,
    tie_word_embeddings: c.tiedHead,
    max_position_embeddings: c.maxPositions,
    rope_parameters: { rope_type: 'default', rope_theta: c.rope.theta },
    eos_token_id: null,
    bos_token_id: null,
  };
  // An opening of 128 tokens for all, as long as a motivation, and questions of 64.
  const ids = (count: number, first: number) =>
    Array.from({ length: count }, (_, i) => 3 + (((first + i) * 7919) % (c.vocabSize - 3)));
  const prompts = [0, 1].map((p) => [...ids(128, 0), ...ids(64, 1000 * (p + 1))]);
  const limits = { group: 8, maxTokens: 64, repetitions: 2 };
  return { title: 'random weights, SmolLM2-135M shape', policy, prompts, ...limits, peerModel: { config } };
}

async function measure(workload: Workload, python: string | undefined): Promise<Result> {
  const { title, policy, prompts, group, maxTokens, repetitions } = workload;
  say(
    `${title}: ${prompts.length} prompts x ${group} completions of up to ${maxTokens} tokens, ${policy.dtype}`,
  );
  const warmUp = await policy.sample(prompts.slice(0, 1), { n: 2, maxTokens: 4 });
  await trainOn(policy, warmUp);
  const loop = monitorEventLoopDelay({ resolution: 1 });
  loop.enable();
  let groups: CompletionGroup[] = [];
  const rollout = await median(repetitions, async (seed) => {
    groups = await policy.sample(prompts, { n: group, maxTokens, seed });
    return tokensOf(groups);
  });
  say(`  merf rolls out ${rollout.toFixed(0)} tokens/s`);

  const training = await median(repetitions, async () => {
    await trainOn(policy, groups);
    return tokensOf(groups);
  });
  say(`  merf trains on ${training.toFixed(0)} completion tokens/s`);
  loop.disable();
  const longestBlock = loop.max / 1e6;
  const { dtype, parameterCount } = policy;
  const threads = policy.device.threads;
  policy.dispose();

  const rates: Rates[] = [{ name: 'merf', rollout, training }];
  if (python !== undefined) {
    const completions = groups.flatMap((g) => g.completions.map(({ tokens }) => Array.from(tokens)));
    const sizes = { group, maxTokens, dtype, threads, microBatch: group };
    const spec = { ...workload.peerModel, prompts, completions, ...sizes, repetitions };
    const peer = runPyTorch(python, spec);
    say(`  ${peer.name}: ${peer.rollout.toFixed(0)} and ${peer.training.toFixed(0)} tokens/s`);
    rates.push(peer);
  }
  const unshared = groups.reduce(
    (sum, { promptTokens, completions }) =>
      sum +
      completions.reduce((tokens, completion) => tokens + promptTokens.length + completion.tokens.length, 0),
    0,
  );
  return {
    title,
    dtype,
    parameters: parameterCount,
    prompts: prompts.length,
    group,
    completionTokens: tokensOf(groups),
    distinctTokens: countTokens(forestWith(groups)),
    unsharedTokens: unshared,
    longestBlock,
    rates,
  };
}

/** One update. Advantages alternate: no figure here depends on their values. */
async function trainOn(policy: Policy, groups: readonly CompletionGroup[]): Promise<void> {
  await policy.forwardBackward(forestWith(groups), { type: 'grpo' });
  await policy.optimStep({ learningRate: 1e-6, maxGradNorm: 1 });
}

function forestWith(groups: readonly CompletionGroup[]): Forest {
  return forestOf(
    groups.map(({ promptTokens, completions }) => ({
      promptTokens,
      completions: completions.map(({ tokens, logprobs }, i) => ({
        tokens,
        train: { advantage: i % 2 === 0 ? 1 : -1, logprobs },
      })),
    })),
  );
}

/** The median rate, in tokens a second, of runs that return how many tokens they made. */
async function median(repetitions: number, run: (repetition: number) => Promise<number>): Promise<number> {
  const rates: number[] = [];
  for (let i = 0; i < repetitions; ++i) {
    const start = performance.now();
    const tokens = await run(i);
    rates.push(tokens / ((performance.now() - start) / 1000));
  }
  rates.sort((a, b) => a - b);
  const upper = rates[Math.floor(repetitions / 2)] as number;
  const lower = rates[Math.floor((repetitions - 1) / 2)] as number;
  return (lower + upper) / 2;
}

function tokensOf(groups: readonly CompletionGroup[]): number {
  return groups.reduce((sum, g) => sum + g.completions.reduce((n, { tokens }) => n + tokens.length, 0), 0);
}

// ---- what it is measured beside

/** GFLOP/s of the engine's own matrix products, by `dtype/rows`; undefined where the program was not built. */
function matrixRate(): Record<string, number> | undefined {
  const program = join(root, 'build', 'matrix_rate');
  if (!existsSync(program)) return undefined;
  say('matrix products');
  return JSON.parse(execFileSync(program, { encoding: 'utf8' })) as Record<string, number>;
}

/** A Python that imports torch and transformers: MERF_PYTHON or python3. */
function findPyTorch(peers: string[] | undefined): string | undefined {
  const unknown = peers?.find((peer) => peer !== 'pytorch');
  if (unknown !== undefined) {
    throw new MerfError('UNSUPPORTED', `Expected pytorch for --peers but received ${unknown}`);
  }
  if (peers?.length === 0) return undefined;
  const python = process.env.MERF_PYTHON ?? 'python3';
  const probe = spawnSync(python, ['-c', 'import torch, transformers']);
  if (probe.status === 0) return python;
  if (peers !== undefined) {
    throw new MerfError(
      'UNSUPPORTED',
      `${python} cannot import torch and transformers: name one that can with MERF_PYTHON`,
    );
  }
  say(
    `${python} cannot import torch and transformers (name one that can with MERF_PYTHON): merf alone is measured`,
  );
  return undefined;
}

function runPyTorch(python: string, spec: object): Rates {
  const folder = mkdtempSync(join(tmpdir(), 'merf-bench-'));
  try {
    const file = join(folder, 'spec.json');
    writeFileSync(file, JSON.stringify(spec));
    const script = join(root, 'benchmarks', 'peers', 'pytorch.py');
    const output = execFileSync(python, [script, file], {
      encoding: 'utf8',
      stdio: ['ignore', 'pipe', 'ignore'],
    });
    return JSON.parse(output) as Rates;
  } finally {
    rmSync(folder, { recursive: true });
  }
}

// ---- what is written

function markdown(
  machine: { processor: string; matrixRate: Record<string, number> | undefined },
  results: readonly Result[],
): string {
  const lines = [`# ${machine.processor}`, ''];
  if (machine.matrixRate !== undefined) {
    const rates = Object.entries(machine.matrixRate).map(([key, rate]) => {
      const [dtype, rows] = key.split('/');
      return `${rate.toFixed(0)} (${dtype}, ${rows} rows)`;
    });
    lines.push(`Matrix products with packed weights, 2048 x 2048, GFLOP/s: ${rates.join(', ')}.`, '');
  }
  lines.push('Completion tokens a second: more is better.', '');
  lines.push('| model | engine | rollout | training |', '| --- | --- | ---: | ---: |');
  for (const { title, dtype, rates } of results) {
    for (const { name, rollout, training } of rates) {
      lines.push(`| ${title}, ${dtype} | ${name} | ${rollout.toFixed(0)} | ${training.toFixed(0)} |`);
    }
  }
  lines.push('');
  for (const {
    title,
    parameters,
    prompts,
    group,
    completionTokens,
    distinctTokens,
    unsharedTokens,
    longestBlock,
  } of results) {
    lines.push(
      `- ${title}: ${(parameters / 1e6).toFixed(1)}M parameters, ${prompts} prompts x ${group} completions; ` +
        `${completionTokens} completion tokens; the forest computes ${distinctTokens} tokens where rows ` +
        `side by side hold ${unsharedTokens}; the event loop was never held up longer than ` +
        `${longestBlock.toFixed(0)} ms.`,
    );
  }
  lines.push(
    '',
    'Rollout is sampling at temperature 1, prompts included. Training is one forward and backward pass with the GRPO ' +
      'loss and an AdamW step. Peers get the same prompts, completions, threads and type.',
    '',
  );
  return lines.join('\n');
}
