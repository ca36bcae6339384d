import { spawn } from 'node:child_process';
import { fileURLToPath } from 'node:url';
import { beforeAll, describe, expect, test } from '@jest/globals';

interface Outcome {
  code?: string;
  message?: string;
  asked: number;
  seconds: number;
}

let results: Record<string, Outcome>;
let ended: { code: number | null; stderr: string };

beforeAll(async () => {
  const script = fileURLToPath(new URL('./hostile-verifiers.ts', import.meta.url));
  const child = spawn(process.execPath, ['--import', import.meta.resolve('tsx'), script], {
    stdio: ['ignore', 'pipe', 'pipe'],
  });
  const timer = setTimeout(() => child.kill('SIGKILL'), 110_000);
  let stdout = '';
  let stderr = '';
  child.stdout.on('data', (text) => {
    stdout += text;
  });
  child.stderr.on('data', (text) => {
    stderr += text;
  });
  const code = await new Promise<number | null>((resolve) => child.on('close', resolve));
  clearTimeout(timer);
  ended = { code, stderr };
  expect({ stdout: stdout.slice(0, 2), stderr }).toMatchObject({ stdout: '{"' });
  results = JSON.parse(stdout) as Record<string, Outcome>;
}, 120_000);

// 16 completions with a limit of half a second each: one limit and the grace of the watch, not the 8 s of all of them.
describe('a step ends with its first verifier that hangs', () => {
  test.each([
    'synchronous',
    'behind an await',
    'behind a timer',
    'a regular expression behind an await',
    'microtasks without an end',
    'a getter',
  ])('%s', (name) => {
    const { code, message, seconds } = results[name] as Outcome;
    expect(code).toBe('VERIFIER_TIMEOUT');
    expect(message).toMatch(/^The verifier of judge \(reward hostile, row \d+\) took longer than 0\.5 s$/);
    console.log(`measured: ${name}: ${seconds.toFixed(2)} s`);
    expect(seconds).toBeLessThan(7);
  });

  test('after a synchronous one nothing more is judged', () => {
    expect(results.synchronous?.asked).toBe(1);
    expect(results['a getter']?.asked).toBe(1);
    expect(results.environments?.asked).toBe(1);
  });

  test('loops that are cut off are said', () => {
    expect(ended.stderr.match(/mostly a loop behind an await, is cut off/g)).toHaveLength(4);
  });
});

test.each(['exit', 'exit behind a timer'])('process.exit, as in %s, is a failure of the verifier', (name) => {
  expect(results[name]).toMatchObject({
    code: 'VERIFIER_FAILED',
    message: expect.stringMatching(
      /^The verifier of judge \(reward hostile, row \d+\) called process\.exit\(0\)$/,
    ),
  });
});

test('what is left of the process works, and still ends by a signal', () => {
  expect(results['nothing wrong']).toMatchObject({ asked: 16 });
  expect(results['nothing wrong']?.code).toBeUndefined();
  expect(ended.code).toBe(7);
});
