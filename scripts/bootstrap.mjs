// Brings a fresh clone to a working build: Debian packages, npm packages, the native addon, dist/.
// Uses nothing but Node itself, because it runs before anything is installed. Each stage is skipped when its
// inputs are what they were when it last succeeded, so a second run takes a few tens of milliseconds.
//
//   node scripts/bootstrap.mjs [--tests] [--ci]
//     --tests  also builds the native tests
//     --ci     also brings clang-format
//   node scripts/bootstrap.mjs --gpu
//     only the Debian packages that scripts/gpu-check.sh builds with, beside CUDA's own
import { spawnSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import { existsSync, mkdirSync, readdirSync, readFileSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { availableParallelism } from 'node:os';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';

export const root = dirname(dirname(fileURLToPath(import.meta.url)));
const stampFile = join(root, 'build', 'bootstrap.json');
const addon = join(root, 'build', 'Release', 'merf.node');

class BootstrapError extends Error {}

const say = (message) => process.stdout.write(`[setup] ${message}\n`);

function run(command, args, options = {}) {
  const result = spawnSync(command, args, { cwd: root, stdio: 'inherit', ...options });
  if (result.error) throw new BootstrapError(`could not run ${command}: ${result.error.message}`);
  if (result.status !== 0) {
    throw new BootstrapError(
      `\`${command} ${args.join(' ')}\` failed with ${result.signal ?? `exit code ${result.status}`}`,
    );
  }
}

function output(command, args) {
  const result = spawnSync(command, args, { cwd: root, encoding: 'utf8' });
  return result.status === 0 ? result.stdout : undefined;
}

function checkNode() {
  const major = Number(process.versions.node.split('.')[0]);
  if (major < 20)
    throw new BootstrapError(`merf needs Node.js 20 or later; this is ${process.versions.node}`);
}

// Path, size and modification time of every file below `paths`: enough to tell an edit from no edit.
function fingerprint(paths, extra = '') {
  const hash = createHash('sha256').update(extra);
  const visit = (path) => {
    const status = statSync(join(root, path), { throwIfNoEntry: false });
    if (!status) return;
    if (status.isDirectory()) {
      for (const entry of readdirSync(join(root, path)).sort()) visit(`${path}/${entry}`);
    } else {
      hash.update(`${path}\0${status.size}\0${status.mtimeMs}\0`);
    }
  };
  for (const path of paths) visit(path);
  return hash.digest('hex');
}

function readStamp() {
  try {
    return JSON.parse(readFileSync(stampFile, 'utf8'));
  } catch {
    return {}; // no stamp, or one cut short: every stage runs
  }
}

function writeStamp(stamp) {
  mkdirSync(dirname(stampFile), { recursive: true });
  writeFileSync(stampFile, JSON.stringify(stamp));
}

function installSystemPackages(packages) {
  if (!existsSync('/usr/bin/dpkg')) {
    say(`not a Debian system; the build needs what Debian calls ${packages.join(', ')}`);
    return;
  }
  const missing = packages.filter(
    (name) => !output('dpkg', ['-s', name])?.includes('\nStatus: install ok installed\n'),
  );
  if (missing.length === 0) return;
  const install = ['install', '-y', '--no-install-recommends', ...missing];
  if (process.getuid?.() !== 0) {
    throw new BootstrapError(
      `missing Debian packages. Install them and run this again:\n\n  sudo apt-get update && sudo apt-get ${install.join(' ')}\n`,
    );
  }
  say(`installing Debian packages: ${missing.join(' ')}`);
  const env = { ...process.env, DEBIAN_FRONTEND: 'noninteractive' };
  run('apt-get', ['update', '-q'], { env });
  run('apt-get', ['-q', ...install], { env });
}

// npm keeps the tree that it installed in node_modules/.package-lock.json; it is current when every package of the
// lock file stands there in the locked version (optional ones may be for another platform).
function npmPackagesCurrent() {
  let installed;
  try {
    installed = JSON.parse(readFileSync(join(root, 'node_modules', '.package-lock.json'), 'utf8')).packages;
  } catch {
    return false; // nothing installed
  }
  const locked = JSON.parse(readFileSync(join(root, 'package-lock.json'), 'utf8')).packages;
  return Object.entries(locked).every(
    ([path, { version, optional }]) => path === '' || installed[path]?.version === version || optional,
  );
}

function installNpmPackages() {
  if (npmPackagesCurrent()) return;
  say('installing npm packages');
  run('npm', ['ci', '--ignore-scripts', '--no-audit', '--no-fund', '--loglevel=error']);
}

function buildNative(tests, stamp) {
  const lock = readFileSync(join(root, 'package-lock.json'));
  const state = fingerprint(['CMakeLists.txt', 'native', 'bindings', 'benchmarks/matrix_rate.cc'], lock);
  const testState = tests ? fingerprint(['tests/native'], state) : undefined;
  if (existsSync(addon) && stamp.native === state && (!tests || stamp.nativeTests === testState)) return;
  installSystemPackages([
    'g++',
    'cmake',
    'ninja-build',
    'libdnnl-dev',
    'ocl-icd-opencl-dev', // what the CMake package of libdnnl-dev looks for but the Debian one does not bring
    'libhwy-dev',
    ...(tests ? ['doctest-dev'] : []),
  ]);
  say(`building the native part${tests ? ' and its tests' : ''} (a few minutes the first time)`);
  const cmakeJs = [join('node_modules', 'cmake-js', 'bin', 'cmake-js')];
  const quiet = ['--log-level', 'error'];
  run(process.execPath, [...cmakeJs, 'configure', ...quiet, ...(tests ? ['--CDMERF_BUILD_TESTS=ON'] : [])]);
  run(process.execPath, [...cmakeJs, 'build', ...quiet, '--parallel', String(availableParallelism())]);
  if (!existsSync(addon)) throw new BootstrapError(`the build left no ${addon}`);
  stamp.native = state;
  if (tests) stamp.nativeTests = testState;
  writeStamp(stamp);
}

function buildTypeScript(stamp) {
  const projects = ['tsconfig.build.json', 'tsconfig.benchmarks.json'];
  const state = fingerprint([
    'lib',
    'benchmarks/index.ts',
    'tsconfig.json',
    ...projects,
    'package-lock.json',
  ]);
  if (stamp.dist === state && existsSync(join(root, 'dist', 'index.js'))) return;
  say('compiling TypeScript');
  rmSync(join(root, 'dist'), { recursive: true, force: true });
  const tsc = join('node_modules', 'typescript', 'bin', 'tsc');
  for (const project of projects) run(process.execPath, [tsc, '-p', project]);
  stamp.dist = state;
  writeStamp(stamp);
}

// Prints what is in the way and ends the process with exit code 1.
function orExit(work) {
  try {
    work();
  } catch (error) {
    if (!(error instanceof BootstrapError)) throw error;
    process.stderr.write(`[setup] ${error.message}\n`);
    process.exit(1);
  }
}

/** Brings everything up to date, or prints what is in the way and ends the process with exit code 1. */
export function bootstrap({ tests = false, ci = false } = {}) {
  orExit(() => {
    checkNode();
    installNpmPackages();
    const stamp = readStamp();
    buildNative(tests, stamp);
    buildTypeScript(stamp);
    if (ci) installSystemPackages(['clang-format']);
  });
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  if (process.argv.includes('--gpu')) {
    orExit(() => installSystemPackages(['g++', 'cmake', 'ninja-build', 'doctest-dev']));
  } else {
    bootstrap({ tests: process.argv.includes('--tests'), ci: process.argv.includes('--ci') });
  }
}
