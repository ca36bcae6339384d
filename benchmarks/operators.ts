// merf's operators one by one, beside PyTorch on the same shapes where there is one.
import { spawnSync } from 'node:child_process';
import { existsSync } from 'node:fs';
import { join } from 'node:path';
import { programPath, root, say } from './paths.js';
import { findPeer, findPython } from './peers.js';
import type { Dtype } from './workloads.js';

/** A line that the program benchmarks/operators prints. */
export interface OperatorLine {
  case: string;
  engine: string;
  dtype: Dtype;
  metrics?: Record<string, number>;
  error?: string;
}

/**
 * Measures the operators, beside PyTorch's where that is installed and `peers` allows it. There are no lines
 * where the program was not built, as in a package without the sources.
 */
export function measureOperators(
  dtype: Dtype,
  threads: number,
  peers: boolean,
): { lines: OperatorLine[]; versions: Record<string, string> } {
  const program = programPath('operators');
  if (!existsSync(program)) return { lines: [], versions: {} };
  const operators = [program, '--device', 'cpu', '--dtype', dtype, '--threads', String(threads)];
  const beside = peers && !('missing' in findPeer('pytorch'));
  say(`operators, ${dtype}${beside ? ', beside PyTorch (a few minutes)' : ''}`);
  const { python, env } = findPython();
  const script = join(root, 'benchmarks', 'operators', 'peers.py');
  const [command, ...args] = beside
    ? [python, script, '--device', 'cpu', '--backends', 'flash', '--', ...operators]
    : operators;
  const { stdout, stderr, status } = spawnSync(command as string, args, {
    encoding: 'utf8',
    env: { ...process.env, ...env },
  });
  if (status !== 0) say(`  the operators were not all measured: ${stderr?.trim().split('\n').pop()}`);
  const printed = (stdout ?? '')
    .split('\n')
    .filter((line) => line.startsWith('{'))
    .map((line) => JSON.parse(line) as Printed);
  const torch = printed.find(({ engine, device }) => engine === 'PyTorch' && device)?.device?.libraries
    .PyTorch;
  return {
    lines: printed.filter(({ device }) => device === undefined).map((line) => ({ ...line, dtype })),
    versions: torch === undefined ? {} : { PyTorch: torch },
  };
}

/** A line of the program's output: a case, or what it runs on. */
interface Printed extends Omit<OperatorLine, 'dtype'> {
  device?: { libraries: Record<string, string> };
}
