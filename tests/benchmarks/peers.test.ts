import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, test } from '@jest/globals';
import { checkPeers, Engine } from '../../benchmarks/peers.js';
import { parseSizes, promptsOf, smollm2, workloadOf } from '../../benchmarks/workloads.js';

test('peers that there are not are refused by name', () => {
  expect(checkPeers(['trl', 'llama.cpp', 'trl'])).toEqual(['trl', 'llama.cpp']);
  expect(() => checkPeers(['trl', 'tlr'])).toThrow(/llama\.cpp, trl, pytorch or none for --peers .* tlr/);
});

describe('an engine', () => {
  let folder: string;
  beforeAll(() => {
    folder = mkdtempSync(join(tmpdir(), 'merf-peers-'));
  });
  afterAll(() => rmSync(folder, { recursive: true, force: true }));

  const start = (source: string) => {
    const script = join(folder, 'engine.mjs');
    writeFileSync(script, source);
    return Engine.start('fake', { program: process.execPath, args: [script], env: {} }, 'spec.json');
  };

  test('answers line by line until it is closed', async () => {
    const engine = await start(`
      import { createInterface } from 'node:readline';
      console.log('loading ' + process.argv[2]);
      console.log(JSON.stringify({ versions: { fake: '1.0' } }));
      for await (const line of createInterface({ input: process.stdin }))
        console.log(JSON.stringify({ generation: JSON.parse(line).seconds, tokens: 4 }));
    `);
    expect(engine.versions).toEqual({ fake: '1.0' });
    expect(await engine.run({ seconds: 3 })).toEqual({ generation: 3, tokens: 4 });
    expect(await engine.run({ seconds: 5 })).toEqual({ generation: 5, tokens: 4 });
    expect(engine.peakBytes()).toBeGreaterThan(1e6);
    await engine.close();
  });

  test('is ended where it takes too long', async () => {
    const engine = await start("console.log('{}'); setInterval(() => {}, 1000);");
    await expect(engine.run({}, 0.1)).rejects.toThrow(/fake was left out: it took longer/);
    await engine.close();
  });

  test('that fails is named, with its last line', async () => {
    await expect(start("console.error('no model'); process.exit(3);")).rejects.toThrow(
      'fake failed, it ended with exit code 3: no model',
    );
  });
});

test('sizes and prompts', async () => {
  const sizes = parseSizes('2x16x3x8');
  expect(sizes).toEqual({ prompts: 2, promptTokens: 16, group: 3, completionTokens: 8 });
  for (const text of ['2x16x3', '2x16x0x8', 'all']) {
    expect(() => parseSizes(text)).toThrow(`for --sizes but received ${text}`);
  }
  const workload = await workloadOf(undefined, sizes);
  const [first, second] = promptsOf(workload, 5);
  expect(first).toHaveLength(21);
  expect(first?.slice(0, 5)).toEqual(second?.slice(0, 5));
  expect(first?.[5]).not.toBe(second?.[5]);
  await expect(workloadOf(undefined, { ...sizes, promptTokens: smollm2.maxPositions })).rejects.toThrow(
    /at most 8192 tokens, the model's context, but received 8200/,
  );
});
