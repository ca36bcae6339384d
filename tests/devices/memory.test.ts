import { spawnSync } from 'node:child_process';
import { join } from 'node:path';
import { describe, expect, test } from '@jest/globals';
import { root } from '../cli/run.js';

function run(megabytes: number | undefined) {
  const { status, stdout, stderr } = spawnSync(
    process.execPath,
    ['--import', import.meta.resolve('tsx'), join(root, 'tests', 'devices', 'short-of-memory.ts')],
    {
      encoding: 'utf8',
      env: { ...process.env, ...(megabytes && { MERF_EMULATION_MEMORY: String(megabytes * 1e6) }) },
    },
  );
  expect({ status, stderr }).toEqual({ status: 0, stderr: '' });
  return JSON.parse(stdout);
}

describe('a policy whose device runs out of memory', () => {
  test('says what would have fitted, gives back what it took and goes on as if nothing had been', () => {
    const short = run(12);
    // The last token of each completion is left out of the count, since nothing depends on it.
    expect(short.training).toMatch(
      /^Could not allocate .* of memory on cuda-emulated: .*\. 3801 tokens at once need about \d+ MiB; about \d+ would fit \(maxTokens, or batchTokens of a trainer, sets how many\)$/,
    );
    expect(short.scoring).toMatch(/38001 tokens at once need about \d+ MiB; about \d+ would fit/);
    expect(short.sampling).toMatch(
      /Prompts of 11400 tokens and completions of up to 8 need at least \d+ (MiB|bytes); prompts of about \d+ tokens would fit$/,
    );
    expect(short.fits).toBeUndefined();
    expect(short.left).toBeLessThanOrEqual(0);
    // The gradient is 0, as after any failure in a batch: no update is made of a part of it.
    expect(short.gradientAfter).toBe(0);

    expect(short.again).toEqual(short.gradient);
    const roomy = run(undefined);
    expect(roomy.training).toBeUndefined();
    for (const name of ['gradient', 'again', 'stats', 'step', 'tokens']) {
      expect({ [name]: short[name] }).toEqual({ [name]: roomy[name] });
    }
  }, 120_000);
});
