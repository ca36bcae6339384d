import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join, relative, resolve } from 'node:path';
import { afterAll, beforeAll, describe, expect, test } from '@jest/globals';
import { z } from 'zod';
import { defineConfig, readConfigFile, trainSchema } from '../../lib/cli/config.js';
import { defineTask, knightsAndKnaves } from '../../lib/tasks/index.js';
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

  test('templates, the data of a curriculum and lists of paths are relative to the file too', async () => {
    const schema = trainSchema(
      defineTask({
        name: 'own',
        options: {
          hints: z.array(z.string()).default([]).meta({ path: true, description: 'files' }),
          prompts: z.string().meta({ path: true }).optional(),
        },
        create: () => ({ spec: {} as never, messages: () => [] }),
      }) as never,
    );
    const file = write(
      'paths.yaml',
      'motivation: template:a.txt/full@0, template:b/c.txt@10,none@20\nlearn_under: same/template:a.txt\n' +
        'hint_failed: template:/d.txt\nevaluate_motivations: [none, "template:a.txt"]\n' +
        'curriculum: data=easy.jsonl,hard.parquet\nhints: [one.txt, two.txt]\nprompts: p.txt\nstop: ["a,b", "\\n"]\n',
    );
    expect(await readConfigFile(file, schema)).toEqual({
      motivation: `template:${join(folder, 'a.txt')}/full@0,template:${join(folder, 'b/c.txt')}@10,none@20`,
      learnUnder: `same/template:${join(folder, 'a.txt')}`,
      hintFailed: 'template:/d.txt',
      evaluateMotivations: ['none', `template:${join(folder, 'a.txt')}`],
      curriculum: `data=${join(folder, 'easy.jsonl')},${join(folder, 'hard.parquet')}`,
      hints: [join(folder, 'one.txt'), join(folder, 'two.txt')],
      prompts: join(folder, 'p.txt'),
      stop: ['a,b', '\n'],
    });
    const steps = write('steps.yaml', 'curriculum: data=easy.jsonl@0,hard.jsonl@5\n');
    expect((await readConfigFile(steps, schema)).curriculum).toBe(
      `data=${join(folder, 'easy.jsonl')}@0,${join(folder, 'hard.jsonl')}@5`,
    );
    const other = write('other.YAML', 'curriculum: people=2,3\n');
    expect((await readConfigFile(other, trainSchema(knightsAndKnaves as never))).curriculum).toBe(
      'people=2,3',
    );
  });

  test('a template that lies in the current folder alone is found there, with a notice', async () => {
    const name = 'biome.json';
    const file = write('there.yaml', `motivation: template:${name}\n`);
    const told: string[] = [];
    const written = process.stderr.write;
    process.stderr.write = ((text: string) => told.push(text) > 0) as typeof process.stderr.write;
    try {
      expect((await readConfigFile(file, trainSchema(undefined))).motivation).toBe(
        `template:${resolve(name)}`,
      );
      expect(told.join('')).toContain(`write ${relative(folder, name)}, as paths in a config file`);
      told.length = 0;
      write(name, 'beside the config');
      expect((await readConfigFile(file, trainSchema(undefined))).motivation).toBe(
        `template:${join(folder, name)}`,
      );
      expect(told).toEqual([]);
    } finally {
      process.stderr.write = written;
    }
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
