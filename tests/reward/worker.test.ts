import { spawn } from 'node:child_process';
import { writeFileSync } from 'node:fs';
import { mkdtemp } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { describe, expect, test } from '@jest/globals';
import { inWorker, type MerfError, parseCompletion, RewardSpec } from 'merf';

const module = new URL('./worker-verifiers.js', import.meta.url);
const ask = (text: string) => parseCompletion({ raw: text });
const context = (cases = {}) => ({ cases, signal: new AbortController().signal });

/** A reward whose one component is judged by `worker-verifiers.ts` in a thread. */
function reward(timeoutSeconds: number, threads = 1) {
  return new RewardSpec<object>({
    name: 'threads',
    timeoutSeconds,
    components: [
      {
        name: 'correctness',
        cases: [
          { name: 'right', score: 1, sentence: 'if it is right' },
          { name: 'wrong', score: 0, sentence: 'otherwise' },
        ],
        verify: inWorker<object>(module, 'verify', { threads }),
      },
    ],
  });
}

async function rejection(promise: Promise<unknown>): Promise<MerfError> {
  return promise.then(
    () => {
      throw new Error('Expected a rejection');
    },
    (error: MerfError) => error,
  );
}

describe('inWorker', () => {
  test.each(['loop', 'loop after await'])(
    'ends a verifier in a %s in time, and goes on',
    async (text) => {
      const spec = reward(3);
      expect((await spec.judge(ask('fine'), {})).total).toBe(1);
      const start = performance.now();
      const error = await rejection(spec.judge(ask(text), {}));
      expect(error.code).toBe('VERIFIER_TIMEOUT');
      expect(performance.now() - start).toBeLessThan(6000);
      expect((await spec.judge(ask('fine'), {})).total).toBe(1);
    },
    60_000,
  );

  test('loses no other verification when one is ended', async () => {
    const verify = inWorker(module, 'verify', { threads: 2, timeoutSeconds: 4 });
    const [looping, ...others] = await Promise.allSettled([
      verify(ask('loop after await'), {}, context()),
      ...Array.from({ length: 6 }, () => verify(ask('sleep'), { milliseconds: 20 }, context())),
    ]);
    expect((looping as PromiseRejectedResult).reason).toMatchObject({
      code: 'VERIFIER_TIMEOUT',
      message: expect.stringMatching(/verify of .*worker-verifiers.ts ran for 4 s/),
    });
    expect(others.map((result) => (result as PromiseFulfilledResult<string>).value)).toEqual(
      Array(6).fill('right'),
    );
  }, 60_000);

  test('leaves the time in the queue out of the limit, and the queue when its signal fires', async () => {
    const verify = inWorker(module, 'verify', { threads: 1, timeoutSeconds: 3 });
    await verify(ask('fine'), {}, context());
    const waiting = new AbortController();
    const jobs = Array.from({ length: 4 }, () => verify(ask('sleep'), { milliseconds: 1000 }, context()));
    const left = rejection(verify(ask('fine'), {}, { cases: {}, signal: waiting.signal }));
    waiting.abort();
    expect((await left).code).toBe('ABORTED');
    expect(await Promise.all(jobs)).toEqual(Array(4).fill('right'));
  }, 60_000);

  test('runs at most so many threads at once, side by side', async () => {
    const verify = inWorker<object, string | number>(module, 'verify', { threads: 2 });
    await Promise.all([verify(ask('fine'), {}, context()), verify(ask('fine'), {}, context())]);
    const threads = async () => {
      const jobs = Array.from({ length: 8 }, async () => {
        await verify(ask('sleep'), { milliseconds: 200 }, context());
        return verify(ask('thread'), {}, context());
      });
      return new Set(await Promise.all(jobs)).size;
    };
    const start = performance.now();
    expect(await threads()).toBe(2);
    const seconds = (performance.now() - start) / 1000;
    expect(seconds).toBeGreaterThanOrEqual(0.75);
    // One after the other they would take 1.6 s, and more for the rest.
    console.log(`measured: 8 verifications that sleep 0.2 s took ${seconds.toFixed(2)} s in 2 threads`);
    expect(seconds).toBeLessThan(1.6);
  }, 60_000);

  test('hands the cases in and errors out', async () => {
    const verify = inWorker<unknown, string>(module, 'verify', { threads: 1 });
    expect(await verify(ask('cases'), {}, context({ format: 'demanded' }))).toBe('demanded');
    const thrown = await rejection(verify(ask('throw'), {}, context()));
    expect(thrown).toMatchObject({ code: 'VERIFIER_FAILED', message: 'the row is odd' });
    const spec = reward(30);
    expect((await rejection(spec.judge(ask('throw'), { id: 7 }))).message).toBe(
      'The verifier of correctness (reward threads, row 7) threw: the row is odd',
    );
    expect((await rejection(verify(ask('exit'), {}, context()))).message).toMatch(/exited with code: 3/);
    expect(await verify(ask('fine'), {}, context())).toBe('right');
  }, 60_000);

  test('says that a row cannot be copied or a verdict is none, and goes on', async () => {
    const verify = inWorker<unknown, string>(module, 'verify', { threads: 1 });
    const uncopied = await rejection(verify(ask('fine'), { solve: () => 1 }, context()));
    expect(uncopied).toMatchObject({
      code: 'VERIFIER_FAILED',
      message: expect.stringMatching(
        /^Expected a completion and a row that structuredClone copies.* could not be cloned/,
      ),
    });
    for (const [text, verdict] of [
      ['object', 'object of type Object'],
      ['function', 'function (anonymous)'],
    ] as const) {
      const { message } = await rejection(verify(ask(text), {}, context()));
      expect(message).toMatch(/^Expected text or a number from verify of .*worker-verifiers.ts but received/);
      expect(message.endsWith(verdict)).toBe(true);
    }
    expect(await verify(ask('fine'), {}, context())).toBe('right');
  }, 60_000);

  test('refuses what it cannot run', async () => {
    expect(() => inWorker('./grade.js', 'verify')).toThrow(/Expected the URL of a file, as new URL/);
    expect(() => inWorker(new URL('https://example.org/a.js'), 'verify')).toThrow(/Expected the URL/);
    expect(() => inWorker(new URL('./absent.js', import.meta.url), 'verify')).toThrow(
      /Cannot run .*absent.js in a worker: there is no such file/,
    );
    expect(() => inWorker(module, '')).toThrow(/Expected the name of a function/);
    expect(() => inWorker(module, 'verify', { threads: 0 })).toThrow(/positive number for threads/);
    expect(() => inWorker(module, 'verify', { threads: 1.5 })).toThrow(/positive integer for threads/);
    expect(() => inWorker(module, 'verify', { timeoutSeconds: -1 })).toThrow(/timeoutSeconds/);
    const error = await rejection(inWorker(module, 'notAFunction')(ask(''), {}, context()));
    expect(error.message).toMatch(
      /Expected .* to export a function notAFunction but it exports notAFunction, verify/,
    );
  }, 60_000);

  test('does not keep the process alive', async () => {
    const folder = await mkdtemp(join(tmpdir(), 'merf-worker-'));
    const script = join(folder, 'main.mts');
    const source = fileURLToPath(new URL('../../lib/reward/worker.ts', import.meta.url));
    writeFileSync(
      script,
      `import { inWorker } from ${JSON.stringify(source)};
       const verify = inWorker(new URL(${JSON.stringify(module.href)}), 'verify', { threads: 2 });
       const signal = new AbortController().signal;
       console.log(await verify({ text: 'fine' }, {}, { cases: {}, signal }));
       console.log('done');`,
    );
    const start = performance.now();
    const child = spawn(process.execPath, ['--import', 'tsx', script], {
      stdio: ['ignore', 'pipe', 'inherit'],
    });
    const timer = setTimeout(() => child.kill('SIGKILL'), 40_000);
    let output = '';
    child.stdout.on('data', (chunk) => {
      output += chunk;
    });
    const code = await new Promise((resolve) => child.on('close', resolve));
    clearTimeout(timer);
    expect(output).toBe('right\ndone\n');
    expect(code).toBe(0);
    // Idle threads end after 60 s by themselves; the process must not have waited for that.
    expect(performance.now() - start).toBeLessThan(40_000);
  }, 60_000);
});
