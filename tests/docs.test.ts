// What README, CONTRIBUTING and docs/ say is true of the sources: their TypeScript compiles, and the commands, flags,
// files and tasks that they name exist.
import { spawnSync } from 'node:child_process';
import { existsSync, mkdirSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { dirname, join, relative } from 'node:path';
import { afterAll, describe, expect, test } from '@jest/globals';
import { merfErrorCodes } from '../lib/errors.js';
import { taskNames } from '../lib/tasks/index.js';
import { merf, root } from './cli/run.js';

const files = [
  'README.md',
  'CONTRIBUTING.md',
  'models/merf-mini/README.md',
  ...readdirSync(join(root, 'docs'))
    .filter((name) => name.endsWith('.md'))
    .map((name) => `docs/${name}`),
];
const texts = new Map(files.map((file) => [file, readFileSync(join(root, file), 'utf8')]));

/** The fenced blocks of a language in all files, with the line on which each begins. */
function blocks(language: string): { file: string; line: number; text: string }[] {
  return [...texts].flatMap(([file, text]) =>
    [...text.matchAll(/^ *```(\w*)\n([\s\S]*?)^ *```$/gm)]
      .filter(([, given]) => given === language)
      .map((match) => ({
        file,
        line: text.slice(0, match.index).split('\n').length + 1,
        text: match[2] as string,
      })),
  );
}

/** Code between single backticks, in which a line may break. */
function inlineCode(text: string): string[] {
  const prose = text.replace(/^ *```[\s\S]*?^ *```$/gm, '');
  return [...prose.matchAll(/`([^`]+)`/g)].map(([, code]) => (code as string).replace(/\s+/g, ' '));
}

/** The command lines of shell blocks and of code in running text, without comments. */
function commandLines(): string[] {
  const shell = blocks('sh').flatMap(({ text }) => text.replaceAll('\\\n', ' ').split('\n'));
  const inline = [...texts.values()].flatMap(inlineCode);
  return [...shell, ...inline].map((line) => line.replace(/\s+# .*$/, '').trim());
}

test('TypeScript blocks compile', () => {
  const folder = join(root, 'build', 'docs');
  rmSync(folder, { recursive: true, force: true });
  mkdirSync(folder, { recursive: true });
  const found = blocks('ts');
  for (const [i, { file, line, text }] of found.entries()) {
    const name = `${String(i).padStart(2, '0')}-${file.replace(/\W/g, '-')}-${line}.ts`;
    writeFileSync(join(folder, name), `${text}\nexport {};\n`);
  }
  const up = relative(folder, root);
  writeFileSync(
    join(folder, 'tsconfig.json'),
    JSON.stringify({
      extends: `${up}/tsconfig.json`,
      compilerOptions: {
        noUnusedLocals: false,
        paths: {
          merf: [`${up}/lib/index.ts`],
          'merf/kernels': [`${up}/lib/kernels/index.ts`],
          'merf/reward': [`${up}/lib/reward.ts`],
        },
        typeRoots: [`${up}/node_modules/@types`],
      },
      include: ['.'],
    }),
  );
  writeFileSync(join(folder, 'package.json'), '{ "type": "module" }');
  const tsc = join(root, 'node_modules', 'typescript', 'bin', 'tsc');
  const { stdout } = spawnSync(process.execPath, [tsc, '-p', folder], { encoding: 'utf8' });
  expect(stdout).toBe('');
  expect(found.length).toBeGreaterThan(3);
}, 120_000);

describe('commands', () => {
  interface Call {
    command: string;
    task: string | undefined;
    flags: Set<string>;
  }
  const calls = new Map<string, Call>();
  for (const line of commandLines()) {
    for (const [, rest] of line.matchAll(/^(?:npx )?merf ([^|;]+)/g)) {
      const words = (rest as string).trim().split(/\s+/);
      const command = (words[0] as string).startsWith('-') ? '' : (words[0] as string);
      if (command === 'COMMAND') continue;
      const named = words[words.indexOf('--task') + 1];
      // The module of the README's own example does not exist; any task stands for it.
      const task = words.includes('--task') && !named?.startsWith('./') ? named : undefined;
      const key = `${command} ${task}`;
      const call = calls.get(key) ?? { command, task, flags: new Set() };
      for (const word of words) {
        const flag = /^(--[a-z][a-z-]*)/.exec(word)?.[1];
        if (flag !== undefined && !(named?.startsWith('./') && flag === '--largest')) call.flags.add(flag);
      }
      calls.set(key, call);
    }
  }

  const withFlags = [...calls.values()].filter(({ flags }) => flags.size > 0);
  test.each(withFlags.map((call) => [`merf ${call.command} (task: ${call.task})`, call] as const))(
    '%s has the flags that are given to it',
    async (_, { command, task, flags }) => {
      const args = [...(command ? [command] : []), ...(task ? ['--task', task] : []), '--help'];
      const { code, stdout, stderr } = await merf(args);
      expect({ code, stderr }).toEqual({ code: 0, stderr: '' });
      expect(stdout).toContain(`Usage: merf ${command || '[options]'}`);
      for (const flag of flags) expect(stdout).toMatch(new RegExp(`${flag}\\b`));
    },
    60_000,
  );

  test('are commands of merf, of which the README names all', async () => {
    const { stdout } = await merf(['--help']);
    const list = (stdout.split('Commands:\n')[1] as string).split('\n\n')[0] as string;
    const commands = [...list.matchAll(/^ {2}(\w+)/gm)].map(([, name]) => name as string);
    const known = commands.filter((name) => name !== 'help');
    const rows = [...(texts.get('README.md') as string).matchAll(/^\| `merf (\w+)` \|/gm)];
    expect(rows.map(([, name]) => name).sort()).toEqual(known.sort());
    for (const { command } of calls.values()) if (command) expect(known).toContain(command);
  });

  test('of npm are scripts of the package', () => {
    const { scripts } = JSON.parse(readFileSync(join(root, 'package.json'), 'utf8')) as {
      scripts: Record<string, string>;
    };
    const named = commandLines().flatMap((line) => [...line.matchAll(/\bnpm run ([\w:-]+)/g)]);
    expect(named.length).toBeGreaterThan(5);
    for (const [, script] of named) expect(Object.keys(scripts)).toContain(script);
  });
});

test('files and links exist', () => {
  const missing: string[] = [];
  for (const [file, text] of texts) {
    const links = [...text.matchAll(/\]\(([^)#:]+)\)/g)].map(([, to]) => join(dirname(file), to as string));
    const paths = inlineCode(text).flatMap(
      (code) =>
        /^(?:lib|native|bindings|benchmarks|scripts|tests|examples|models)\/[\w./-]+/.exec(code) ?? [],
    );
    for (const path of [...links, ...paths]) {
      if (!existsSync(join(root, path))) missing.push(`${file}: ${path}`);
    }
  }
  expect(missing).toEqual([]);
});

test('the page on errors has every code, and no other', () => {
  const page = texts.get('docs/errors.md') as string;
  const sections = [...page.matchAll(/^### (.+)\n\n([\s\S]*?)(?=\n##|(?![\s\S]))/gm)];
  expect(sections.map(([, code]) => code).sort()).toEqual([...merfErrorCodes].sort());
  for (const [, code, text] of sections)
    expect([code, (text as string).trim().length > 60]).toEqual([code, true]);
});

test('the README lists every task', () => {
  for (const name of taskNames()) expect(texts.get('README.md')).toContain(`| \`${name}\` |`);
});

