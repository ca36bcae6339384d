// Brings a fresh clone to a working build: Debian packages, npm packages, the native addon, dist/.
// Uses nothing but Node itself, because it runs before anything is installed. Each stage is skipped when its
// inputs are what they were when it last succeeded, so a second run takes a few tens of milliseconds.
//
//   node scripts/bootstrap.mjs [--tests] [--ci]
//     --tests  also builds the native tests, and the CUDA kernels with nvcc, which is brought where there is none
//     --ci     also brings clang-format
//   node scripts/bootstrap.mjs --gpu
//     only the Debian packages that scripts/gpu-check.sh builds with, beside CUDA's own
import { spawnSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import {
  existsSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  rmSync,
  statSync,
  symlinkSync,
  writeFileSync,
} from 'node:fs';
import { availableParallelism } from 'node:os';
import { delimiter, dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';

export const root = dirname(dirname(fileURLToPath(import.meta.url)));
const stampFile = join(root, 'build', 'bootstrap.json');
const addon = join(root, 'build', 'Release', 'merf.node');
const cudaPlugin = join(root, 'build', 'Release', 'merf_cuda.so');
const cmakeCache = join(root, 'build', 'CMakeCache.txt');
const toolkit = join(root, 'build', 'cuda-toolkit');
const toolkitCompiler = join(toolkit, 'nvidia', 'cu13', 'bin', 'nvcc');
const toolkitPackages = ['cuda-nvcc', 'nvvm', 'cuda-crt', 'cuda-runtime', 'cuda-cccl'].map(
  (name) => `nvidia-${name}==13.0.*`,
);

export class BootstrapError extends Error {}

export const say = (message) => process.stdout.write(`[setup] ${message}\n`);

export function run(command, args, options = {}) {
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

export function installSystemPackages(packages) {
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

// nvcc on PATH, where it is of CUDA 12.4 or later. One that the last build used is taken at its word.
function findCudaCompiler(stamp) {
  for (const folder of (process.env.PATH ?? '').split(delimiter)) {
    const path = join(folder, 'nvcc');
    if (folder === '' || !existsSync(path)) continue;
    if (path === stamp.cudaCompiler) return path;
    const version = /release (\d+)\.(\d+)/.exec(output(path, ['--version']) ?? '');
    if (version && Number(version[1]) * 100 + Number(version[2]) >= 1204) return path;
  }
  return undefined;
}

// A Python that can install packages: pip needs no environment where it is told a folder.
export function findPip() {
  const pip = (python) => output(python, ['-m', 'pip', '--version']) !== undefined;
  if (pip('python3')) return 'python3';
  const environment = join(root, 'build', 'python');
  const made = (python) =>
    output(python, ['-m', 'venv', environment]) !== undefined && pip(join(environment, 'bin', 'python'));
  if (made('python3')) return join(environment, 'bin', 'python');
  installSystemPackages(['python3-venv']);
  if (made('/usr/bin/python3')) return join(environment, 'bin', 'python');
  throw new BootstrapError('there is no python3 with pip or venv');
}

// NVIDIA publishes the compiler as Python packages, which need nothing of the system's.
function installCudaCompiler(stamp) {
  const wanted = toolkitPackages.join(' ');
  if (stamp.cudaToolkit === wanted && existsSync(toolkitCompiler)) return;
  const python = findPip();
  say('installing the CUDA compiler (nvcc, 13.0) into build/cuda-toolkit');
  rmSync(toolkit, { recursive: true, force: true });
  const install = ['-m', 'pip', 'install', '--quiet', '--disable-pip-version-check', '--no-deps'];
  const pip = spawnSync(python, [...install, '--retries', '2', '--target', toolkit, ...toolkitPackages], {
    cwd: root,
    encoding: 'utf8',
    env: { ...process.env, PIP_ROOT_USER_ACTION: 'ignore' },
  });
  if (pip.status !== 0) {
    throw new BootstrapError(`pip did not bring it (${pip.stderr?.trim().split('\n').pop() ?? pip.error})`);
  }
  // nvcc looks for the runtime in lib64.
  symlinkSync('lib', join(dirname(dirname(toolkitCompiler)), 'lib64'));
  stamp.cudaToolkit = wanted;
  writeStamp(stamp);
}

// The CUDA compiler to build with: the machine's, else our own, which is brought where `bring` says so.
function cudaCompiler(bring, stamp) {
  const found = findCudaCompiler(stamp);
  if (found !== undefined) return found;
  if (bring) {
    try {
      installCudaCompiler(stamp);
    } catch (error) {
      if (!(error instanceof BootstrapError)) throw error;
      say(
        `the CUDA kernels run under emulation but are not compiled by nvcc: ${error.message.split('\n')[0]}`,
      );
    }
  }
  return stamp.cudaToolkit !== undefined && existsSync(toolkitCompiler) ? toolkitCompiler : undefined;
}

/** The CUDA compiler that build/ is configured with, if any. */
export function configuredCudaCompiler() {
  if (!existsSync(cmakeCache)) return undefined;
  const compiler = /^CMAKE_CUDA_COMPILER:\w+=(.+)$/m.exec(readFileSync(cmakeCache, 'utf8'))?.[1];
  return compiler?.endsWith('NOTFOUND') ? undefined : compiler;
}

function buildNative({ tests, cuda }, stamp) {
  const lock = readFileSync(join(root, 'package-lock.json'));
  const benchmarks = ['CMakeLists.txt', 'matrix_rate.cc', 'launches.cc', 'operators', 'gpu'].map(
    (name) => `benchmarks/${name}`,
  );
  const state = fingerprint(['CMakeLists.txt', 'native', 'bindings', ...benchmarks], lock);
  const testState = tests ? fingerprint(['tests/native'], state) : undefined;
  const compiler = cudaCompiler(tests || cuda, stamp);
  if (
    existsSync(addon) &&
    stamp.native === state &&
    stamp.cudaCompiler === compiler &&
    (!tests || stamp.nativeTests === testState)
  )
    return;
  installSystemPackages([
    'g++',
    'cmake',
    'ninja-build',
    'libxsmm-dev',
    'libdnnl-dev',
    'ocl-icd-opencl-dev', // what the CMake package of libdnnl-dev looks for but the Debian one does not bring
    'libhwy-dev',
    'libboost-context-dev',
    ...(tests ? ['doctest-dev'] : []),
  ]);
  say(`building the native part${tests ? ' and its tests' : ''} (a few minutes the first time)`);
  const cmakeJs = [join('node_modules', 'cmake-js', 'bin', 'cmake-js')];
  const quiet = ['--log-level', 'error'];
  // CMake keeps what it was told before, but cannot change from one compiler to another.
  const configured = configuredCudaCompiler();
  if (configured !== undefined && configured !== compiler) rmSync(cmakeCache, { force: true });
  run(process.execPath, [
    ...cmakeJs,
    'configure',
    ...quiet,
    ...(tests ? ['--CDMERF_BUILD_TESTS=ON'] : []),
    ...(compiler ? [`--CDCMAKE_CUDA_COMPILER=${compiler}`] : []),
  ]);
  // A plugin from an earlier build would not fit the rest any more.
  if (configuredCudaCompiler() === undefined) rmSync(cudaPlugin, { force: true });
  run(process.execPath, [...cmakeJs, 'build', ...quiet, '--parallel', String(availableParallelism())]);
  if (!existsSync(addon)) throw new BootstrapError(`the build left no ${addon}`);
  stamp.native = state;
  stamp.cudaCompiler = compiler;
  if (tests) stamp.nativeTests = testState;
  writeStamp(stamp);
}

function buildTypeScript(stamp) {
  const projects = ['tsconfig.build.json', 'tsconfig.benchmarks.json'];
  const benchmarks = readdirSync(join(root, 'benchmarks')).filter((name) => name.endsWith('.ts'));
  const state = fingerprint([
    'lib',
    ...benchmarks.map((name) => `benchmarks/${name}`),
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
export function orExit(work) {
  try {
    return work();
  } catch (error) {
    if (!(error instanceof BootstrapError)) throw error;
    process.stderr.write(`[setup] ${error.message}\n`);
    process.exit(1);
  }
}

/**
 * Brings everything up to date, or prints what is in the way and ends the process with exit code 1. `cuda` and `tests`
 * bring nvcc where there is none. Returns whether the CUDA kernels were compiled by it, too.
 */
export function bootstrap({ tests = false, ci = false, cuda = false } = {}) {
  return orExit(() => {
    checkNode();
    installNpmPackages();
    const stamp = readStamp();
    buildNative({ tests, cuda }, stamp);
    buildTypeScript(stamp);
    if (ci) installSystemPackages(['clang-format']);
    return { cuda: stamp.cudaCompiler !== undefined };
  });
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  if (process.argv.includes('--gpu')) {
    orExit(() => installSystemPackages(['g++', 'cmake', 'ninja-build', 'doctest-dev']));
  } else {
    bootstrap({ tests: process.argv.includes('--tests'), ci: process.argv.includes('--ci') });
  }
}
