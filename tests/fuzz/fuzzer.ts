import { type ChildProcess, fork } from 'node:child_process';
import { mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { typeScriptLoader } from '../../lib/reward/worker.js';
import { type Fault, inputOf } from './attempt.js';
import type { Assignment, Report } from './child.js';
import { defaultSeconds, type Target, writeInput } from './target.js';

export interface Finding extends Fault {
  readonly target: string;
  readonly seed: number;
  readonly iteration: number;
}

export interface FuzzOptions {
  /** The module that exports `targets`. */
  readonly module: URL;
  readonly targets: readonly Target[];
  readonly seed: number;
  /** Seconds in all. */
  readonly seconds: number;
  /** Iterations of each target at most. */
  readonly iterations?: number;
  /** Where inputs of findings are kept. */
  readonly findings: string;
  /** Processes at a time. */
  readonly processes: number;
  readonly onFinding?: (finding: Finding, repeated: number) => void;
}

export interface TargetCount {
  iterations: number;
  /** Inputs that were read to a value rather than refused. */
  values: number;
  findings: number;
}

const sliceMilliseconds = 4000;
const pollMilliseconds = 100;
const maxHeapMebibytes = 1024;
const maxResidentMebibytes = 2048;
/** Wall time, in which a busy machine may do little, for every second of processor time that is allowed. */
const wallFactor = 24;
const startMilliseconds = 180_000;
const clockTicks = 100;

/** Runs targets in processes, which it watches, until the time is over. */
export class Fuzzer {
  readonly counts = new Map<string, TargetCount>();
  readonly findings: Finding[] = [];
  readonly #options: FuzzOptions;
  readonly #next = new Map<string, number>();
  readonly #seen = new Map<string, number>();
  readonly #folder = mkdtempSync(join(tmpdir(), 'merf-fuzz-'));

  constructor(options: FuzzOptions) {
    this.#options = options;
    for (const { name } of options.targets) {
      this.counts.set(name, { iterations: 0, values: 0, findings: 0 });
      this.#next.set(name, 0);
    }
  }

  async run(): Promise<void> {
    const { seconds, processes, targets } = this.#options;
    const end = performance.now() + 1000 * seconds;
    const queue = [...targets];
    const slice = Math.min(sliceMilliseconds, (1000 * seconds * processes) / targets.length);
    try {
      await Promise.all(
        Array.from({ length: Math.min(processes, targets.length) }, (_, i) =>
          this.#worker(join(this.#folder, `${i}`), queue, slice, end),
        ),
      );
    } finally {
      rmSync(this.#folder, { recursive: true, force: true });
    }
  }

  async #worker(folder: string, queue: Target[], slice: number, end: number): Promise<void> {
    let child: Child | undefined;
    try {
      // Every target has its turn, however little time there is.
      for (let turn = queue.shift(); turn !== undefined; turn = queue.shift()) {
        const first = this.#next.get(turn.name) as number;
        const most = (this.#options.iterations ?? Number.POSITIVE_INFINITY) - first;
        if (most <= 0 || (first > 0 && performance.now() > end)) continue;
        child ??= await Child.start(this.#options.module, folder);
        const assignment = {
          target: turn.name,
          seed: this.#options.seed,
          first,
          most: Math.min(most, 2 ** 31),
        };
        const { next, values, faults, isOver } = await child.work(
          { ...assignment, milliseconds: slice },
          turn.seconds ?? defaultSeconds,
        );
        if (isOver) child = undefined;
        this.#next.set(turn.name, next);
        const count = this.counts.get(turn.name) as TargetCount;
        count.iterations += next - first;
        count.values += values;
        for (const { iteration, fault } of faults) await this.#found(turn, iteration, fault);
        queue.push(turn);
      }
    } finally {
      child?.end();
    }
  }

  async #found(target: Target, iteration: number, fault: Fault): Promise<void> {
    const { seed, findings, onFinding } = this.#options;
    const finding = { ...fault, target: target.name, seed, iteration };
    (this.counts.get(target.name) as TargetCount).findings += 1;
    this.findings.push(finding);
    // Faults of the same place are likely to be the same.
    const place = /^\s+at .*$/m.exec(fault.stack)?.[0] ?? '';
    const kind = `${target.name} ${fault.message.slice(0, 40)} ${place}`;
    const repeated = this.#seen.get(kind) ?? 0;
    this.#seen.set(kind, repeated + 1);
    if (repeated < 3) {
      const folder = join(findings, `${target.name}-${seed}-${iteration}`);
      mkdirSync(folder, { recursive: true });
      // An input that cannot be made has no files.
      writeInput(folder, await inputOf(target, seed, iteration).catch(() => ({})));
      writeFileSync(join(folder, 'finding.txt'), `${fault.message}\n${fault.stack}\n`);
    }
    onFinding?.(finding, repeated);
  }
}

interface Work {
  readonly next: number;
  readonly values: number;
  readonly faults: readonly { iteration: number; fault: Fault }[];
  /** Whether the process has ended. */
  readonly isOver: boolean;
}

class Child {
  #cancelled: string | undefined;

  private constructor(
    private readonly process: ChildProcess,
    private readonly progress: string,
  ) {}

  static async start(module: URL, folder: string): Promise<Child> {
    mkdirSync(folder, { recursive: true });
    const progress = join(folder, 'progress');
    const child = fork(
      fileURLToPath(new URL('./child.ts', import.meta.url)),
      [module.href, join(folder, 'input'), progress],
      {
        stdio: ['ignore', 'ignore', 'pipe', 'ipc'],
        execArgv: [`--max-old-space-size=${maxHeapMebibytes}`, '--import', typeScriptLoader()],
      },
    );
    let output = '';
    child.stderr?.setEncoding('utf8').on('data', (text: string) => {
      output = (output + text).slice(-4000);
    });
    await new Promise<void>((resolve, reject) => {
      const fail = () => reject(new Error(`The process of the targets did not start: ${output}`));
      const timer = setTimeout(fail, startMilliseconds);
      child.once('message', () => {
        clearTimeout(timer);
        child.removeListener('exit', fail);
        resolve();
      });
      child.once('exit', fail);
    });
    return new Child(child, progress);
  }

  end(): void {
    this.process.kill('SIGKILL');
  }

  async work(assignment: Assignment, seconds: number): Promise<Work> {
    const faults: { iteration: number; fault: Fault }[] = [];
    this.#cancelled = undefined;
    const watch = setInterval(this.#watcher(seconds), pollMilliseconds);
    try {
      return await new Promise<Work>((resolve) => {
        this.process.on('message', (report: Report) => {
          if (report.type === 'fault') faults.push(report);
          if (report.type === 'done') {
            resolve({ next: report.next, values: report.values, faults, isOver: false });
          }
        });
        this.process.on('exit', (code, signal) => {
          const iteration = Math.max(assignment.first, this.#iteration());
          const how = this.#cancelled ?? `the process ended with ${signal ?? `exit code ${code}`}`;
          faults.push({ iteration, fault: { message: how, stack: '' } });
          resolve({ next: iteration + 1, values: 0, faults, isOver: true });
        });
        this.process.send(assignment);
      });
    } finally {
      clearInterval(watch);
      this.process.removeAllListeners('message').removeAllListeners('exit');
    }
  }

  #iteration(): number {
    const bytes = readFileSync(this.progress);
    return bytes.length < 8 ? -1 : bytes.readDoubleLE(0);
  }

  /** Ends the process where one iteration takes too long or too much memory. */
  #watcher(seconds: number): () => void {
    let iteration = -1;
    let began = { processor: 0, wall: 0 };
    return () => {
      const now = { processor: this.#processorSeconds(), wall: performance.now() / 1000 };
      const current = this.#iteration();
      if (current !== iteration) {
        iteration = current;
        began = now;
        return;
      }
      if (iteration < 0) return;
      const [processor, wall] = [now.processor - began.processor, now.wall - began.wall];
      const resident = this.#residentMebibytes();
      if (processor > seconds) this.#cancel(`it took more than ${seconds} s of a processor`);
      else if (wall > wallFactor * seconds) this.#cancel(`it was not over after ${Math.round(wall)} s`);
      else if (resident > maxResidentMebibytes) this.#cancel(`it took ${Math.round(resident)} MiB of memory`);
    };
  }

  #cancel(reason: string): void {
    this.#cancelled = reason;
    this.end();
  }

  /** What the process has taken of processors; 0 where the system does not say, so that the wall clock alone counts. */
  #processorSeconds(): number {
    const fields = this.#procFile('stat')
      ?.replace(/^.*\) /s, '')
      .split(' ');
    return fields === undefined ? 0 : (Number(fields[11]) + Number(fields[12])) / clockTicks;
  }

  #residentMebibytes(): number {
    const kibibytes = /^VmRSS:\s+(\d+)/m.exec(this.#procFile('status') ?? '')?.[1];
    return Number(kibibytes ?? 0) / 1024;
  }

  #procFile(name: string): string | undefined {
    try {
      return readFileSync(`/proc/${this.process.pid}/${name}`, 'utf8');
    } catch {
      return undefined;
    }
  }
}
