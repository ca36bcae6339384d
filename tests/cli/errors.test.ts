import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, test } from '@jest/globals';
import { lettersTask, merf, root, tinyModel } from './run.js';

let folder: string;
beforeAll(() => {
  folder = mkdtempSync(join(tmpdir(), 'merf-cli-'));
});
afterAll(() => rmSync(folder, { recursive: true, force: true }));

function write(name: string, text: string): string {
  const path = join(folder, name);
  writeFileSync(path, text);
  return path;
}

/** Expects the command to fail with that exit code and one clear line, no stack. */
async function fails(args: readonly string[], code: number, ...patterns: RegExp[]) {
  const result = await merf(args);
  expect(
    result.stderr
      .trim()
      .split('\n')
      .filter((line) => /^\s+at /.test(line)),
  ).toEqual([]);
  for (const pattern of patterns) expect(result.stderr).toMatch(pattern);
  expect(result.code).toBe(code);
  return result;
}

describe('help', () => {
  test('names the commands and, of each, its flags with their defaults', async () => {
    const { stdout, code } = await merf(['--help']);
    expect(code).toBe(0);
    for (const command of [
      'train',
      'sft',
      'evaluate',
      'sample',
      'prompt',
      'verify',
      'tasks',
      'bench',
      'doctor',
    ]) {
      expect(stdout).toMatch(new RegExp(`^ +${command} `, 'm'));
    }
    const train = await merf(['train', '--help']);
    expect(train.code).toBe(0);
    expect(train.stdout).toMatch(/Rollout:[\s\S]*--group-size <n> .*default: 8/);
    expect(train.stdout).toMatch(/--motivation <value>/);
    expect(train.stdout).toMatch(/Examples:/);
  });
});

describe('usage errors exit with 2', () => {
  test.each([
    [['trian'], /unknown command 'trian'[\s\S]*train/],
    [['train', '--step', '3'], /unknown option '--step'[\s\S]*--steps/],
    [['train', '--steps', 'many'], /'many' is invalid[\s\S]*number/],
    [['train', '--loss', 'ppo'], /'ppo' is invalid[\s\S]*grpo/],
    [['train', '--people', '3'], /unknown option '--people'[\s\S]*option of the task knights-and-knaves/],
    [['train', '--task', 'countdown', '--people', '3'], /unknown option '--people'/],
    [['sample'], /--prompt/],
  ])('%j', async (args, pattern) => {
    await fails(args, 2, pattern);
  });
});

describe('config files', () => {
  const train = (file: string, ...flags: string[]) => [
    'train',
    '--config',
    file,
    '--out',
    join(folder, 'x'),
    ...flags,
  ];

  test('an unknown key is named, in the way it was written, with the nearest that exists', async () => {
    const yaml = write('c.yaml', 'task: knights-and-knaves\nlerning_rate: 1\n');
    await fails(train(yaml), 1, /c\.yaml.*unknown key "lerning_rate"; did you mean "learning_rate"\?/);
    const typescript = write('c.ts', "export const config = { task: 'knights-and-knaves', grupSize: 4 };\n");
    await fails(train(typescript), 1, /c\.ts.*unknown key "grupSize"; did you mean "groupSize"\?/);
  });

  test('a value of the wrong kind is named with its key', async () => {
    const yaml = write('kind.yaml', 'task: knights-and-knaves\ngroup_size: eight\nlearning_rate: -1\n');
    await fails(train(yaml), 1, /groupSize: .*number.*"eight"/, /learningRate: .*-1/);
  });

  test('a flag goes over the file and is checked too', async () => {
    const yaml = write('flag.yaml', 'task: knights-and-knaves\ngroup_size: 4\n');
    await fails(train(yaml, '--group-size', '1'), 1, /groupSize: .*1/);
  });

  test.each([
    ['list.yaml', '- task\n', /Expected keys and values in .*list\.yaml/],
    ['broken.yaml', 'task: [1, 2\n', /broken\.yaml/],
    ['twice.yaml', 'task: x\ngroup_size: 2\ngroupSize: 4\n', /groupSize stands there twice/],
    ['bare.yaml', 'steps: 3\n', /task/],
  ])('%s', async (name, text, pattern) => {
    await fails(train(write(name, text)), 1, pattern);
  });

  test('a file that is missing or of another kind', async () => {
    await fails(train(join(folder, 'none.yaml')), 1, /none\.yaml/);
    await fails(train(write('c.toml', 'task = 1')), 1, /c\.toml/);
  });
});

