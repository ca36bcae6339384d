// `merf bench` (`npm run bench` in a clone): how fast this machine takes GRPO steps, beside what it could at best and
// beside other engines.
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { MerfError } from 'merf';
import { agentMarkdown, agentTurns, measureAgent, turnTokens } from './agent.js';
import { bestRates, measureMatrixRates, operationsOf, peakRate, secondsOf } from './floor.js';
import { launchesText } from './launches.js';
import { measureOperators } from './operators.js';
import { root, say } from './paths.js';
import { checkPeers, findPeer, type PeerName, peerNames } from './peers.js';
import { profileStep, profileText } from './profile.js';
import { type Machine, markdown, type Report, writeResults } from './report.js';
import { measureSteps } from './rounds.js';
import { measureScaling, scalingMarkdown, scalingPlot } from './scaling.js';
import { type Dtype, grpoSizes, parseSizes, type Workload, workloadOf } from './workloads.js';

export interface BenchOptions {
  /** The processor, as `merf doctor` describes it. */
  processor: {
    description: string;
    isa: string;
    threads: number;
    memoryBytes: number;
    libraries: [string, string][];
    fastBf16: boolean;
  };
  /** Measured beside merf; `none` alone: no peers. Default: those that are installed. */
  peers?: string[];
  /**
   * For all measured rounds together. Default 15, 10 where no peers are named, 8 for `scaling`, 5 for `agent`. Peers
   * that were named are measured at least once, whatever it takes.
   */
  minutes?: number;
  /** Default: f32, and bf16 where the processor multiplies it in hardware. */
  dtype?: Dtype;
  /** Whose shape the random weights have. Default: SmolLM2-135M. */
  model?: string;
  /** PROMPTSxTOKENSxGROUPxTOKENS. Default 4x256x8x64. */
  sizes?: string;
  /** false: the operators are not measured one by one. */
  operators?: boolean;
  /** The folder that results are written to. Default benchmarks/results in the package. */
  out?: string;
  profile?: boolean;
  scaling?: boolean;
  /** Measures the rollout of episodes of several turns instead, with a session and without. */
  agent?: boolean;
  /** Counts launches instead; with `device: 'cuda-emulated'` alone. */
  launches?: boolean;
  device?: string;
}

/** Returns whether everything that was asked for was measured. */
export async function bench(options: BenchOptions): Promise<boolean> {
  const start = performance.now();
  if ((options.device !== undefined) !== (options.launches === true)) {
    throw new MerfError(
      'INVALID_ARGUMENT',
      `Expected --device cuda-emulated and --launches together but received ${options.launches ? '--launches' : '--device'} alone`,
    );
  }
  if (options.launches) {
    process.stdout.write(await launchesText(options.model));
    return true;
  }
  const { fastBf16, threads } = options.processor;
  const alone = (['profile', 'scaling', 'agent'] as const).filter((name) => options[name]);
  if (alone.length > 1) {
    throw new MerfError(
      'INVALID_ARGUMENT',
      `Expected one of --profile, --scaling and --agent but received ${alone.map((name) => `--${name}`).join(' and ')}`,
    );
  }
  const peers = choosePeers(options.peers);
  const sizes = options.sizes === undefined ? grpoSizes : parseSizes(options.sizes);
  const workload = await workloadOf(options.model, sizes);
  const dtypes: Dtype[] = options.dtype ? [options.dtype] : fastBf16 ? ['f32', 'bf16'] : ['f32'];
  const fastest = dtypes.at(-1) as Dtype;
  if (options.profile) {
    process.stdout.write(profileText(await profileStep(workload, fastest, threads)));
    return true;
  }
  const done = options.scaling
    ? await scaling(options, workload, fastest)
    : options.agent
      ? await agent(options, workload, fastest)
      : await steps(options, workload, dtypes, peers);
  say(`Done after ${Math.round((performance.now() - start) / 1000)} s`);
  return done;
}

