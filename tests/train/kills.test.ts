import { existsSync, mkdtempSync, readdirSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, expect, test } from '@jest/globals';
import { Random } from '../../lib/tasks/random.js';
import { lettersTask, merf, type Result, tinyModel } from '../cli/run.js';
import { expectSameRun } from './same-run.js';

// MERF_KILLS=50 MERF_KILLS_SEED=7 npm run jest -- tests/train/kills.test.ts
const kills = Number(process.env.MERF_KILLS ?? 3);
const seed = Number(process.env.MERF_KILLS_SEED ?? 0);

const steps = 6;
const settings = [
  ...['train', '--task', lettersTask, '--model', tinyModel, '--steps', String(steps), '--save-every', '1'],
  ...['--prompts-per-step', '4', '--group-size', '8', '--max-tokens', '40', '--learning-rate', '1e-3'],
  ...['--keep-checkpoints', '2', '--evaluate-every', '3', '--evaluate-prompts', '2', '--threads', '2'],
];

let folder: string;
let milliseconds: { all: number; training: number };
beforeAll(async () => {
  folder = mkdtempSync(join(tmpdir(), 'merf-kills-'));
  const began = performance.now();
  let trains = began;
  const result = await merf([...settings, '--out', join(folder, 'unbroken')], {
    watch: (stdout) => {
      if (trains === began && stdout.includes('Training ')) trains = performance.now();
    },
  });
  expect(result.stderr).toBe('');
  milliseconds = { all: performance.now() - began, training: performance.now() - trains };
}, 300_000);
afterAll(() => rmSync(folder, { recursive: true, force: true }));

/** Runs until a random moment: most of them while it trains, since a process begins for much longer than that. */
function killedAtRandom(args: readonly string[], random: Random): Promise<Result> {
  const atStart = random.uniform() < 0.2;
  const moment = random.uniform() * (atStart ? milliseconds.all : milliseconds.training);
  let timer: NodeJS.Timeout | undefined;
  const running = merf(args, {
    watch: (stdout, child) => {
      if (!atStart && stdout.includes('Training ')) timer ??= setTimeout(() => child.kill('SIGKILL'), moment);
    },
    onSpawn: (child) => {
      if (atStart) timer = setTimeout(() => child.kill('SIGKILL'), moment);
    },
  });
  return running.finally(() => clearTimeout(timer));
}

test(
  `${kills} kills at random moments lose nothing: what is resumed, or begun anew, ends with the same bits`,
  async () => {
    const random = new Random(seed, 1);
    let run = 0;
    let out = join(folder, 'run-0');
    let killed = 0;
    const stages: Record<string, number> = {};
    const args = () =>
      existsSync(join(out, 'run.json')) ? ['train', '--resume', out] : [...settings, '--out', out];
    const expectWhole = (result: Result) => {
      expect(result).toMatchObject({ code: 0, stderr: '' });
      expectSameRun(out, join(folder, 'unbroken'), steps);
      const left = readdirSync(out, { recursive: true }) as string[];
      expect(left.filter((name) => /\.(tmp|old)-/.test(name) && !name.startsWith('run.lock'))).toEqual([]);
      expect(left).not.toContain('run.lock');
      rmSync(out, { recursive: true });
      run += 1;
      out = join(folder, `run-${run}`);
    };
    while (killed < kills) {
      const result = await killedAtRandom(args(), random);
      if (result.signal !== 'SIGKILL') {
        expectWhole(result);
        continue;
      }
      killed += 1;
      const checkpoints = existsSync(join(out, 'checkpoints')) ? readdirSync(join(out, 'checkpoints')) : [];
      const stage = !existsSync(join(out, 'run.json'))
        ? 'before it began'
        : `with ${checkpoints.length} entries in checkpoints/`;
      stages[stage] = (stages[stage] ?? 0) + 1;
      // Half of what was killed is killed again, the rest goes on to its end.
      if (random.uniform() < 0.5 || killed === kills) expectWhole(await merf(args()));
    }
    process.stderr.write(`measured: killed ${JSON.stringify(stages)}; ${run} runs ended whole\n`);
  },
  120_000 + kills * 120_000,
);
