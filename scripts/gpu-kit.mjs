// `npm run gpu:kit`: builds here all that scripts/gpu-check.sh runs on a machine with a GPU, into one folder that
// travels there beside a copy of the sources. That machine then needs no compiler, no Node and no network.
//
//   npm run gpu:kit [-- --architectures LIST] [--out FOLDER] [--without-node]
//     --architectures  what merf_cuda.so has code for, as CMAKE_CUDA_ARCHITECTURES: 90a-real (default), 80-real,
//                      "86-real;89-real", or release for all that a release has
//     --out            the folder, build/gpu-kit by default; what it held is replaced
//     --without-node   leaves out Node and the addon, and so the check's training run
import { spawnSync } from 'node:child_process';
import {
  chmodSync,
  copyFileSync,
  cpSync,
  existsSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  realpathSync,
  renameSync,
  rmSync,
  statSync,
  writeFileSync,
} from 'node:fs';
import { availableParallelism } from 'node:os';
import { basename, dirname, join, resolve } from 'node:path';
import { parseArgs } from 'node:util';
import {
  BootstrapError,
  bootstrap,
  configuredCudaCompiler,
  installSystemPackages,
  orExit,
  root,
  run,
  say,
} from './bootstrap.mjs';

const mostMebibytes = 60;
const usual = '90a-real';
const programs = ['merf_native_tests', 'operators', 'gpu_step'];
/** Not needed to train on a task of merf's own, and larger than all other packages together. */
const leftOut = ['tsx'];

function output(command, args) {
  const result = spawnSync(command, args, { cwd: root, encoding: 'utf8' });
  return result.status === 0 ? result.stdout : undefined;
}

function copyStripped(from, to) {
  copyFileSync(from, to);
  chmodSync(to, 0o755);
  run('strip', [to]);
}

/** The programs, and the plugin where build/ has it for other architectures: none of them knows the CPU back end. */
function buildPrograms(architectures) {
  const build = join(root, 'build', 'gpu-kit-build');
  const compiler = configuredCudaCompiler();
  // The plugin of build/ is the one that is wanted, unless it is for other cards.
  const own = join(root, 'build', 'Release', 'merf_cuda.so');
  const cache = readFileSync(join(root, 'build', 'CMakeCache.txt'), 'utf8');
  const ownIsWanted = new RegExp(`^CMAKE_CUDA_ARCHITECTURES:\\w+=${architectures}$`, 'm').test(cache);
  const nvcc = ownIsWanted ? '' : compiler;
  const cached = join(build, 'CMakeCache.txt');
  // CMake cannot change from one compiler to another.
  if (existsSync(cached) && !readFileSync(cached, 'utf8').includes(`\nCMAKE_CUDA_COMPILER:STRING=${nvcc}\n`))
    rmSync(cached);
  run('cmake', [
    ...['-S', '.', '-B', build, '-G', 'Ninja', '--log-level=WARNING'],
    ...[
      '-DMERF_CPU=OFF',
      '-DMERF_CUDA_EMULATION=OFF',
      '-DMERF_BUILD_TESTS=ON',
      '-DMERF_BUILD_GPU_BENCHMARKS=ON',
    ],
    `-DCMAKE_CUDA_COMPILER:STRING=${nvcc}`,
    `-DCMAKE_CUDA_ARCHITECTURES=${architectures}`,
  ]);
  const targets = [...programs, ...(ownIsWanted ? [] : ['merf_cuda'])];
  run('cmake', ['--build', build, '--parallel', String(availableParallelism()), '--target', ...targets]);
  const built = join(build, 'Release');
  return { built, plugin: ownIsWanted ? own : join(built, 'merf_cuda.so') };
}

/** Folders of the packages that merf needs at run time, relative to the root, as the lock file resolves them. */
function runtimePackages() {
  const { packages } = JSON.parse(readFileSync(join(root, 'package-lock.json'), 'utf8'));
  const found = new Set();
  const visit = (path) => {
    for (const name of Object.keys(packages[path].dependencies ?? {})) {
      if (leftOut.includes(name)) continue;
      // Node looks for it in the package's own node_modules, then in those of the folders above.
      let folder = path;
      let place = join(folder, 'node_modules', name);
      while (!packages[place] && folder !== '') {
        folder = folder.includes('/node_modules/')
          ? folder.slice(0, folder.lastIndexOf('/node_modules/'))
          : '';
        place = join(folder, 'node_modules', name);
      }
      if (!packages[place]) throw new BootstrapError(`package-lock.json lacks ${name}`);
      if (found.has(place)) continue;
      found.add(place);
      visit(place);
    }
  };
  visit('');
  return [...found];
}

/** Shared libraries that `file` needs and that not every Linux has. */
function librariesOf(file) {
  const lines = (output('ldd', [file]) ?? '').split('\n');
  return lines.flatMap((line) => /^\s*lib(?:dnnl|gomp|OpenCL|hwy)\S* => (\S+)/.exec(line)?.[1] ?? []);
}