async function steps(
  options: BenchOptions,
  workload: Workload,
  dtypes: readonly Dtype[],
  peers: readonly PeerName[],
): Promise<boolean> {
  const { threads } = options.processor;
  const { config, sizes } = workload;
  const report: Report = {
    ...machineOf(options),
    workload: { model: workload.title, ...sizes },
    steps: [],
    operators: [],
  };
  say('matrix products');
  report.matrixRate = measureMatrixRates(threads);
  if (report.matrixRate === undefined)
    say('  left out, and the floor with them: they need a clone that is built');
  for (const dtype of dtypes) {
    const strict = options.peers === undefined;
    const seconds = (60 * (options.minutes ?? (strict ? 10 : 15))) / dtypes.length;
    const measured = await measureSteps({ workload, dtype, threads, peers, seconds, strict });
    report.steps.push({ dtype, ...measured });
    for (const { versions } of measured.engines) Object.assign(report.versions, versions);
  }
  if (options.operators !== false) {
    for (const dtype of dtypes) {
      const { lines, versions } = measureOperators(dtype, threads, options.peers?.[0] !== 'none');
      report.operators.push(...lines);
      Object.assign(report.versions, versions);
    }
  }
  // Once more, so that a neighbour's minute does not make the floor higher than it is.
  report.matrixRate = bestRates(report.matrixRate, measureMatrixRates(threads));
  for (const step of report.steps) {
    const rate = peakRate(report.matrixRate, step.dtype);
    if (rate !== undefined) step.floor = secondsOf(operationsOf(config, sizes), rate);
  }
  const text = markdown(report);
  process.stdout.write(`\n${text}\n`);
  writeResults(report.processor, options.out, {
    '.md': text,
    '.json': `${JSON.stringify(report, null, 2)}\n`,
  });
  return !report.steps.some(({ engines }) =>
    engines.some(
      ({ name, error }) => error !== undefined && (name === 'merf' || options.peers?.includes(name)),
    ),
  );
}

async function scaling(options: BenchOptions, workload: Workload, dtype: Dtype): Promise<boolean> {
  const machine = machineOf(options);
  const seconds = 60 * (options.minutes ?? 8);
  const points = await measureScaling(workload, dtype, machine.threads, seconds);
  const text = scalingMarkdown(machine, workload.title, dtype, points);
  process.stdout.write(`\n${text}\n`);
  const json = { ...machine, model: workload.title, dtype, points };
  const plot = await scalingPlot(points, `${machine.processor}, ${workload.title}, ${dtype}`);
  if (plot === undefined)
    say('The plot is left out: it needs vega and vega-lite (npm install vega vega-lite)');
  writeResults(machine.processor, options.out, {
    '-scaling.md': text,
    '-scaling.json': `${JSON.stringify(json, null, 2)}\n`,
    ...(plot === undefined ? {} : { '-scaling.svg': plot }),
  });
  return true;
}

async function agent(options: BenchOptions, workload: Workload, dtype: Dtype): Promise<boolean> {
  const { completionTokens, promptTokens } = workload.sizes;
  if (completionTokens >= turnTokens) {
    throw new MerfError(
      'INVALID_ARGUMENT',
      `Expected --sizes with completions of fewer than ${turnTokens} tokens for --agent but received ${completionTokens}`,
    );
  }
  const tokens = promptTokens + agentTurns * turnTokens;
  if (tokens > workload.config.maxPositions) {
    throw new MerfError(
      'CONTEXT_EXCEEDED',
      `Expected episodes of at most ${workload.config.maxPositions} tokens, the model's context, but received ${tokens}`,
    );
  }
  const machine = machineOf(options);
  const measured = await measureAgent(workload, dtype, machine.threads, 60 * (options.minutes ?? 5));
  const text = agentMarkdown(machine, workload, dtype, measured);
  process.stdout.write(`\n${text}\n`);
  const json = { ...machine, model: workload.title, dtype, ...workload.sizes, ...measured };
  writeResults(machine.processor, options.out, {
    '-agent.md': text,
    '-agent.json': `${JSON.stringify(json, null, 2)}\n`,
  });
  return true;
}

function machineOf({ processor }: BenchOptions): Machine {
  const { version } = JSON.parse(readFileSync(join(root, 'package.json'), 'utf8')) as { version: string };
  const { description, isa, threads, memoryBytes, libraries } = processor;
  return {
    date: new Date().toISOString().slice(0, 10),
    processor: description,
    isa,
    threads,
    memoryBytes,
    versions: { merf: version, 'Node.js': process.versions.node, ...Object.fromEntries(libraries) },
  };
}

/**
 * Chooses the peers that were asked for, or else those that are installed.
 * @throws MerfError UNSUPPORTED where one is unknown, or asked for and not installed
 */
function choosePeers(names: readonly string[] | undefined): PeerName[] {
  if (names?.length === 1 && names[0] === 'none') return [];
  if (names === undefined) return peerNames.filter((name) => !('missing' in findPeer(name)));
  const wanted = checkPeers(names);
  for (const name of wanted) {
    const found = findPeer(name);
    if ('missing' in found) {
      throw new MerfError('UNSUPPORTED', `The peer ${name} is not installed. ${found.missing}`);
    }
  }
  return wanted;
}
