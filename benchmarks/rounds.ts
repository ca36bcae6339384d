// The engines take turns, so that what else the machine does meets them all alike.
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { configToJson } from 'merf';
import { writeRandomGguf } from './gguf-writer.js';
import { say } from './paths.js';
import {
  type Command,
  Engine,
  type EngineSpec,
  findNodeLlamaCpp,
  findPeer,
  merfCommand,
  type PeerName,
} from './peers.js';
import type { StepTimes } from './step.js';
import { type Dtype, promptsOf, type Workload } from './workloads.js';

/** All runs of one engine. */
export interface EngineRuns {
  name: string;
  versions: Record<string, string>;
  runs: StepTimes[];
  /** The most memory that its process held up to the end of its first run, in bytes. */
  peakBytes?: number | undefined;
  /** Why there are no runs, or no more. */
  error?: string;
}

export interface RoundOptions {
  workload: Workload;
  dtype: Dtype;
  threads: number;
  peers: readonly PeerName[];
  /** Seconds that all rounds may take together; the first is run whatever it takes, unless `strict`. */
  seconds: number;
  /** Peers that would take longer are left out. */
  strict: boolean;
}

/** What steps other than the default may take to keep the activations of their rollouts, in bytes. */
export const keepingNone = 'merf, keeping no activations';
const keepings = [
  { name: keepingNone, bytes: 0 },
  { name: 'merf, keeping all activations', bytes: 4 * 2 ** 30 },
];
/** Tokens of the motivation that all prompts begin with in the runs that measure what one costs. */
export const motivationTokens = 200;
const maxRounds = 3;
/**
 * A turn begins with a step that is not counted, since an engine that has waited for the others finds its memory cold;
 * but for steps that take longer than these seconds, which do so in their first turn alone.
 */
const warmedSeconds = 30;

/**
 * merf's runs first, then the peers'; `motivation`: merf's with common tokens in front of all prompts; `keeping`: merf's
 * that keep more or less of the rollout for the update than is the default.
 */
export async function measureSteps(
  options: RoundOptions,
): Promise<{ engines: EngineRuns[]; motivation: StepTimes[]; keeping: EngineRuns[] }> {
  const folder = mkdtempSync(join(tmpdir(), 'merf-bench-'));
  const live = new Map<EngineRuns, Engine>();
  try {
    const merf = await load('merf', options, folder, live);
    const peers: EngineRuns[] = [];
    for (const name of options.peers) peers.push(await load(name, options, folder, live));
    const plain = { prompts: promptsOf(options.workload) };
    const motivated = { prompts: promptsOf(options.workload, motivationTokens) };
    const motivation: EngineRuns = { name: 'merf with a motivation', versions: {}, runs: [] };
    const keeping = keepings.map(({ name }): EngineRuns => ({ name, versions: {}, runs: [] }));
    const turns = [
      { engine: merf, process: live.get(merf), input: plain },
      { engine: motivation, process: live.get(merf), input: motivated },
      ...keepings.map(({ bytes }, i) => ({
        engine: keeping[i] as EngineRuns,
        process: live.get(merf),
        input: { ...plain, keepActivations: bytes },
      })),
      ...peers.map((engine) => ({ engine, process: live.get(engine), input: plain })),
    ];
    const lasted = new Map<EngineRuns, number>();
    const begin = performance.now();
    const elapsed = () => (performance.now() - begin) / 1000;
    for (let round = 0; round < maxRounds; ++round) {
      for (const { engine, process, input } of turns) {
        if (process === undefined || engine.error !== undefined) continue;
        const isPeer = peers.includes(engine);
        // A slow peer must not take the time of merf's own further rounds.
        const own = [merf, motivation, ...keeping].reduce((sum, runs) => sum + (lasted.get(runs) ?? 0), 0);
        const kept = isPeer ? own * (maxRounds - 1 - round) : 0;
        const left = options.seconds - elapsed();
        if (round > 0 && (lasted.get(engine) ?? 0) + kept > left) continue;
        const start = elapsed();
        const patience = options.strict && isPeer ? Math.max(left, 1) : undefined;
        const before = lasted.get(engine);
        const warms = before === undefined || before < 2 * warmedSeconds;
        if (keeping.includes(engine)) {
          await takeTurnAlone(engine, join(folder, 'merf.json'), input);
        } else {
          await takeTurn(engine, process, input, patience, warms);
        }
        lasted.set(engine, elapsed() - start);
      }
    }
    return {
      engines: [merf, ...peers],
      motivation: motivation.runs,
      keeping,
    };
  } finally {
    await Promise.all([...live.values()].map((engine) => engine.close()));
    rmSync(folder, { recursive: true, force: true });
  }
}

async function takeTurn(
  runs: EngineRuns,
  engine: Engine,
  input: object,
  patience: number | undefined,
  warms: boolean,
): Promise<void> {
  try {
    if (warms) await engine.run(input, patience);
    const times = await engine.run(input, patience);
    if (runs.runs.length === 0) runs.peakBytes = engine.peakBytes();
    runs.runs.push(times);
    const parts = times.step === undefined ? '' : `a step in ${times.step.toFixed(2)} s, `;
    say(`  ${runs.name}: ${parts}${times.tokens} tokens generated in ${times.generation.toFixed(2)} s`);
  } catch (error) {
    fail(runs, error);
  }
}

/** A turn of merf's in a process of its own, whose memory is that of such steps, and which is there for the turn only. */
async function takeTurnAlone(runs: EngineRuns, specPath: string, input: object): Promise<void> {
  let engine: Engine | undefined;
  try {
    engine = await Engine.start('merf', merfCommand(), specPath);
    await engine.run(input);
    await takeTurn(runs, engine, input, undefined, true);
  } catch (error) {
    fail(runs, error);
  } finally {
    await engine?.close();
  }
}

function fail(runs: EngineRuns, error: unknown): void {
  runs.error = (error as Error).message;
  say(`  ${runs.error}`);
}

async function load(
  name: 'merf' | PeerName,
  { workload, dtype, threads }: RoundOptions,
  folder: string,
  live: Map<EngineRuns, Engine>,
): Promise<EngineRuns> {
  const runs: EngineRuns = { name, versions: {}, runs: [] };
  say(`loading ${name}, ${dtype}`);
  try {
    const command: Command | { missing: string } = name === 'merf' ? merfCommand() : findPeer(name);
    if ('missing' in command) throw new Error(command.missing);
    const spec: EngineSpec = { workload, dtype, threads, prompts: promptsOf(workload) };
    if (name === 'llama.cpp') {
      spec.gguf = join(folder, 'model.gguf');
      spec.module = findNodeLlamaCpp() as string;
      writeRandomGguf(spec.gguf, workload.config, dtype);
    } else if (name !== 'merf') {
      // The peers, too, draw on without an end token.
      spec.config = configToJson(workload.config, 'float32', { eos: [] });
    }
    const file = join(folder, `${name}.json`);
    writeFileSync(file, JSON.stringify(spec));
    const engine = await Engine.start(name, command, file);
    runs.versions = engine.versions;
    live.set(runs, engine);
  } catch (error) {
    fail(runs, error);
  }
  return runs;
}
