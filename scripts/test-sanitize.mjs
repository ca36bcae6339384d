// `npm run test:sanitize`: the native tests and the tests of the addon with the address and undefined-behaviour
// sanitizers, in a build of their own (build/sanitize). What they find ends the program that runs, and so fails.
//
//   npm run test:sanitize [-- --long]
//     --long  tests that repeat themselves (processes that end in the midst of a step) do so more often
//
// Leaks are looked for in the native tests; Node's own would hide those of the addon, whose memory
// tests/bindings/lifetime.test.ts measures.
import { spawnSync } from 'node:child_process';
import { existsSync, mkdirSync } from 'node:fs';
import { availableParallelism } from 'node:os';
import { join } from 'node:path';
import { bootstrap, installSystemPackages, orExit, root, run } from './bootstrap.mjs';

const folder = join(root, 'build', 'sanitize');
const build = join(folder, 'build');
const long = process.argv.includes('--long');
// What calls every method of the addon, with what it must take and what it must refuse.
const suites = ['tests/bindings', 'tests/native.test.ts', 'tests/kernels/kernels.test.ts'];

// The addon is loaded into a program that has no sanitizer of its own, so the library has to be there before.
function sanitizerLibrary() {
  const found = spawnSync('g++', ['-print-file-name=libasan.so'], { encoding: 'utf8' }).stdout?.trim() ?? '';
  if (!existsSync(found)) throw new Error('g++ has no libasan.so: install the sanitizers of this compiler');
  return found;
}

function step(name, command, args, env) {
  process.stdout.write(`\n== ${name}\n`);
  const started = Date.now();
  const { status, signal } = spawnSync(command, args, {
    cwd: root,
    stdio: 'inherit',
    env: { ...process.env, OMP_WAIT_POLICY: 'passive', ...env },
  });
  const seconds = ((Date.now() - started) / 1000).toFixed(0);
  process.stdout.write(`${name}: ${status === 0 ? 'clean' : `FAILED (${signal ?? status})`}, ${seconds} s\n`);
  return status === 0;
}

// Brings the npm packages and the addon that dist/ and the other stages want, as every other command does.
bootstrap();
orExit(() => {
  installSystemPackages(['doctest-dev']);
  mkdirSync(folder, { recursive: true });
  run('cmake', [
    '-S',
    root,
    '-B',
    build,
    '-G',
    'Ninja',
    '-DCMAKE_BUILD_TYPE=Release',
    '-DMERF_SANITIZE=ON',
    '-DMERF_BUILD_TESTS=ON',
    // The emulator switches between stacks of its own making, which the sanitizer takes for faults.
    '-DMERF_CUDA_EMULATION=OFF',
    '-DCMAKE_CUDA_COMPILER=NOTFOUND',
    // The sanitizers' code makes the compiler warn of what is not there.
    '-DMERF_WERROR=OFF',
    '-Wno-dev',
    '--log-level=WARNING',
  ]);
  const parallel = String(availableParallelism());
  run('cmake', ['--build', build, '--parallel', parallel, '--target', 'merf', 'merf_native_tests']);
});

const native = step('native tests', join(build, 'Release', 'merf_native_tests'), ['--no-colors'], {
  ASAN_OPTIONS: 'detect_leaks=1:detect_stack_use_after_return=0',
  UBSAN_OPTIONS: 'print_stacktrace=1',
});
const addon = step(
  'tests of the addon',
  process.execPath,
  [
    '--disable-warning=ExperimentalWarning',
    '--experimental-vm-modules',
    join('node_modules', 'jest', 'bin', 'jest.js'),
    '--testTimeout=240000',
    ...suites,
  ],
  {
    LD_PRELOAD: sanitizerLibrary(),
    ASAN_OPTIONS: 'detect_leaks=0:quarantine_size_mb=32:allocator_may_return_null=1',
    UBSAN_OPTIONS: 'print_stacktrace=1',
    MERF_PREBUILD: folder,
    MERF_SANITIZED: '1',
    ...(long ? { MERF_LONG_TESTS: '1' } : {}),
  },
);
process.exitCode = native && addon ? 0 : 1;
