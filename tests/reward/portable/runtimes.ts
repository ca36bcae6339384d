import { spawn, spawnSync } from 'node:child_process';
import { existsSync, writeFileSync } from 'node:fs';
import { createServer } from 'node:http';
import type { AddressInfo } from 'node:net';
import { delimiter, join } from 'node:path';
import { text } from 'node:stream/consumers';

/** Where `npm run runtimes` puts what npm has of them. */
const brought = join('build', 'runtimes', 'node_modules', '.bin');

function find(names: readonly string[], variable?: string): string | undefined {
  const named = variable === undefined ? undefined : process.env[variable];
  if (named) return named;
  const folders = [join(process.cwd(), brought), ...(process.env.PATH ?? '').split(delimiter)];
  return folders
    .flatMap((folder) => names.map((name) => join(folder, name)))
    .find((path) => existsSync(path));
}

function run(program: string, args: readonly string[]): string {
  const { stdout, stderr, status, error } = spawnSync(program, args, {
    encoding: 'utf8',
    timeout: 150_000,
    env: { ...process.env, DENO_NO_UPDATE_CHECK: '1', NO_COLOR: '1' },
  });
  if (status !== 0) throw error ?? new Error(`${program} ended with ${status}: ${stderr}`);
  return stdout;
}

/** A runtime that runs a module, in a folder of its own, and gives the line that it prints after `result:`. */
export interface Runtime {
  readonly name: string;
  /** Where its program is; undefined where this machine has none. */
  readonly path: string | undefined;
  run(path: string, folder: string, bundle: string): string | Promise<string>;
}

const print = 'program().then((text) => console.log("result:" + text));';

/** A runtime that a file of JavaScript is given to. */
function ofFiles(name: string, args: readonly string[], path = find([name])): Runtime {
  return {
    name,
    path,
    run(found, folder, bundle) {
      const file = join(folder, `${name}.mjs`);
      writeFileSync(file, `${bundle}\n${print}`);
      return run(found, [...args, file]);
    },
  };
}

export const runtimes: readonly Runtime[] = [
  ofFiles('node', [], process.execPath),
  ofFiles('bun', ['run']),
  ofFiles('deno', ['run', '--no-config', '--no-lock']),
  {
    name: 'workerd',
    path: find(['workerd']),
    run(path, folder, bundle) {
      writeFileSync(
        join(folder, 'workerd.mjs'),
        `${bundle}\nexport default { async test() { console.log('result:' + (await program())); } };`,
      );
      const config = join(folder, 'workerd.capnp');
      writeFileSync(
        config,
        'using Workerd = import "/workerd/workerd.capnp";\n' +
          'const config :Workerd.Config = (services = [(name = "main", worker = (\n' +
          '  modules = [(name = "main", esModule = embed "workerd.mjs")], compatibilityDate = "2025-01-01"))]);\n',
      );
      return run(path, ['test', config]);
    },
  },
  {
    name: 'a browser',
    path: find(['chromium', 'chromium-browser', 'google-chrome', 'chrome'], 'MERF_BROWSER'),
    run: inBrowser,
  },
];

/** Serves a page with the bundle to a browser without a window, and takes what the page sends back. */
async function inBrowser(path: string, folder: string, bundle: string): Promise<string> {
  const script = "program().then((body) => fetch('/result', { method: 'POST', body }));";
  const page =
    `<!doctype html><meta charset="utf-8"><title>merf/reward</title>` +
    `<script type="module">${bundle.replaceAll('</script', '<\\/script')}\n${script}</script>`;
  let receive = (_: string) => {};
  const received = new Promise<string>((resolve) => {
    receive = resolve;
  });
  const server = createServer(async (request, response) => {
    if (request.method === 'POST') receive(await text(request));
    response.setHeader('content-type', 'text/html');
    response.end(request.url === '/' ? page : '');
  });
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
  const { port } = server.address() as AddressInfo;
  const browser = spawn(
    path,
    [
      '--headless=new',
      '--no-sandbox',
      '--disable-gpu',
      '--no-first-run',
      `--user-data-dir=${join(folder, 'profile')}`,
      `http://127.0.0.1:${port}/`,
    ],
    { stdio: 'ignore', detached: true },
  );
  const ended = new Promise<never>((_, reject) => {
    browser.on('error', reject);
    browser.on('exit', (code) => reject(new Error(`${path} ended with ${code}`)));
  });
  try {
    return `result:${await Promise.race([received, ended])}`;
  } finally {
    ended.catch(() => undefined);
    // The group that it leads: its own processes go with it.
    if (browser.pid !== undefined && browser.exitCode === null) process.kill(-browser.pid, 'SIGKILL');
    server.closeAllConnections();
    server.close();
  }
}
