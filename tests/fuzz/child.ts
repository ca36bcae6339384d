// The process in which targets read inputs. It is told which, and may hang, crash or run out of memory: `Fuzzer` watches.
import { openSync, writeSync } from 'node:fs';
import { attempt, type Fault, judged } from './attempt.js';
import type { Target } from './target.js';

/** What the process is to do: iterations of one target, from `first` on, until `milliseconds` are over or all are done. */
export interface Assignment {
  readonly target: string;
  readonly seed: number;
  readonly first: number;
  readonly most: number;
  readonly milliseconds: number;
}

export type Report =
  | { readonly type: 'ready' }
  | { readonly type: 'fault'; readonly iteration: number; readonly fault: Fault }
  | { readonly type: 'done'; readonly next: number; readonly values: number };

const [modulePath = '', folder = '', progressPath = ''] = process.argv.slice(2);
const progress = openSync(progressPath, 'w');
let current = 0;

function note(iteration: number): void {
  current = iteration;
  const bytes = Buffer.alloc(8);
  bytes.writeDoubleLE(iteration);
  writeSync(progress, bytes, 0, 8, 0);
}

function report(message: Report): void {
  process.send?.(message);
}

const { targets } = (await import(modulePath)) as { targets: readonly Target[] };

async function work({ target: name, seed, first, most, milliseconds }: Assignment): Promise<void> {
  const target = targets.find((candidate) => candidate.name === name);
  if (target === undefined) throw new Error(`There is no target ${name}`);
  const end = performance.now() + milliseconds;
  let values = 0;
  let iteration = first;
  // One at least, however short the time is.
  for (; iteration < first + most && (iteration === first || performance.now() < end); ++iteration) {
    note(iteration);
    const outcome = await attempt(target, seed, iteration, folder);
    if (outcome === 'value') values += 1;
    else if (outcome !== 'refused') report({ type: 'fault', iteration, fault: outcome });
  }
  note(-1);
  report({ type: 'done', next: iteration, values });
}

// Errors that nobody awaits would end a program that uses merf.
function escaped(error: unknown): void {
  const outcome = judged(error);
  const fault = outcome === 'refused' ? { message: String(error), stack: '' } : outcome;
  report({
    type: 'fault',
    iteration: current,
    fault: { ...fault, message: `nobody awaits ${fault.message}` },
  });
}

process.on('unhandledRejection', escaped);
process.on('uncaughtException', escaped);
process.on('disconnect', () => process.exit());
process.on('message', (assignment: Assignment) => void work(assignment));
report({ type: 'ready' });
