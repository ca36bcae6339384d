import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { describe, expect, test } from '@jest/globals';
import { MerfError } from '../../lib/errors.js';
import {
  formatMotivation,
  motivationAt,
  parseMotivation,
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
    ['none', 'none'],
    ['full', 'full'],
    ['adverse', 'adverse'],
    ['partial:correctness', { partial: ['correctness'] }],
    ['partial:correctness+format', { partial: ['correctness', 'format'] }],
    [
      'full@0,none@100',
      [
        { view: 'full', step: 0 },
        { view: 'none', step: 100 },
      ],
    ],
    ['full@0', [{ view: 'full', step: 0 }]],
  ])('%s', (text, expected) => {
    const motivation = parseMotivation(text);
    expect(motivation).toEqual(expected);
    expect(formatMotivation(motivation)).toBe(text);
  });

  test('reads a template from a file', () => {
    const folder = mkdtempSync(join(tmpdir(), 'merf-motivation-'));
    const file = join(folder, 'words.txt');
    writeFileSync(file, 'Mind this: {{rules}}');
    expect(parseMotivation(`template:${file}`)).toEqual({ template: 'Mind this: {{rules}}' });
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

test('motivationAt follows the schedule', () => {
  const schedule = parseMotivation('full@0,partial:format@10,none@20');
  expect([0, 9, 10, 19, 20, 1000].map((step) => motivationAt(schedule, step))).toEqual([
    'full',
    'full',
    { partial: ['format'] },
    { partial: ['format'] },
    'none',
    'none',
  ]);
  expect(motivationAt('adverse', 7)).toBe('adverse');
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