describe('what is not there', () => {
  test('a model', async () => {
    await fails(['sample', '--model', join(folder, 'none.gguf'), '--prompt', 'x'], 1, /none\.gguf/);
    await fails(['evaluate', '--task', lettersTask, '--model', join(folder, 'none')], 1, /none/);
  });

  test('a task, a view, a data file, a run', async () => {
    await fails(['prompt', '--task', 'knights', '--model', tinyModel], 1, /knights-and-knaves.*"knights"/);
    await fails(
      ['prompt', '--task', lettersTask, '--model', tinyModel, '--motivation', 'partial:tone'],
      1,
      /tone/,
    );
    await fails(
      ['verify', '--task', lettersTask, '--model', tinyModel, '--data', join(folder, 'no.jsonl')],
      1,
      /no\.jsonl/,
    );
    await fails(['train', '--resume', join(folder, 'never')], 1, /never holds no run/);
  });

  test('the data of a task module', async () => {
    const library = JSON.stringify(join(root, 'lib', 'tasks', 'define.ts'));
    const spec = "{ judge() {}, describe: () => '' }";
    const module = write(
      'no-data.mts',
      `import { defineTask } from ${library};\n` +
        `export const task = defineTask({ name: 'x', spec: ${spec}, data: 'gone.jsonl', messages: () => [] });\n` +
        'await new Promise((resolve) => setTimeout(resolve, 200));\n',
    );
    await fails(['prompt', '--task', module, '--model', tinyModel], 1, /^merf: .*gone\.jsonl/);
  });

  test('a truncated model', async () => {
    const cut = write('cut.gguf', `GGUF${'\x03\x00\x00\x00'}`);
    await fails(['sample', '--model', cut, '--prompt', 'x'], 1, /cut\.gguf/);
  });
});

describe('prompt', () => {
  test('prints what the model sees, with the rules or without', async () => {
    const args = ['prompt', '--task', lettersTask, '--model', tinyModel];
    const full = await merf([...args, '--motivation', 'full']);
    expect(full.stderr).toBe('');
    expect(full.code).toBe(0);
    expect(full.stdout).toContain('the share of letters');
    const none = await merf([...args, '--motivation', 'none']);
    expect(none.stdout).not.toContain('the share of letters');
    expect(none.stdout).toMatch(/<\|im_start\|>user\n[a-z]{5}<\|im_end\|>\n<\|im_start\|>assistant\n$/);
  });

  test('of an adaptive motivation it prints what the first step shows, and says what becomes of it', async () => {
    const args = ['prompt', '--task', lettersTask, '--model', tinyModel];
    const { code, stdout, stderr } = await merf([...args, '--motivation', 'adaptive']);
    expect(stderr).toBe('');
    expect(code).toBe(0);
    expect(stdout).toMatch(
      /^An adaptive motivation [\s\S]*withdrawn;[\s\S]*7 of 8 completions under full[\s\S]*1 of 8 completions under none/,
    );
    expect(stdout.match(/the share of letters/g)).toHaveLength(1);
    await fails(
      ['evaluate', '--task', lettersTask, '--model', tinyModel, '--motivation', 'adaptive'],
      1,
      /motivation/,
    );
  });
});

describe('control characters', () => {
  const clear = '\x1b[2J';

  test('of a file name, a flag and a data row are written out, in errors and in what is printed', async () => {
    const absent = await merf(['sample', '--model', join(folder, `${clear}.gguf`), '--prompt', 'x']);
    expect(absent.stderr).toContain('\\x1b[2J.gguf');
    const flag = await merf(['sample', `--${clear}`]);
    const args = ['--task', lettersTask, '--model', tinyModel];
    const data = write(
      'hostile.jsonl',
      `{"word": "a${JSON.stringify(clear).slice(1, -1)}"}\nno ${clear} json\n`,
    );
    const verified = await merf(['verify', ...args, '--data', data]);
    const prompt = await merf(['prompt', ...args, '--data', data, '--motivation', 'none']);
    for (const { stdout, stderr } of [absent, flag, verified, prompt]) {
      expect(stdout + stderr).not.toContain('\x1b');
    }
  }, 240_000);

  test('of a prompt are said to be written out, and left as they are by --verbatim', async () => {
    const data = write('row.jsonl', `{"word": "a${JSON.stringify(clear).slice(1, -1)}"}\n`);
    const args = [
      'prompt',
      '--task',
      lettersTask,
      '--model',
      tinyModel,
      '--data',
      data,
      '--motivation',
      'none',
    ];
    const shown = await merf(args);
    expect(shown.stdout).toContain('user\na\\x1b[2J');
    expect(shown.stderr).toMatch(/written out; --verbatim/);
    const verbatim = await merf([...args, '--verbatim']);
    expect(verbatim.stdout).toContain(`user\na${clear}`);
    expect(verbatim.stderr).toBe('');
  }, 120_000);
});

describe('verify', () => {
  test('exits with 0 for a sound data set and with 1 and the rows for another', async () => {
    const args = ['verify', '--task', lettersTask, '--model', tinyModel, '--max-tokens', '16', '--data'];
    const sound = await merf([...args, write('sound.jsonl', '{"word": "larch"}\n{"word": "maple"}\n')]);
    expect(sound.stdout).toMatch(/2 rows[\s\S]*Nothing is off/);
    expect(sound.code).toBe(0);
    const off = await merf([...args, write('off.jsonl', '{"word": "larch"}\nnot json\n{"word": "larch"}\n')]);
    expect(off.stdout).toMatch(/line 2[\s\S]*line 3: it has the prompt of .*line 1/);
    expect(off.code).toBe(1);
  });
});