describe('the drawing of the mask', () => {
  const text = texts.get('docs/architecture.md') as string;
  const row = (name: string) => {
    const line = new RegExp(`^${name} +(.*)$`, 'm').exec(text)?.[1] as string;
    return line.trim().split(/ +/);
  };

  test('is that of its visibleUntil', () => {
    const until = row('visibleUntil').map(Number);
    const tokens = row('token');
    const drawn = [...text.matchAll(/^(?:query)? +(\d+) {2}(\w) {3}([#.](?: {2}[#.])+)$/gm)];
    expect(drawn.map(([, index, token]) => [Number(index), token])).toEqual([...tokens.entries()]);
    for (const [, index, , marks] of drawn) {
      const i = Number(index);
      const expected = until.map((end, j) => (j <= i && i < end ? '#' : '.')).join('  ');
      expect({ i, marks }).toEqual({ i, marks: expected });
    }
  });
});

test('folders of lib import from those above them in the list', () => {
  const architecture = texts.get('docs/architecture.md') as string;
  const [, list] = /`lib\/`, from the bottom up[\s\S]*?\| --- \| --- \|\n([\s\S]*?)\n\n/.exec(
    architecture,
  ) as string[];
  const order = (list as string).split('\n').map((line) => inlineCode(line.split('|')[1] as string));
  const rankOf = (name: string) => order.findIndex((names) => names.includes(name));
  const wrong: string[] = [];
  for (const entry of readdirSync(join(root, 'lib'), { recursive: true, encoding: 'utf8' })) {
    if (!entry.endsWith('.ts') || entry === 'index.ts') continue;
    const from = entry.split('/')[0] as string;
    if (rankOf(from) < 0) wrong.push(`${from} is not in the list`);
    for (const [, path] of readFileSync(join(root, 'lib', entry), 'utf8').matchAll(
      / from '(\.\.?\/[^']+)'/g,
    )) {
      const imported = join(dirname(entry), path as string).replace(/\.js$/, '.ts');
      const to = imported.split('/')[0] as string;
      if (to !== from && rankOf(to) >= rankOf(from)) wrong.push(`${entry} imports ${imported}`);
    }
  }
  expect(wrong).toEqual([]);
});

afterAll(() => rmSync(join(root, 'build', 'docs'), { recursive: true, force: true }));
