import { describe, expect, test } from '@jest/globals';
import { type NativeDevice, native } from '../../lib/native.js';
import { config, cpu, long, preamble, request, runScript, sanitized } from './tiny-model.js';

// Large enough that a step takes some hundreds of milliseconds, most of them in generated code.
const large = {
  hiddenSize: 256,
  layers: 4,
  headSize: 64,
  mlpSize: 512,
  vocabSize: 5000,
  rope: { inverseFrequencies: new Float32Array(32).fill(0.1), attentionScale: 1 },
};

describe('a process that ends in the midst of a step', () => {
  const ways: Record<string, string> = {
    'process.exit': 'process.exit(7)',
    'process.exit without listeners': "process.removeAllListeners('exit'); process.exit(7)",
    'process.reallyExit': 'process.reallyExit(7)',
    'a listener that throws': `process.prependListener('exit', () => { throw new Error('mine'); }); process.exit(7)`,
    'an uncaught error': "process.on('exit', () => { process.exitCode = 7; }); throw new Error('mine')",
  };
  const names = Object.keys(ways);
  const kills = long ? 50 : 10;

  test(
    'does so with its exit code, at whatever moment',
    async () => {
      const script = `${preamble(large, 0)}
        const often = async () => { await model.initialize(1n, 0.05); for (;;) await train(); };
        often();`;
      const wrong: string[] = [];
      for (let i = 0; i < kills; ++i) {
        const name = names[i % names.length] as string;
        // The moments are spread over the first seconds, loading included.
        const delay = Math.floor(((i * 0.618034) % 1) * (sanitized ? 4000 : 1200));
        const end = `setTimeout(() => { ${ways[name]} }, ${delay});`;
        const { status, signal, stderr } = await runScript(`${script}\n${end}`);
        if (signal !== null || status !== 7 || stderr.includes('Sanitizer')) {
          wrong.push(`${name} after ${delay} ms: ${signal ?? status} ${stderr.slice(0, 2000)}`);
        }
      }
      expect(wrong).toEqual([]);
    },
    20_000 * kills,
  );

  test('does not wait for a kernel that takes minutes', async () => {
    const { status, signal, stdout } = await runScript(`${preamble()}
      const device = addon.openDevice({ name: 'cpu', threads: 0 });
      const T = 200000;
      const make = () => device.tensor(null, [T, 1, 64], 'f32');
      device.attention({ q: make(), k: make(), v: make(), visibleUntil: new Int32Array(T).fill(T) });
      setTimeout(() => {
        const asked = Date.now();
        process.on('exit', () => console.log('exit'));
        process.reallyExit(7);
      }, 300);`);
    expect({ status, signal, stdout }).toEqual({ status: 7, signal: null, stdout: '' });
  }, 60_000);
});

describe('memory', () => {
  const steps = 1000;
  const warmup = 300;

  test(`is level over ${steps} steps`, async () => {
    const { status, stdout, stderr } = await runScript(
      `${preamble()}
      const measure = () => { gc(); return { rss: process.memoryUsage.rss(), used: model.memory().used }; };
      (async () => {
        await model.initialize(1n, 0.3);
        for (let i = 0; i < ${warmup}; ++i) await train();
        const before = measure();
        for (let i = 0; i < ${steps}; ++i) await train();
        const after = measure();
        console.log(JSON.stringify({ rss: after.rss - before.rss, used: after.used - before.used }));
      })();`,
      ['--expose-gc'],
    );
    expect(stderr).toBe('');
    expect(status).toBe(0);
    const { rss, used } = JSON.parse(stdout) as { rss: number; used: number };
    expect(used).toBe(0);
    // A step that lost as much as 8 KiB would lose 8 MB.
    if (!sanitized) expect(rss).toBeLessThan(8e6);
  }, 300_000);

  test('comes back with models that are disposed of, and with those that are dropped', async () => {
    const { status, stdout, stderr } = await runScript(
      `${preamble()}
      const make = () => addon.createModel({ ...config, mlpSize: 4096, vocabSize: 20000 }, cpu, true);
      const turn = () => new Promise((done) => setTimeout(done, 20));
      (async () => {
        await model.initialize(1n, 0.3);
        const used = () => model.memory().used;
        const before = used();
        // A function, so that nothing keeps the last one.
        const use = async (dropped) => {
          const other = make();
          await other.initialize(1n, 0.3);
          if (!dropped) other.dispose();
        };
        for (let i = 0; i < 20; ++i) await use(i % 2 === 0);
        for (let i = 0; i < 5; ++i) { gc(); await turn(); }
        await model.initialize(1n, 0.3);
        console.log(used() - before);
      })();`,
      ['--expose-gc'],
    );
    expect(stderr).toBe('');
    expect(status).toBe(0);
    expect(Number(stdout)).toBeLessThan(1e6);
  }, 120_000);

  test('of 10,000 tensors that are dropped does not add up', async () => {
    const { status, stdout, stderr } = await runScript(`${preamble()}
      const device = addon.openDevice({ name: 'cpu', threads: 0 });
      const data = new Float32Array(1 << 16);
      (async () => {
        let most = 0;
        for (let i = 0; i < 10000; ++i) {
          await device.tensor(data, [1 << 16], 'f32').read();
          most = Math.max(most, model.memory().used);
        }
        console.log(most);
      })();`);
    expect(stderr).toBe('');
    expect(status).toBe(0);
    // All of them are 2.6 GB.
    expect(Number(stdout)).toBeLessThan(600e6);
  }, 300_000);
});

