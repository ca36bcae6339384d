// `merf/reward` needs neither Node nor the native part, and is small.
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { createContext, runInContext } from 'node:vm';
import { gzipSync } from 'node:zlib';
import { afterAll, beforeAll, describe, expect, test } from '@jest/globals';
import { type BuildOptions, build } from 'esbuild';
import * as merf from 'merf';
import * as reward from 'merf/reward';
import { root } from '../../cli/run.js';
import { program } from './program.js';
import { runtimes } from './runtimes.js';

const mostBytes = 60_000;

/** As a bundler makes it for a browser, in which nothing of Node's is. */
const bundle = async (options: BuildOptions) => {
  const { outputFiles } = await build({
    absWorkingDir: root,
    bundle: true,
    minify: true,
    platform: 'browser',
    write: false,
    logLevel: 'silent',
    ...options,
  });
  return outputFiles?.[0]?.text as string;
};

/** What the program of a bundle comes to where there is nothing but JavaScript, timers and signals. */
function programIn(text: string): unknown {
  const given = { setTimeout, clearTimeout, AbortController, AbortSignal, TextEncoder, performance };
  const context = createContext(given);
  runInContext(`(() => {${text.replaceAll('globalThis', 'this')}}).call(this)`, context);
  return runInContext('program()', context);
}

test('a bundle for browsers is below 60 KB gzipped', async () => {
  const text = await bundle({ entryPoints: ['lib/reward.ts'], format: 'esm' });
  const bytes = gzipSync(text, { level: 9 }).length;
  expect(bytes).toBeLessThan(mostBytes);
  expect(bytes).toBeGreaterThan(10_000);
  // What a bundler leaves to the platform would be missing there.
  expect(text).not.toMatch(/\bfrom ?"|\bimport ?[("]|\brequire\(/);
  expect(text).not.toContain('node:');
}, 60_000);

test('the check finds modules of Node', async () => {
  for (const entry of ['lib/reward/guard.ts', 'lib/tasks/dataset.ts', 'lib/node-host.ts']) {
    await expect(bundle({ entryPoints: [entry], format: 'esm' })).rejects.toThrow('Could not resolve "node:');
  }
});

test('all of it is in merf, as the same classes and functions', () => {
  const everything: Record<string, unknown> = { ...merf };
  for (const [name, value] of Object.entries(reward)) {
    // The function in merf takes tensors as well as numbers, so that it is asynchronous.
    if (name === 'groupAdvantages') expect(typeof everything[name]).toBe('function');
    else expect(everything[name]).toBe(value);
  }
});

describe('gives the same', () => {
  const folder = mkdtempSync(join(tmpdir(), 'merf-portable-'));
  let expected: string;
  let forPages: string;
  beforeAll(async () => {
    // Here, Node's own hash and guard are in place: `merf` brings them.
    expected = await program();
    forPages = await bundle({
      format: 'esm',
      stdin: {
        contents: `import { program } from './program.js'; globalThis.program = program;`,
        resolveDir: join(root, 'tests', 'reward', 'portable'),
      },
    });
  }, 60_000);
  afterAll(() => rmSync(folder, { recursive: true, force: true }));

  test('in this process, with what it should be', () => {
    const { failures, unknownOption, ...rest } = JSON.parse(expected);
    expect(failures).toEqual({
      never: 'VERIFIER_TIMEOUT',
      loop: 'VERIFIER_TIMEOUT',
      late: 'VERIFIER_TIMEOUT',
      given: 'ABORTED',
      throws: 'VERIFIER_FAILED',
      unknown: 'VERIFIER_FAILED',
      quick: { total: 1, parts: { correctness: { case: 'yes', score: 1 } } },
    });
    expect(unknownOption).toBe('INVALID_ARGUMENT');
    for (const name of ['knights-and-knaves', 'countdown']) {
      for (const { right, shown, broken } of rest[name].seen) {
        expect([right.total, shown.total, broken.total]).toEqual([3, 3, -3]);
      }
    }
  });

  test('where there is nothing but JavaScript and timers', async () => {
    expect(await programIn(forPages)).toBe(expected);
  });

  for (const { name, path, run } of runtimes) {
    const check = path === undefined ? test.skip : test;
    check(
      `in ${name} [needs ${name}]`,
      async () => {
        const [, result] = /^result:(.*)$/m.exec(await run(path as string, folder, forPages)) ?? [];
        expect(result).toBe(expected);
      },
      180_000,
    );
  }
});

describe('files', () => {
  test('are refused with what to give instead', async () => {
    const text = await bundle({
      format: 'esm',
      stdin: {
        contents: `import { countdown, parseMotivation } from 'merf/reward';
          const messageOf = async (run) => {
            try { await run(); } catch (error) { return error.code + ': ' + error.message; }
          };
          globalThis.program = async () => [
            await messageOf(() => parseMotivation('template:words.txt')),
            await messageOf(() => countdown.open({ data: 'rows.jsonl' })),
          ];`,
        resolveDir: root,
      },
    });
    const [template, data] = (await programIn(text)) as string[];
    expect(template).toMatch(/^UNSUPPORTED: .*template:words\.txt.*\{ template: TEXT \}/);
    expect(data).toMatch(/^UNSUPPORTED: .*rows\.jsonl/);
  });
});