/** merf as a user installs it with the Node that runs this, in one archive. */
function packRuntime(archive) {
  const folder = join(root, 'build', 'gpu-kit-runtime');
  rmSync(folder, { recursive: true, force: true });
  const release = join(folder, 'build', 'Release');
  const lib = join(folder, 'lib');
  for (const each of [release, lib, join(folder, 'models')]) mkdirSync(each, { recursive: true });
  copyStripped(realpathSync(process.execPath), join(folder, 'node'));
  const addon = join(root, 'build', 'Release', 'merf.node');
  copyStripped(addon, join(release, 'merf.node'));
  for (const library of librariesOf(addon)) copyStripped(realpathSync(library), join(lib, basename(library)));
  for (const path of ['package.json', 'bin', 'dist', 'models/merf-mini', ...runtimePackages()]) {
    cpSync(join(root, path), join(folder, path), { recursive: true, dereference: true });
  }
  // Maps of the sources are for debuggers.
  for (const file of readdirSync(folder, { recursive: true })) {
    if (/\.(map|d\.[cm]?ts)$/.test(file)) rmSync(join(folder, file));
  }
  say('packing Node and merf');
  // Higher levels take minutes, and save a tenth.
  run('tar', ['-C', folder, '--owner=0', '--group=0', '-cf', archive, '-I', 'xz -1 -T0', '.']);
  rmSync(folder, { recursive: true, force: true });
}

function mebibytes(folder) {
  return Number(output('du', ['-sm', folder])?.split('\t')[0]);
}

function sizes(folder) {
  return readdirSync(folder, { recursive: true, withFileTypes: true })
    .filter((entry) => entry.isFile())
    .map((entry) => join(entry.parentPath ?? entry.path, entry.name))
    .map((path) => ({ path: path.slice(folder.length + 1), mib: statSync(path).size / 2 ** 20 }))
    .sort((a, b) => b.mib - a.mib);
}

function options() {
  const words = {
    architectures: { type: 'string', default: usual },
    out: { type: 'string', default: join('build', 'gpu-kit') },
    'without-node': { type: 'boolean', default: false },
    help: { type: 'boolean', default: false },
  };
  try {
    return parseArgs({ options: words }).values;
  } catch (error) {
    throw new BootstrapError(error.message);
  }
}

const { architectures, out, 'without-node': withoutNode, help } = orExit(options);
if (help) {
  const text = readFileSync(new URL(import.meta.url), 'utf8');
  process.stdout.write(`${text.slice(0, text.indexOf('\nimport ')).replaceAll(/^\/\/ ?/gm, '')}\n`);
  process.exit(0);
}

const { cuda } = bootstrap({ cuda: true });
orExit(() => {
  if (!cuda) throw new BootstrapError('the kit needs nvcc, which is not here and could not be brought');
  installSystemPackages(['doctest-dev', 'binutils', 'xz-utils']);
  say('building the programs of the check');
  const { built, plugin } = buildPrograms(architectures);

  const target = resolve(out);
  const made = `${target}.partial`;
  rmSync(made, { recursive: true, force: true });
  for (const each of ['bin', join('include', 'doctest')]) mkdirSync(join(made, each), { recursive: true });
  for (const name of programs) copyStripped(join(built, name), join(made, 'bin', name));
  copyFileSync(plugin, join(made, 'bin', 'merf_cuda.so'));
  cpSync(join(root, 'tests', 'native', 'golden'), join(made, 'golden'), { recursive: true });
  // What the programs are built with there, should these not run.
  const doctest = ['/usr/include', '/usr/local/include'].find((path) =>
    existsSync(join(path, 'doctest', 'doctest.h')),
  );
  if (doctest === undefined) throw new BootstrapError('doctest/doctest.h was not found');
  copyFileSync(join(doctest, 'doctest', 'doctest.h'), join(made, 'include', 'doctest', 'doctest.h'));
  const lib = join(made, 'lib');
  mkdirSync(lib);
  for (const library of librariesOf(join(made, 'bin', 'operators')))
    copyStripped(realpathSync(library), join(lib, basename(library)));
  if (!withoutNode) packRuntime(join(made, 'runtime.tar.xz'));
  const commit = output('git', ['describe', '--always', '--dirty', '--abbrev=12'])?.trim() ?? '';
  const compiler = /V([\d.]+)/.exec(output(configuredCudaCompiler(), ['--version']) ?? '')?.[1] ?? '';
  const release = architectures === 'release' ? /set\(CMAKE_CUDA_ARCHITECTURES ([^)]*-virtual)\)/ : undefined;
  const listed = release?.exec(readFileSync(join(root, 'CMakeLists.txt'), 'utf8'))?.[1].replaceAll(' ', ';');
  const contents = {
    commit,
    architectures: listed ?? architectures,
    nvcc: compiler,
    node: withoutNode ? '' : process.version,
  };
  // A field a line, since a shell reads it.
  writeFileSync(join(made, 'kit.json'), `${JSON.stringify(contents, undefined, 1)}\n`);

  const size = mebibytes(made);
  const largest = sizes(made)
    .slice(0, 6)
    .map(({ path, mib }) => `${path} ${mib.toFixed(1)}`);
  if (size > mostMebibytes) {
    throw new BootstrapError(
      `the kit takes ${size} MiB, more than ${mostMebibytes}: ${largest.join(', ')}. Fewer architectures or ` +
        `--without-node make it smaller; it lies in ${made}`,
    );
  }
  rmSync(target, { recursive: true, force: true });
  mkdirSync(dirname(target), { recursive: true });
  renameSync(made, target);
  say(`${out}: ${size} MiB (${largest.join(', ')}), for ${contents.architectures}`);
});
