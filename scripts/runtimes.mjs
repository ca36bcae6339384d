// `npm run runtimes`: brings Bun, Deno and workerd (Cloudflare's runtime) from npm into build/runtimes, then tests
// `merf/reward` in them, in Node, and in a browser where MERF_BROWSER or the PATH has Chromium.
import { spawnSync } from 'node:child_process';
import { existsSync, mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';

const root = fileURLToPath(new URL('..', import.meta.url));
const folder = join(root, 'build', 'runtimes');
const packages = ['bun', 'deno', 'workerd'];

function run(program, args, cwd) {
  const { status } = spawnSync(program, args, { cwd, stdio: 'inherit' });
  if (status !== 0) process.exit(status ?? 1);
}

if (!packages.every((name) => existsSync(join(folder, 'node_modules', '.bin', name)))) {
  mkdirSync(folder, { recursive: true });
  writeFileSync(join(folder, 'package.json'), '{ "private": true }\n');
  run('npm', ['install', '--no-audit', '--no-fund', ...packages], folder);
}
run('npm', ['run', 'jest', '--', 'tests/reward/portable', '--verbose'], root);
