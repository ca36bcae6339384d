// merf's operators one by one, beside PyTorch on the same shapes where there is one.
import { spawnSync } from 'node:child_process';
import { existsSync } from 'node:fs';
import { join } from 'node:path';
import { programPath, root, say } from './paths.js';
import { findPeer, findPython } from './peers.js';
import type { Dtype } from './workloads.js';

/** As benchmarks/operators prints it. */
export interface OperatorLine {
  case: string;
  engine: string;
  dtype: Dtype;
  metrics?: Record<string, number>;
  error?: string;
}

/** Nothing where the program was not built, as in a package without the sources. */
export function measureOperators(dtype: Dtype, threads: number): OperatorLine[] {
  const program = programPath('operators');
  if (!existsSync(program)) return [];
  const operators = [program, '--device', 'cpu', '--dtype', dtype, '--threads', String(threads)];
  const beside = !('missing' in findPeer('pytorch'));
  say(`operators, ${dtype}${beside ? ', beside PyTorch (up to a few minutes)' : ''}`);
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
  const lines = (stdout ?? '').split('\n').filter((line) => line.startsWith('{'));
  return lines
    .map((line) => ({ ...(JSON.parse(line) as OperatorLine), dtype }))
    .filter((line) => line.case !== 'device');
}
