import { existsSync, mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, expect, test } from '@jest/globals';
import { attempt } from './attempt.js';
import { Fuzzer } from './fuzzer.js';
import { targets as planted } from './planted.js';
import { targets } from './targets/index.js';

const folder = mkdtempSync(join(tmpdir(), 'merf-fuzz-test-'));
afterAll(() => rmSync(folder, { recursive: true, force: true }));

/** What each target reads here; `npm run fuzz` goes on from there. */
const iterations = 10;
const seed = 16;

test.each(targets.map((target) => [target.name, target] as const))(
  'values or MerfErrors alone come out of %s',
  async (_, target) => {
    const outcomes = { value: 0, refused: 0 };
    for (let iteration = 0; iteration < iterations; ++iteration) {
      const outcome = await attempt(target, seed, iteration, join(folder, 'input'));
      if (typeof outcome !== 'string') {
        throw new Error(
          `${target.name}, seed ${seed}, iteration ${iteration}: ${outcome.message}\n${outcome.stack}`,
        );
      }
      outcomes[outcome] += 1;
    }
    expect(outcomes.value + outcomes.refused).toBe(iterations);
  },
  300_000,
);

test('the fuzzer finds what throws, hangs, ends the process or is awaited by nobody', async () => {
  const findings = join(folder, 'findings');
  const fuzzer = new Fuzzer({
    module: new URL('./planted.ts', import.meta.url),
    targets: planted,
    seed,
    seconds: 0,
    iterations: 1,
    findings,
    processes: 1,
  });
  await fuzzer.run();
  const found = Object.fromEntries(fuzzer.findings.map(({ target, message }) => [target, message]));
  expect(found).toEqual({
    throws: 'TypeError: planted',
    hangs: 'it took more than 0.2 s of a processor',
    forgets: 'nobody awaits RangeError: planted',
    exits: 'the process ended with exit code 3',
  });
  expect(fuzzer.counts.get('right')).toEqual({ iterations: 1, values: 1, findings: 0 });
  expect(readFileSync(join(findings, `throws-${seed}-0`, 'text'), 'utf8')).toBe('planted');
  expect(existsSync(join(findings, `right-${seed}-0`))).toBe(false);
}, 600_000);
