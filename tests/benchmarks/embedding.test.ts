// What benchmarks/embedding measures does the same work everywhere: merf's results are those of the loops.
import { existsSync } from 'node:fs';
import { join } from 'node:path';
import { expect, test } from '@jest/globals';
import { byLoops, byMerf, type Contestant, caseNames, inputsOf } from '../../benchmarks/embedding/cases.js';
import { root } from '../cli/run.js';

const sizes = {
  tokens: 36,
  heads: 2,
  headSize: 16,
  batch: 4,
  rows: 12,
  hidden: 16,
  vocabulary: 40,
  completions: 8,
};
const inputs = inputsOf(sizes);

async function expectSame(contestant: Contestant, reference: Contestant) {
  for (const name of caseNames) {
    const results = await contestant[name]?.();
    const expected = (await reference[name]?.()) as Float32Array[];
    if (results === undefined) continue;
    expect(results.map(({ length }) => length)).toEqual(expected.map(({ length }) => length));
    for (const [i, values] of results.entries()) {
      // Each draws with random numbers of its own.
      if (name === 'sampling') {
        for (const token of values) expect(token >= 0 && token < sizes.vocabulary).toBe(true);
        continue;
      }
      const most = Math.max(...(expected[i] as Float32Array).map(Math.abs));
      for (const [j, value] of values.entries()) {
        expect(Math.abs(value - (expected[i]?.[j] as number))).toBeLessThan(1e-4 * Math.max(1e-3, most));
      }
    }
  }
}

test('loops in JavaScript come to what the kernels come to', async () => {
  await expectSame(byMerf(inputs, sizes), byLoops(inputs, sizes));
});

const folder = join(root, 'build', 'peers', 'tfjs');
const hasTensorFlow = existsSync(join(folder, 'node_modules', '@tensorflow'));

(hasTensorFlow ? test : test.skip)(
  'so does TensorFlow.js [needs TensorFlow.js]',
  async () => {
    const { load, contestant } = await import(join(root, 'benchmarks', 'peers', 'tfjs.mjs'));
    const { tf } = await load(folder);
    await expectSame(contestant(tf, inputs, sizes) as Contestant, byLoops(inputs, sizes));
  },
  60_000,
);
