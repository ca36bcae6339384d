import { execFileSync } from 'node:child_process';
import { expect, test } from '@jest/globals';
import { type LaunchCount, launchTable } from '../../benchmarks/launches.js';
import { programPath } from '../../benchmarks/paths.js';

test('bytes are those of the sectors that a launch touches', () => {
  const output = execFileSync(programPath('launches'), ['--tiny', 'decode/tiny-qwen2'], { encoding: 'utf8' });
  const counts = output
    .split('\n')
    .filter(Boolean)
    .map((line) => JSON.parse(line) as LaunchCount);
  const { kernels, transfers } = counts.find(({ case: name }) => name === 'decode/tiny-qwen2') as LaunchCount;
  // 64 identifiers that are all one token's, whose row has 64 bfloat16; 64 rows of 64 float32.
  expect(kernels.find(({ name }) => name === 'embedding')).toEqual({
    name: 'embedding',
    launches: 1,
    read: 64 * 4 + 64 * 2,
    written: 64 * 64 * 4,
  });
  expect(transfers.plays).toBe(1);
});

test('a table has every kernel and their sum', () => {
  const text = launchTable({
    case: 'decode/tiny',
    shape: { prompts: 8, group: 8 },
    kernels: [
      { name: 'norm', launches: 2, read: 64, written: 32 },
      { name: 'product', launches: 3, read: 10, written: 4 },
    ],
    transfers: { uploads: 2, uploaded: 8, downloads: 1, downloaded: 4, synchronizations: 0, plays: 1 },
  });
  expect(text).toContain('### tiny: one decode step of 64 completions');
  expect(text).toContain('| `norm` | 2 | 64 | 32 |\n| `product` | 3 | 10 | 4 |\n| all | 5 | 74 | 36 |');
  expect(text).toContain('Uploads: 2 (8 bytes). Downloads: 1 (4 bytes)');
});
