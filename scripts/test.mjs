// `npm test`: brings the build up to date, runs the native tests and jest, and closes with one line for both.
//
//   npm test [-- --strict]
//     --strict  kernels that nvcc did not compile count as failed, and so does a test that skipped itself, unless its
//               title names what it needs and that thing is truly absent and not the bootstrap's to bring:
//               [needs ../shared], [needs python], or a runtime such as [needs bun]
import { spawn, spawnSync } from 'node:child_process';
import { once } from 'node:events';
import { existsSync, mkdirSync, readFileSync, rmSync } from 'node:fs';
import { delimiter, join, relative } from 'node:path';
import { bootstrap, root } from './bootstrap.mjs';
import { checkLaunches } from './launches-table.mjs';
import { checkPtxas } from './ptxas-table.mjs';

const strict = process.argv.includes('--strict');
const total = { passed: 0, failed: 0, skipped: 0 };

async function runNativeTests() {
  const list = spawnSync('ctest', ['--test-dir', 'build', '--show-only=json-v1'], {
    cwd: root,
    encoding: 'utf8',
  });
  const programs = list.status === 0 ? JSON.parse(list.stdout).tests : [];
  if (programs.length === 0) {
    process.stderr.write('no native tests were found in build/\n');
    total.failed += 1;
  }
  for (const { name, command } of programs) {
    process.stdout.write(`\nnative: ${name}\n`);
    // --duration names a test as soon as it is over, with its seconds: under emulation, some take a minute.
    const program = spawn(command[0], [...command.slice(1), '--no-colors', '--duration=true'], {
      cwd: root,
      env: { GOMP_SPINCOUNT: '2000', ...process.env },
      stdio: ['ignore', 'pipe', 'inherit'],
    });
    let output = '';
    program.stdout.setEncoding('utf8').on('data', (text) => {
      output += text;
      process.stdout.write(text);
    });
    const [status, signal] = await once(program, 'close');
    const summary = /test cases:\s*\d+ \|\s*(\d+) passed \|\s*(\d+) failed \|\s*(\d+) skipped/.exec(output);
    if (summary) {
      total.passed += Number(summary[1]);
      total.failed += Number(summary[2]);
      total.skipped += Number(summary[3]);
      if (strict) total.failed += Number(summary[3]);
    }
    if (!summary || (status !== 0 && Number(summary[2]) === 0)) {
      process.stderr.write(`${name} ended with ${signal ?? `exit code ${status}`}\n`);
      total.failed += 1;
    }
  }
}

function checkKernels({ cuda }) {
  if (!cuda) {
    process.stderr.write('skipped: what ptxas makes of the kernels [needs nvcc]\n');
    total.skipped += 1;
    if (strict) total.failed += 1;
    return;
  }
  const { passed, failures, note } = checkPtxas();
  total.passed += passed;
  total.failed += failures.length;
  for (const failure of failures) process.stderr.write(`${failure}\n`);
  if (note) process.stderr.write(`${note}\n`);
}

function countLaunches() {
  const { passed, failures } = checkLaunches();
  total.passed += passed;
  total.failed += failures.length;
  for (const failure of failures) process.stderr.write(`${failure}\n`);
}

/** Whether neither `npm run runtimes` nor the PATH has one of these programs. */
function isNowhere(...names) {
  const folders = [
    join(root, 'build', 'runtimes', 'node_modules', '.bin'),
    ...(process.env.PATH ?? '').split(delimiter),
  ];
  return !folders.some((folder) => names.some((name) => existsSync(join(folder, name))));
}

const mayBeAbsent = {
  '../shared': !existsSync(join(root, '..', 'shared')),
  python: !process.env.MERF_PYTHON,
  'TensorFlow.js': !existsSync(join(root, 'build', 'peers', 'tfjs', 'node_modules', '@tensorflow')),
  bun: isNowhere('bun'),
  deno: isNowhere('deno'),
  workerd: isNowhere('workerd'),
  'a browser':
    !process.env.MERF_BROWSER && isNowhere('chromium', 'chromium-browser', 'google-chrome', 'chrome'),
};

function runJest() {
  const report = join(root, 'build', 'jest.json');
  rmSync(report, { force: true });
  mkdirSync(join(root, 'build'), { recursive: true });
  const jest = join('node_modules', 'jest', 'bin', 'jest.js');
  const run = spawnSync(
    process.execPath,
    [
      '--disable-warning=ExperimentalWarning',
      '--experimental-vm-modules',
      jest,
      '--json',
      `--outputFile=${report}`,
    ],
    { cwd: root, stdio: ['ignore', 'ignore', 'inherit'] },
  );
  if (!existsSync(report)) {
    process.stderr.write(`jest left no report and ended with ${run.signal ?? `exit code ${run.status}`}\n`);
    total.failed += 1;
    return;
  }
  const results = JSON.parse(readFileSync(report, 'utf8'));
  total.passed += results.numPassedTests;
  total.failed += results.numFailedTests + results.numRuntimeErrorTestSuites;
  if (run.status !== 0 && total.failed === 0) total.failed += 1;
  for (const file of results.testResults) {
    for (const { fullName, status } of file.assertionResults) {
      if (status !== 'pending' && status !== 'todo') continue;
      total.skipped += 1;
      const need = /\[needs ([^\]]+)\]/.exec(fullName)?.[1];
      const explained = need !== undefined && mayBeAbsent[need] === true;
      process.stderr.write(`skipped: ${relative(root, file.name)}: ${fullName}\n`);
      if (strict && !explained) total.failed += 1;
    }
  }
}

const built = bootstrap({ tests: true });
checkKernels(built);
countLaunches();
await runNativeTests();
runJest();
const skipped = total.skipped > 0 ? `, ${total.skipped} skipped` : '';
process.stdout.write(`${total.passed} passed, ${total.failed} failed${skipped}\n`);
process.exitCode = total.failed === 0 ? 0 : 1;
