import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, test } from '@jest/globals';
import { defineConfig, readConfigFile, trainSchema } from '../../lib/cli/config.js';
import { knightsAndKnaves } from '../../lib/tasks/index.js';
import { fakeTask } from '../train/fake-task.js';

let folder: string;
beforeAll(() => {
  folder = mkdtempSync(join(tmpdir(), 'merf-config-'));
});
afterAll(() => rmSync(folder, { recursive: true, force: true }));

function write(name: string, text: string): string {
  const path = join(folder, name);
  writeFileSync(path, text);
  return path;
}

describe('readConfigFile', () => {
  test('takes keys in snake_case and camelCase, and paths relative to the file', async () => {
    mkdirSync(join(folder, 'data'));
    const file = write(
      'run.yaml',
      'task: knights-and-knaves\ndata: data/train.jsonl\nmodel: ./model\nlearning_rate: 2e-5\ngroupSize: 4\n' +
        'evaluate_motivations: [none, full]\n',
    );
    expect(await readConfigFile(file, trainSchema(knightsAndKnaves as never))).toEqual({
      task: 'knights-and-knaves',
      data: join(folder, 'data/train.jsonl'),
      model: join(folder, 'model'),
      learningRate: 2e-5,
      groupSize: 4,
      evaluateMotivations: ['none', 'full'],
    });
  });

  test('awaits the task of a module, however it exports its settings', async () => {
    const task = 'Promise.resolve({ name: "own", messages() { return []; } })';
    for (const [name, text] of [
      ['named.mjs', `export const config = { task: ${task}, steps: 3 };`],
      ['default.mjs', `export default { task: ${task}, steps: 3 };`],
    ] as const) {
      const config = await readConfigFile(write(name, text), trainSchema(knightsAndKnaves as never));
      expect(config).toMatchObject({ steps: 3, task: { name: 'own' } });
    }
  });

  test('refuses what is no task', async () => {
    const file = write('no-task.mjs', 'export const config = { task: { name: 3 } };');
    await expect(readConfigFile(file, trainSchema(knightsAndKnaves as never))).rejects.toThrow(
      /task: expected the name of a task or a task/,
    );
  });
});

test('defineConfig takes a task, a promise of one, or a name', async () => {
  const promised = fakeTask();
  expect(defineConfig({ task: promised, learningRate: 1e-5 }).task).toBe(promised);
  expect(defineConfig({ task: await promised }).task).toBe(await promised);
  expect(defineConfig({ task: 'knights-and-knaves', people: '2-3' }).people).toBe('2-3');
});
