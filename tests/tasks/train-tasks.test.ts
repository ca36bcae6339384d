import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, expect, test } from '@jest/globals';
import { merf } from '../cli/run.js';
import { fixturePath } from '../support/fixtures.js';

const folder = mkdtempSync(join(tmpdir(), 'merf-tasks-'));
afterAll(() => rmSync(folder, { recursive: true }));

const searchFiles = [
  '--corpus',
  fixturePath('search/folder'),
  '--data',
  fixturePath('search/questions.jsonl'),
];

test.each<[string, readonly string[]]>([
  ['countdown', ['--numbers', '3', '--use', 'at-most-once']],
  ['countdown', ['--data', fixturePath('countdown/puzzles.parquet')]],
  ['search', ['--searches', '2']],
  ['search', searchFiles],
])('the shipped model trains two steps on %s with %j', async (task, options) => {
  const out = join(folder, `${task}${options.length}${options[0]}`);
  const small = ['--prompts-per-step', '2', '--group-size', '2', '--max-tokens', '48'];
  const result = await merf(['train', '--task', task, '--steps', '2', '--out', out, ...small, ...options]);
  expect(result).toMatchObject({ code: 0, stdout: expect.stringContaining('step 2/2') });
  const metrics = readFileSync(join(out, 'metrics.jsonl'), 'utf8');
  expect(metrics).toContain('"correctness"');
});