describe('long work can be cancelled', () => {
  const cancelAfter = async (
    milliseconds: number,
    start: (cancel: ReturnType<typeof token>) => Promise<unknown>,
  ) => {
    const cancel = token();
    const working = start(cancel).then(
      () => 'done',
      (error: { code: string }) => error.code,
    );
    await new Promise((done) => setTimeout(done, milliseconds));
    const asked = performance.now();
    native().cancel(cancel);
    return { outcome: await working, waited: performance.now() - asked };
  };
  const token = () => native().createCancelToken();

  const attention = (device: NativeDevice, tokens: number) => {
    const make = () => device.tensor(null, [tokens, 1, 64], 'f32');
    const [q, k, v, out, dout] = [make(), make(), make(), make(), make()];
    const lse = device.tensor(null, [1, tokens], 'f32');
    return { q, k, v, out, dout, lse, visibleUntil: new Int32Array(tokens).fill(tokens) };
  };

  test('in the midst of a kernel', async () => {
    const device = native().openDevice({ ...cpu, threads: 0 });
    const args = attention(device, 100_000);
    const kernels: ((cancel: ReturnType<typeof token>) => Promise<unknown>)[] = [
      (cancel) => device.attention(args, cancel),
      (cancel) => device.attentionBackward(args, cancel),
      (cancel) =>
        device.fusedPolicyLoss(
          {
            kind: 'cross_entropy',
            clipLow: 0,
            clipHigh: 0,
            klCoefficient: 0,
            entropyCoefficient: 0,
            hidden: device.tensor(null, [20_000, 512], 'f32'),
            weight: device.tensor(null, [50_000, 512], 'f32'),
            rows: Int32Array.from({ length: 20_000 }, (_, i) => i),
            targets: new Int32Array(20_000),
            weights: device.tensor(null, [20_000], 'f32'),
          },
          cancel,
        ),
    ];
    for (const kernel of kernels) {
      const { outcome, waited } = await cancelAfter(300, kernel);
      expect(outcome).toBe('ABORTED');
      // Each of them takes 20 seconds and more of a machine that has nothing else to do.
      expect(waited).toBeLessThan(10_000);
    }
  }, 120_000);

  test('before it begins', async () => {
    const device = native().openDevice(cpu);
    const cancel = token();
    native().cancel(cancel);
    await expect(device.attention(attention(device, 8), cancel)).rejects.toMatchObject({ code: 'ABORTED' });
  });

  test('while sampling is set up', async () => {
    // A hundred thousand first draws, which take tens of seconds.
    const model = native().createModel({ ...config, vocabSize: 30_000 }, cpu, false);
    await model.initialize(1n, 0.02);
    const completions = 100_000;
    const big = {
      ...request,
      counts: Int32Array.of(completions - 1, 1),
      keys: new Uint32Array(2 * completions),
      maxTokens: Int32Array.of(3000, 3000),
    };
    const { outcome, waited } = await cancelAfter(100, (cancel) => model.sample(big, cancel));
    expect(outcome).toBe('done');
    expect(waited).toBeLessThan(5000);
    // What was cancelled is made up for.
    expect((await model.sample(request, token())).tokens).toHaveLength(36);
    model.dispose();
  }, 60_000);
});
