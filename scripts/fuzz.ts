// Run by scripts/fuzz.mjs. An input is read right where the outcome is a value or a MerfError within limits of time and
// memory. Anything else is a finding, whose input is kept in build/fuzz/findings, and the exit code is 1.
import { availableParallelism } from 'node:os';
import { dirname, join, relative } from 'node:path';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';
import { Fuzzer } from '../tests/fuzz/fuzzer.js';
import { targets } from '../tests/fuzz/targets/index.js';

const usage = `npm run fuzz -- [--seconds N] [--target NAME,...] [--seed N] [--iterations N] [--processes N]
  --seconds     how long, in all (default 60)
  --target      some of ${targets.map(({ name }) => name).join(', ')}
  --seed        which inputs (default: the time)
  --iterations  inputs for each target at most
  --processes   how many at a time (default: one for each core)`;

const { values } = parseArgs({
  options: {
    seconds: { type: 'string', default: '60' },
    target: { type: 'string', multiple: true },
    seed: { type: 'string' },
    iterations: { type: 'string' },
    processes: { type: 'string' },
    help: { type: 'boolean' },
  },
});

function fail(message: string): never {
  process.stderr.write(`${message}\n${usage}\n`);
  process.exit(2);
}

function numberOf(name: string, text: string): number {
  const value = Number(text);
  if (!(text.trim() !== '' && value >= 0)) fail(`Expected a number for --${name} but received ${text}`);
  return value;
}

if (values.help) {
  process.stdout.write(`${usage}\n`);
  process.exit(0);
}
const names = values.target?.flatMap((list) => list.split(','));
const unknown = names?.find((name) => !targets.some((target) => target.name === name));
if (unknown !== undefined) fail(`There is no target ${unknown}`);

const root = join(dirname(fileURLToPath(import.meta.url)), '..');
const findings = join(root, 'build', 'fuzz', 'findings');
const seed = values.seed === undefined ? Math.floor(Date.now() / 1000) : numberOf('seed', values.seed);
const fuzzer = new Fuzzer({
  module: new URL('../tests/fuzz/targets/index.ts', import.meta.url),
  targets: targets.filter(({ name }) => names?.includes(name) ?? true),
  seed,
  seconds: numberOf('seconds', values.seconds),
  ...(values.iterations !== undefined && { iterations: numberOf('iterations', values.iterations) }),
  findings,
  processes:
    values.processes === undefined ? availableParallelism() : numberOf('processes', values.processes) || 1,
  onFinding({ target, iteration, message, stack }, repeated) {
    if (repeated > 0) return;
    process.stdout.write(
      `FOUND  --target ${target} --seed ${seed}, iteration ${iteration}: ${message.slice(0, 300)}\n` +
        stack
          .split('\n')
          .filter((line) => /^\s+at /.test(line))
          .slice(0, 6)
          .map((line) => `${line}\n`)
          .join(''),
    );
  },
});
process.stdout.write(`seed ${seed}\n`);
await fuzzer.run();
for (const [name, { iterations, values: read, findings: found }] of fuzzer.counts) {
  process.stdout.write(
    `${name.padEnd(16)} ${String(iterations).padStart(8)} inputs, ${read} read, ${found} findings\n`,
  );
}
const total = [...fuzzer.counts.values()].reduce((sum, count) => sum + count.iterations, 0);
const kept = fuzzer.findings.length > 0 ? `, inputs in ${relative(root, findings)}` : '';
process.stdout.write(`${total} inputs, ${fuzzer.findings.length} findings${kept}\n`);
process.exitCode = fuzzer.findings.length === 0 ? 0 : 1;
