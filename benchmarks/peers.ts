// The engines that are measured, each a process that is loaded once and then answers one run a line.
import { type ChildProcessWithoutNullStreams, spawn, spawnSync } from 'node:child_process';
import { existsSync, readFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { fileURLToPath, pathToFileURL } from 'node:url';
import { MerfError } from 'merf';
import { peersFolder, root } from './paths.js';
import type { StepTimes } from './step.js';
import type { Dtype, Workload } from './workloads.js';

/** The peers in the order in which they are run where none is named: the quickest first. */
export const peerNames = ['llama.cpp', 'trl', 'pytorch'] as const;
export type PeerName = (typeof peerNames)[number];

/** What an engine reads from the file that it is given. */
export interface EngineSpec {
  workload: Workload;
  dtype: Dtype;
  threads: number;
  /** The model's shape as transformers reads it. */
  config?: Record<string, unknown>;
  prompts?: number[][];
  /** A model of that shape for llama.cpp, and the module that reads it. */
  gguf?: string;
  module?: string;
}

export interface Command {
  program: string;
  args: string[];
  env: Record<string, string>;
}

/** @throws MerfError UNSUPPORTED for a name that no peer has */
export function checkPeers(names: readonly string[]): PeerName[] {
  const unknown = names.find((name) => !peerNames.includes(name as PeerName));
  if (unknown !== undefined) {
    throw new MerfError(
      'UNSUPPORTED',
      `Expected ${peerNames.join(', ')} or none for --peers but received ${unknown}`,
    );
  }
  return [...new Set(names as PeerName[])];
}

export function merfCommand(): Command {
  const compiled = fileURLToPath(new URL('engine.js', import.meta.url));
  if (existsSync(compiled)) return { program: process.execPath, args: [compiled], env: {} };
  const tsx = ['--import', import.meta.resolve('tsx'), compiled.replace(/\.js$/, '.ts')];
  return { program: process.execPath, args: tsx, env: {} };
}

/** How the peer is run, or what to install for it. */
export function findPeer(name: PeerName): Command | { missing: string } {
  const script = (file: string) => join(root, 'benchmarks', 'peers', file);
  if (name === 'llama.cpp') {
    return findNodeLlamaCpp() === undefined
      ? { missing: 'It needs node-llama-cpp: npm install node-llama-cpp' }
      : { program: process.execPath, args: [script('llama-cpp.mjs')], env: {} };
  }
  const modules = name === 'trl' ? ['torch', 'transformers', 'trl', 'accelerate'] : ['torch', 'transformers'];
  const { python, env } = findPython();
  // Found, not imported: that alone takes ten seconds.
  const probe =
    'import importlib.util as u, sys; print(*(n for n in sys.argv[1:] if not u.find_spec(n)), sep=", ")';
  const { status, stdout } = spawnSync(python, ['-c', probe, ...modules], {
    encoding: 'utf8',
    env: { ...process.env, ...env },
  });
  if (status !== 0) return { missing: `It needs Python, and ${python} could not be run` };
  const lacking = stdout.trim();
  if (lacking !== '') {
    const install = `pip install ${modules.join(' ')}`;
    return {
      missing: `It needs ${lacking}, which ${python} does not have: ${install}, or name another Python with MERF_PYTHON`,
    };
  }
  return { program: python, args: [script(name === 'trl' ? 'trl.py' : 'pytorch.py')], env };
}

/** MERF_PYTHON, else the one that `npm run bench` brought packages for, else python3. */
export function findPython(): { python: string; env: Record<string, string> } {
  const named = process.env.MERF_PYTHON;
  if (named) return { python: named, env: {} };
  const brought = join(peersFolder, 'python.json');
  if (!existsSync(brought)) return { python: 'python3', env: {} };
  const { python } = JSON.parse(readFileSync(brought, 'utf8')) as { python: string };
  return { python, env: { PYTHONPATH: join(peersFolder, 'python', 'site-packages') } };
}

/** The URL of its module, in the folder of the peers, in that of the user's project or beside this package. */
export function findNodeLlamaCpp(): string | undefined {
  const folders = [join(peersFolder, 'llama.cpp'), process.cwd(), root];
  for (const folder of folders) {
    for (const modules of createRequire(join(folder, 'x.js')).resolve.paths('node-llama-cpp') ?? []) {
      const file = join(modules, 'node-llama-cpp', 'dist', 'index.js');
      if (existsSync(file)) return pathToFileURL(file).href;
    }
  }
  return undefined;
}

/** A running engine. Every failure is a MerfError that ends with the last line that the process wrote to stderr. */
export class Engine {
  /** Versions of the libraries by name, as the engine states them. */
  versions: Record<string, string> = {};
  readonly #answers: AsyncIterator<string>;
  readonly #ended: Promise<string>;
  #lastLine = '';

  private constructor(
    readonly name: string,
    private readonly child: ChildProcessWithoutNullStreams,
  ) {
    this.#ended = new Promise((resolve) => {
      child.on('error', (error) => resolve(error.message));
      child.on('close', (code, signal) => resolve(`it ended with ${signal ?? `exit code ${code}`}`));
    });
    child.stdin.on('error', () => undefined); // it ended; what it answers says so
    createInterface({ input: child.stderr }).on('line', (line) => {
      if (line.trim() !== '') this.#lastLine = line.trim();
    });
    this.#answers = createInterface({ input: child.stdout })[Symbol.asyncIterator]();
  }

  /** Runs `command` with the path of its specification as last argument, and waits until it is loaded. */
  static async start(name: string, { program, args, env }: Command, specPath: string): Promise<Engine> {
    const child = spawn(program, [...args, specPath], {
      cwd: root,
      env: { ...process.env, ...env },
      stdio: 'pipe',
    });
    const engine = new Engine(name, child);
    try {
      engine.versions = ((await engine.#answer()) as { versions: Record<string, string> }).versions;
      return engine;
    } catch (error) {
      child.kill('SIGKILL');
      throw error;
    }
  }

  /** Ends the process where a run takes longer than `patience` seconds. */
  async run(input: object, patience = Number.POSITIVE_INFINITY): Promise<StepTimes> {
    let late = false;
    const stop = () => {
      late = true;
      this.child.kill('SIGKILL');
    };
    const timer = Number.isFinite(patience) ? setTimeout(stop, 1000 * patience) : undefined;
    this.child.stdin.write(`${JSON.stringify(input)}\n`);
    try {
      return (await this.#answer()) as StepTimes;
    } catch (error) {
      if (!late) throw error;
      throw new MerfError(
        'ABORTED',
        `${this.name} was left out: it took longer than the ${Math.round(patience)} s that were left`,
      );
    } finally {
      clearTimeout(timer);
    }
  }

  /** The most memory that the process has held so far, in bytes; undefined where the system does not say. */
  peakBytes(): number | undefined {
    try {
      const status = readFileSync(`/proc/${this.child.pid}/status`, 'utf8');
      const match = /^VmHWM:\s+(\d+) kB/m.exec(status);
      return match ? Number(match[1]) * 1024 : undefined;
    } catch {
      return undefined;
    }
  }

  async close(): Promise<void> {
    this.child.stdin.end();
    const patience = setTimeout(() => this.child.kill('SIGKILL'), 10_000);
    await this.#ended;
    clearTimeout(patience);
  }

  async #answer(): Promise<unknown> {
    for (;;) {
      const { value, done } = await this.#answers.next();
      if (done) break;
      if (value.startsWith('{')) return JSON.parse(value); // other lines are what libraries print
    }
    const how = await this.#ended;
    const detail = this.#lastLine === '' ? '' : `: ${this.#lastLine}`;
    throw new MerfError('INTERNAL', `${this.name} failed, ${how}${detail}`);
  }
}
