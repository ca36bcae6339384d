import { describe, expect, test } from '@jest/globals';
import { Command } from 'commander';
import { z } from 'zod';
import { addFlags, describeOptions, list, texts } from '../../lib/cli/flags.js';
import { setting } from '../../lib/settings.js';
import { grpoSchema } from '../../lib/train/settings.js';

function parse(args: readonly string[]): Record<string, unknown> {
  const command = new Command().exitOverride();
  addFlags(command, grpoSchema.shape);
  return command.parse([...args], { from: 'user' }).opts();
}

/** What `run` writes to the standard error. */
function told(run: () => void): string {
  const write = process.stderr.write;
  let text = '';
  process.stderr.write = ((part: string) => {
    text += part;
    return true;
  }) as typeof process.stderr.write;
  try {
    run();
  } finally {
    process.stderr.write = write;
  }
  return text;
}

describe('stop strings', () => {
  test('stand as they are, in JSON or one after another', () => {
    expect(parse(['--stop', '\n\n', '--stop', ' END '])).toEqual({ stop: ['\n\n', ' END '] });
    expect(parse(['--stop', '"\\n\\n"', '--stop', '["a,b", "\\t"]'])).toEqual({
      stop: ['\n\n', 'a,b', '\t'],
    });
    expect(parse(['--stop', '[', '--stop', '"', '--stop', '\\boxed{'])).toEqual({
      stop: ['[', '"', '\\boxed{'],
    });
  });

  test('one with a comma is one string, which is said unless JSON says so', () => {
    let stop: unknown;
    expect(told(() => ({ stop } = parse(['--stop', 'a, b'])))).toBe(
      'merf: --stop "a, b" is one string, comma included: give --stop once for each string\n',
    );
    expect(stop).toEqual(['a, b']);
    expect(told(() => ({ stop } = parse(['--stop', '["a, b"]'])))).toBe('');
    expect(stop).toEqual(['a, b']);
    expect(told(() => texts('stop')('END', undefined))).toBe('');
  });
});

test('other lists are parts between commas or JSON', () => {
  expect(list('none, full')).toEqual(['none', 'full']);
  expect(list('["template:a,b.txt", "none"]')).toEqual(['template:a,b.txt', 'none']);
  expect(list('[not, JSON')).toEqual(['[not', 'JSON']);
  expect(parse(['--pass-at', '[1, 4]']).passAt).toEqual([1, 4]);
  expect(parse(['--pass-at', '1,4']).passAt).toEqual([1, 4]);
});

test('what an inner schema says of a setting holds for the optional one around it', () => {
  const inner = setting(z.string(), { description: 'of the inner one', path: true });
  expect(
    describeOptions({ file: inner.optional(), other: inner.default('x').meta({ description: 'outer' }) }),
  ).toEqual([
    { key: 'file', flag: '--file <value>', description: 'of the inner one' },
    { key: 'other', flag: '--other <value>', description: 'outer (default: x)' },
  ]);
});
