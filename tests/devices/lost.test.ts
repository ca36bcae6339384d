// A GPU that fails for good, or has little memory, in a run of the command line: on the emulated one, which does so when
// the environment asks for it.
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, test } from '@jest/globals';
import { readMetrics } from '../../lib/train/index.js';
import { lettersTask, merf, tinyModel } from '../cli/run.js';

let folder: string;
beforeAll(() => {
  folder = mkdtempSync(join(tmpdir(), 'merf-lost-'));
});
afterAll(() => rmSync(folder, { recursive: true, force: true }));

const settings = ['--prompts-per-step', '1', '--group-size', '2', '--max-tokens', '4', '--save-every', '1'];
const train = (out: string, steps: number) =>
  [
    'train',
    '--task',
    lettersTask,
    '--model',
    tinyModel,
    '--device',
    'cuda-emulated',
    '--threads',
    '1',
  ].concat([...settings, '--steps', String(steps), '--out', out]);

describe('a run on a GPU', () => {
  test('that is lost says what was lost first and what to resume from, and is resumed', async () => {
    const out = join(folder, 'lost');
    const { stderr, code } = await merf(train(out, 3), {
      env: { MERF_EMULATION_FAIL_AT: 'adamw:2' },
    });
    expect(code).toBe(1);
    expect(stderr).toMatch(
      /^merf: The GPU was lost: an illegal memory access was encountered, seen at .*; started last: .*\n$/,
    );
    expect(stderr).toContain(
      `, which was loaded from ${tinyModel}, is lost but for what was saved of it; resume ${out}, `,
    );
    expect(stderr).toContain(`after step 1 from ${join(out, 'checkpoints', 'step-000001')}\n`);
    expect(readMetrics(join(out, 'metrics.jsonl')).map(({ step }) => step)).toEqual([1]);

    const resumed = await merf(['train', '--resume', out]);
    expect(resumed.stderr).toBe('');
    expect(resumed.code).toBe(0);
    expect(readMetrics(join(out, 'metrics.jsonl')).map(({ step }) => step)).toEqual([1, 2, 3]);
  }, 180_000);

  test('whose memory is short goes on, says so once and counts it', async () => {
    const out = join(folder, 'short');
    const { stderr, code } = await merf(train(out, 2), { env: { MERF_EMULATION_SHORT: 'adamw' } });
    expect(stderr).toMatch(/^merf: the GPU had no memory left for adamw until its pool gave back .*\n$/);
    expect(code).toBe(0);
    const retries = readMetrics(join(out, 'metrics.jsonl')).map(({ memoryRetries }) => Number(memoryRetries));
    expect(retries.length).toBe(2);
    // Each step counts its own retries, not the sum of all.
    expect(retries[0]).toBeGreaterThan(0);
    expect(retries[1]).toBe(retries[0]);
  }, 180_000);
});
