// The table of what ptxas makes of every kernel for sm_90a: registers, shared memory and spills. The build keeps what
// ptxas says beside the object files (native/backend/cuda/keep_ptxas.sh); the committed table is compared by `npm test`.
//
//   node scripts/ptxas-table.mjs [--write]
//     --write  updates native/backend/cuda/ptxas.md from the last build, instead of comparing
import { spawnSync } from 'node:child_process';
import { existsSync, readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { configuredCudaCompiler, root } from './bootstrap.mjs';

const architecture = 'sm_90a';
const sources = join(root, 'native', 'backend', 'cuda');
const table = join(sources, 'ptxas.md');
const objects = join(root, 'build', 'native', 'backend', 'cuda', 'CMakeFiles', 'merf_cuda.dir');

/** Files whose kernels may not spill: what a step's time goes to. */
const neverSpills = /^(attention|head|policy_loss)/;

function text(command, args, input) {
  const result = spawnSync(command, args, { input, encoding: 'utf8', maxBuffer: 1 << 28 });
  return result.status === 0 ? result.stdout : undefined;
}

/** The version of the CUDA compiler that the build is configured with, such as "13.0.88"; undefined without one. */
function compilerVersion() {
  const compiler = configuredCudaCompiler();
  return compiler && /, V([\d.]+)/.exec(text(compiler, ['--version']) ?? '')?.[1];
}

/** "kernel<float, 64>" of "void merf::cuda::(anonymous namespace)::kernel<float, 64>(float const*, long)". */
function shortName(demangled) {
  let name = demangled.replaceAll('(anonymous namespace)::', '').replaceAll('merf::cuda::', '');
  name = name.replaceAll('merf::', '');
  let depth = 0;
  let end = name.length;
  for (let i = 0; i < name.length; ++i) {
    if (name[i] === '<') ++depth;
    if (name[i] === '>') --depth;
    if (name[i] === '(' && depth === 0) {
      end = i;
      break;
    }
  }
  return name.slice(0, end).replace(/^void /, '');
}

/** Kernels that ptxas spoke of in one file's compilation. */
function kernelsOf(file, said) {
  const kernels = [];
  let kernel;
  for (const line of said.split('\n')) {
    const entry = /Compiling entry function '([^']+)' for '([^']+)'/.exec(line);
    if (entry) {
      kernel = { file, symbol: entry[1], registers: 0, shared: 0, stack: 0, spillStores: 0, spillLoads: 0 };
      if (entry[2] === architecture) kernels.push(kernel);
    }
    if (!kernel) continue;
    const stack = /(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads/.exec(line);
    if (stack) [kernel.stack, kernel.spillStores, kernel.spillLoads] = stack.slice(1).map(Number);
    const used = /Used (\d+) registers/.exec(line);
    if (used) {
      kernel.registers = Number(used[1]);
      kernel.shared = Number(/(\d+) bytes smem/.exec(line)?.[1] ?? 0);
    }
  }
  return kernels;
}

function readKernels() {
  const kernels = [];
  for (const file of readdirSync(sources).sort()) {
    if (!file.endsWith('.cu')) continue;
    const said = join(objects, `${file}.o.ptxas`);
    if (!existsSync(said)) throw new Error(`the build left no ${said}`);
    kernels.push(...kernelsOf(file, readFileSync(said, 'utf8')));
  }
  const names = text('c++filt', [], kernels.map(({ symbol }) => symbol).join('\n'))?.split('\n');
  for (const [i, kernel] of kernels.entries()) kernel.name = shortName(names?.[i] ?? kernel.symbol);
  const key = ({ file, name, symbol }) => `${file}\0${name}\0${symbol}`;
  return kernels.sort((a, b) => (key(a) < key(b) ? -1 : 1));
}

function format(kernels, version) {
  const lines = [
    '# What ptxas makes of the kernels',
    '',
    `For ${architecture}, by ptxas ${version}: registers a thread; bytes of static shared memory a block (what a launch`,
    'asks for stands in the code); bytes of stack a thread; bytes a thread that do not fit into registers, written and',
    'read again. Made by `node scripts/ptxas-table.mjs --write`; `npm test` compares it.',
  ];
  let file;
  for (const kernel of kernels) {
    if (kernel.file !== file) {
      file = kernel.file;
      lines.push('', `## ${file}`, '', '| kernel | registers | shared | stack | spills |');
      lines.push('| --- | ---: | ---: | ---: | ---: |');
    }
    const { name, registers, shared, stack, spillStores, spillLoads } = kernel;
    lines.push(`| \`${name}\` | ${registers} | ${shared} | ${stack} | ${spillStores} + ${spillLoads} |`);
  }
  return `${lines.join('\n')}\n`;
}

/** The lines that only one of the two has, the committed ones first. */
function difference(committed, built) {
  const rows = (t) => {
    let file = '';
    return t.split('\n').flatMap((line) => {
      if (line.startsWith('## ')) file = line.slice(3);
      return line.startsWith('| `') ? [`${file} ${line}`] : [];
    });
  };
  const [before, after] = [rows(committed), rows(built)];
  return [
    ...before.filter((row) => !after.includes(row)).map((row) => `- ${row}`),
    ...after.filter((row) => !before.includes(row)).map((row) => `+ ${row}`),
  ];
}

/**
 * Compares the last build with the committed table. `failures` say what is wrong, each one; `passed` counts what was
 * looked at and right; `note` says why something was not looked at.
 */
export function checkPtxas() {
  const version = compilerVersion();
  const kernels = readKernels();
  if (kernels.length === 0) return { passed: 0, failures: [], note: `no ${architecture} in this build` };
  const failures = [];
  const spilling = kernels.filter(({ file, spillStores, spillLoads }) => {
    return neverSpills.test(file) && spillStores + spillLoads > 0;
  });
  if (spilling.length > 0) {
    const list = spilling.map((k) => `  ${k.file} ${k.name}: ${k.spillStores} + ${k.spillLoads} bytes`);
    failures.push(`kernels that may not spill do:\n${list.join('\n')}`);
  }
  const committed = existsSync(table) ? readFileSync(table, 'utf8') : '';
  const of = /by ptxas ([\d.]+):/.exec(committed)?.[1];
  if (of !== undefined && of !== version) {
    const note = `${table} is of ptxas ${of} and not compared with ${version}`;
    return { passed: 1 - failures.length, failures, note };
  }
  const built = format(kernels, version);
  const differing = difference(committed, built);
  if (differing.length > 0 || committed !== built) {
    failures.push(
      `native/backend/cuda/ptxas.md is not what the build gave. Where the change is meant: node scripts/ptxas-table.mjs --write\n${differing.join('\n')}`,
    );
  }
  return { passed: 2 - failures.length, failures };
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  const version = compilerVersion();
  if (version === undefined) {
    process.stderr.write('build/ is configured without a CUDA compiler: npm test brings one\n');
    process.exitCode = 1;
  } else if (process.argv.includes('--write')) {
    writeFileSync(table, format(readKernels(), version));
  } else {
    const { failures, note } = checkPtxas();
    for (const line of [...failures, ...(note ? [note] : [])]) process.stderr.write(`${line}\n`);
    process.exitCode = failures.length === 0 ? 0 : 1;
  }
}
