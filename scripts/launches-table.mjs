// The table of what a decode step and a training step launch and which bytes they move, of small shapes, with the launches
// of two large ones. benchmarks/launches.cc counts them; the committed table is compared by `npm test`.
//
//   node scripts/launches-table.mjs [--write] [PROGRAM]
//     --write  updates native/backend/cuda/launches.md, instead of comparing
//     PROGRAM  counts; default build/Release/launches
import { spawnSync } from 'node:child_process';
import { existsSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { root } from './bootstrap.mjs';

const table = join(root, 'native', 'backend', 'cuda', 'launches.md');

function count(program) {
  if (!existsSync(program)) throw new Error(`the build left no ${program}`);
  const { stdout, stderr } = spawnSync(program, ['--tiny'], { encoding: 'utf8' });
  const counts = stdout.split('\n').filter(Boolean).map(JSON.parse);
  const failed = counts.find(({ error }) => error !== undefined);
  if (failed || counts.length === 0) {
    throw new Error(`launches were not counted: ${failed ? `${failed.case}: ${failed.error}` : stderr}`);
  }
  return counts;
}

function format(counts) {
  const lines = [
    '# What steps launch on a GPU',
    '',
    'Made by `node scripts/launches-table.mjs --write` after a build; `npm test` compares it. A step launches each kernel as',
    'often as its row says. Bytes are those of the sectors of 32 bytes in device memory that a launch reads or writes, each',
    'once; `product` stands for a matrix product of the library. `npx merf bench --device cuda-emulated --launches` prints',
    'the bytes of the large shapes, too.',
  ];
  for (const { case: name, shape, kernels, transfers } of counts) {
    const bytes = kernels.every(({ read }) => read !== undefined);
    const sum = (key) => kernels.reduce((total, kernel) => total + kernel[key], 0);
    const row = (label, of) =>
      `| ${[label, of('launches'), ...(bytes ? [of('read'), of('written')] : [])].join(' | ')} |`;
    const rest = Object.entries(shape).map(([key, value]) => `${key.replace('_', ' ')} ${value}`);
    lines.push('', `## ${name}`, '', `${rest.join(', ')}.`, '');
    lines.push(`| kernel | launches |${bytes ? ' bytes read | bytes written |' : ''}`);
    lines.push(`| --- | ---: |${bytes ? ' ---: | ---: |' : ''}`);
    for (const kernel of kernels) lines.push(row(`\`${kernel.name}\``, (key) => kernel[key]));
    lines.push(row('all', sum), '');
    const t = transfers;
    lines.push(
      `Uploads ${t.uploads} (${t.uploaded} bytes), downloads ${t.downloads} (${t.downloaded} bytes), synchronisations ` +
        `${t.synchronizations}, recordings played ${t.plays}.`,
    );
  }
  return `${lines.join('\n')}\n`;
}

/** The lines that only one of the two has, under their headings. */
function difference(committed, counted) {
  const rows = (text) => {
    let heading = '';
    return text.split('\n').flatMap((line) => {
      if (line.startsWith('## ')) heading = line.slice(3);
      return line === '' ? [] : [`${heading}: ${line}`];
    });
  };
  const [before, after] = [rows(committed), rows(counted)];
  return [
    ...before.filter((row) => !after.includes(row)).map((row) => `- ${row}`),
    ...after.filter((row) => !before.includes(row)).map((row) => `+ ${row}`),
  ];
}

/** Counts and compares with the committed table; `failures` say what is wrong, each one. */
export function checkLaunches(program = join(root, 'build', 'Release', 'launches')) {
  let counted;
  try {
    counted = format(count(program));
  } catch (error) {
    return { passed: 0, failures: [error.message] };
  }
  const committed = existsSync(table) ? readFileSync(table, 'utf8') : '';
  if (committed === counted) return { passed: 1, failures: [] };
  const hint =
    'native/backend/cuda/launches.md is not what was counted. Where the change is meant: node scripts/launches-table.mjs --write';
  return { passed: 0, failures: [[hint, ...difference(committed, counted)].join('\n')] };
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  const named = process.argv.slice(2).find((word) => !word.startsWith('--'));
  const program = named ?? join(root, 'build', 'Release', 'launches');
  if (process.argv.includes('--write')) {
    writeFileSync(table, format(count(program)));
  } else {
    const { failures } = checkLaunches(program);
    for (const line of failures) process.stderr.write(`${line}\n`);
    process.exitCode = failures.length === 0 ? 0 : 1;
  }
}
