// `npm run bench`: brings the build up to date and the peers that --peers names into build/peers, then runs `merf bench`.
import { spawnSync } from 'node:child_process';
import { existsSync, mkdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { BootstrapError, bootstrap, findPip, root, run, say } from './bootstrap.mjs';

const folder = join(root, 'build', 'peers');
const pythonPackages = ['torch', 'transformers', 'trl', 'accelerate', 'peft'];

// Into a folder of their own, with the Python that they were brought for named beside it. Its name matters: the pickler
// that TRL's data sets use takes modules outside of a site-packages for the user's own, and pickles them whole.
function installPythonPackages() {
  const target = join(folder, 'python', 'site-packages');
  const stamp = join(folder, 'python.json');
  const wanted = pythonPackages.join(' ');
  if (existsSync(stamp) && JSON.parse(readFileSync(stamp, 'utf8')).packages === wanted) return;
  if (process.env.MERF_PYTHON) return; // it has them, or `merf bench` says what it lacks
  if (pythonHas(pythonPackages)) return;
  const python = findPip();
  say(`installing ${pythonPackages.join(', ')} into build/peers/python`);
  rmSync(target, { recursive: true, force: true });
  mkdirSync(folder, { recursive: true });
  const install = ['-m', 'pip', 'install', '--quiet', '--disable-pip-version-check', '--retries', '2'];
  run(python, [...install, '--target', target, ...pythonPackages], {
    env: { ...process.env, PIP_ROOT_USER_ACTION: 'ignore' },
  });
  writeFileSync(stamp, JSON.stringify({ packages: wanted, python }));
}

function pythonHas(modules) {
  const probe = 'import importlib.util as u, sys; sys.exit(not all(u.find_spec(n) for n in sys.argv[1:]))';
  return spawnSync('python3', ['-c', probe, ...modules]).status === 0;
}

function installNodeLlamaCpp() {
  const target = join(folder, 'llama.cpp');
  if (existsSync(join(target, 'node_modules', 'node-llama-cpp', 'dist', 'index.js'))) return;
  say('installing node-llama-cpp into build/peers/llama.cpp');
  mkdirSync(target, { recursive: true });
  writeFileSync(join(target, 'package.json'), '{ "private": true }\n');
  const quiet = ['--no-audit', '--no-fund', '--loglevel=error'];
  run('npm', ['install', '--prefix', target, '--ignore-scripts', ...quiet, 'node-llama-cpp'], {
    cwd: target,
  });
}

const install = {
  pytorch: installPythonPackages,
  trl: installPythonPackages,
  'llama.cpp': installNodeLlamaCpp,
};

// The list after --peers, where it is given.
function peersIn(args) {
  const at = args.findIndex((arg) => arg === '--peers' || arg.startsWith('--peers='));
  if (at < 0) return { at, names: [] };
  const text = args[at].startsWith('--peers=') ? args[at].slice('--peers='.length) : (args[at + 1] ?? '');
  return { at, names: text.split(',').map((name) => name.trim()) };
}

const args = process.argv.slice(2);
const { at, names } = peersIn(args);
bootstrap();
const failed = names.filter((name) => {
  try {
    install[name]?.();
    return false;
  } catch (error) {
    if (!(error instanceof BootstrapError)) throw error;
    say(`${name} is not measured: ${error.message}`);
    return true;
  }
});
if (failed.length > 0) {
  const rest = names.filter((name) => !failed.includes(name)).join(',') || 'none';
  args.splice(at, args[at] === '--peers' ? 2 : 1, `--peers=${rest}`);
}
const bench = spawnSync(process.execPath, ['bin/merf.js', 'bench', ...args], { cwd: root, stdio: 'inherit' });
process.exitCode = failed.length > 0 && bench.status === 0 ? 1 : (bench.status ?? 1);
