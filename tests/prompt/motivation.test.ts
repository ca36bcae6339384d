import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { describe, expect, test } from '@jest/globals';
import { MerfError } from '../../lib/errors.js';
import '../../lib/node-host.js';
import {
  formatMotivation,
  parseLearnUnder,
  parseMotivation,
  parseMotivationView,
  stageAt,
  viewOf,
  withMotivation,
} from '../../lib/prompt/motivation.js';

function codeOf(run: () => unknown): [string, string] {
  try {
    run();
  } catch (error) {
    if (error instanceof MerfError) return [error.code, error.message];
  }
  throw new Error('Expected a MerfError');
}

describe('parseMotivation', () => {
  test.each([
    ['none', ['none']],
    ['full', ['full']],
    ['adverse', ['adverse']],
    ['partial:correctness', [{ partial: ['correctness'] }]],
    ['partial:correctness+format', [{ partial: ['correctness', 'format'] }]],
    ['full/none', ['full', 'none']],
    ['full/full/none', ['full', 'full', 'none']],
    ['partial:format/adverse', [{ partial: ['format'] }, 'adverse']],
  ])('%s', (text, views) => {
    expect(parseMotivation(text)).toEqual([{ step: 0, value: views }]);
    expect(formatMotivation(parseMotivation(text)[0]?.value ?? 'none')).toBe(text);
  });

  test('reads schedules of views and mixes', () => {
    expect(parseMotivation('full@0,none@100')).toEqual([
      { step: 0, value: ['full'] },
      { step: 100, value: ['none'] },
    ]);
    expect(parseMotivation('full/none@0, none@30')).toEqual([
      { step: 0, value: ['full', 'none'] },
      { step: 30, value: ['none'] },
    ]);
  });

  test('reads a template from a file', () => {
    const folder = mkdtempSync(join(tmpdir(), 'merf-motivation-'));
    const file = join(folder, 'words.txt');
    writeFileSync(file, 'Mind this: {{rules}}');
    const template = { template: 'Mind this: {{rules}}' };
    expect(parseMotivation(`template:${file}`)).toEqual([{ step: 0, value: [template] }]);
    // The path's own slashes divide no mix.
    expect(parseMotivation(`none/template:${file}/full`)).toEqual([
      { step: 0, value: ['none', template, 'full'] },
    ]);
    rmSync(folder, { recursive: true });
    const [code, message] = codeOf(() => parseMotivation(`template:${file}`));
    expect(code).toBe('FILE_NOT_FOUND');
    expect(message).toContain(file);
  });

  test.each([
    ['fulll', 'fulll'],
    ['', '"none", "full"'],
    ['partial:', 'partial:'],
    ['partial:a++b', 'partial:a++b'],
    ['full/nonee', 'full/nonee'],
    ['full/', 'full/'],
    ['same', 'same'],
    ['full,none@3', 'VIEW@STEP'],
    ['full@5,none@9', 'step 0'],
    ['full@0,none@0', 'ascending'],
    ['full@0,adverse@9,none@4', 'ascending'],
  ])('refuses %j', (text, part) => {
    const [code, message] = codeOf(() => parseMotivation(text));
    expect(code).toBe('INVALID_ARGUMENT');
    expect(message).toContain(part);
  });
});

test('parseMotivationView takes one view alone', () => {
  expect(parseMotivationView('partial:format')).toEqual({ partial: ['format'] });
  for (const text of ['full/none', 'full@0,none@3']) {
    expect(codeOf(() => parseMotivationView(text))[1]).toContain('one view');
  }
});

test('parseLearnUnder reads same, both, views, several and schedules', () => {
  expect(parseLearnUnder('same')).toEqual([{ step: 0, value: ['same'] }]);
  expect(parseLearnUnder('both')).toEqual([{ step: 0, value: ['same', 'none'] }]);
  expect(parseLearnUnder('both/full@0,none@9')).toEqual([
    { step: 0, value: ['same', 'none', 'full'] },
    { step: 9, value: ['none'] },
  ]);
  const [code, message] = codeOf(() => parseLearnUnder('sames'));
  expect(code).toBe('INVALID_ARGUMENT');
  expect(message).toMatch(/"same", "both".* for learnUnder but received "sames"/);
});

test('stageAt follows the schedule', () => {
  const schedule = parseMotivation('full@0,partial:format@10,none@20');
  expect([0, 9, 10, 19, 20, 1000].map((step) => stageAt(schedule, step))).toEqual([
    ['full'],
    ['full'],
    [{ partial: ['format'] }],
    [{ partial: ['format'] }],
    ['none'],
    ['none'],
  ]);
});

test('viewOf divides a group in the shares of the mix', () => {
  const divided = (text: string, n: number) =>
    Array.from({ length: n }, (_, i) =>
      formatMotivation(viewOf(parseMotivation(text)[0]?.value ?? [], i, n)),
    );
  expect(divided('full/none', 4)).toEqual(['full', 'full', 'none', 'none']);
  expect(divided('full/full/none', 8)).toEqual([...Array(6).fill('full'), 'none', 'none']);
  expect(divided('none', 2)).toEqual(['none', 'none']);
});

test('withMotivation ends the system message with a paragraph of its own', () => {
  const user = { role: 'user', content: 'Question' };
  const system = { role: 'system', content: 'Base.\n' };
  expect(withMotivation([system, user], 'Rules.')).toEqual([
    { role: 'system', content: 'Base.\n\nRules.' },
    user,
  ]);
  expect(withMotivation([user], 'Rules.')).toEqual([{ role: 'system', content: 'Rules.' }, user]);
  expect(withMotivation([system, user], '')).toEqual([system, user]);
});
