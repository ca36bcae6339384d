// A process of its own in which verifiers do what would end or stop it; guard.test.ts reads what became of each.
import { type MerfError, parseCompletion, RewardSpec } from 'merf';
import { runWithin } from '../../lib/reward/guard.js';
import { Judge } from '../../lib/reward/judge.js';

const completion = parseCompletion({ raw: 'text' });
const later = (milliseconds: number) => new Promise((resolve) => setTimeout(resolve, milliseconds));
const forEver = () => {
  for (;;);
};

function specOf(verify: (row: number) => unknown, timeoutSeconds = 0.5): RewardSpec<number> {
  const cases = ['right', 'wrong'].map((name, i) => ({ name, score: 1 - i, sentence: `if it is ${name}` }));
  return new RewardSpec<number>({
    name: 'hostile',
    timeoutSeconds,
    components: [{ name: 'judge', cases, verify: (_, row) => verify(row) as string }],
  });
}

/** Judges 16 rows side by side as a rollout does, and says how the first failure read, how many began and how long it took. */
async function outcome(verify: (row: number) => unknown) {
  let asked = 0;
  const controller = new AbortController();
  const judge = new Judge(
    specOf((row) => {
      asked += 1;
      return verify(row);
    }),
    16,
  );
  const started = performance.now();
  let first: MerfError | undefined;
  await Promise.allSettled(
    Array.from({ length: 16 }, async (_, row) => {
      try {
        await judge.judge(completion, row, { signal: controller.signal });
      } catch (error) {
        first ??= error as MerfError;
        controller.abort(error);
      }
    }),
  );
  return { code: first?.code, message: first?.message, asked, seconds: (performance.now() - started) / 1000 };
}

/** The same of environments, which are asked without a judge. */
async function environments() {
  let asked = 0;
  const controller = new AbortController();
  const work = () => {
    asked += 1;
    forEver();
  };
  const started = performance.now();
  await Promise.allSettled(
    Array.from({ length: 16 }, () => runWithin(work, 0.5, controller.signal).catch(() => controller.abort())),
  );
  return { asked, seconds: (performance.now() - started) / 1000 };
}

const exits = () => process.exit(0);
const results = {
  synchronous: await outcome(() => forEver()),
  'behind an await': await outcome(async () => {
    await null;
    forEver();
  }),
  'behind a timer': await outcome(async (row) => {
    await later(20);
    if (row === 3) forEver();
    await later(10_000);
  }),
  'a regular expression behind an await': await outcome(async () => {
    await null;
    return /^(a+)+$/.test(`${'a'.repeat(40)}b`) ? 'right' : 'wrong';
  }),
  'microtasks without an end': await outcome(async () => {
    for (;;) await null;
  }),
  'a getter': await outcome(() => Object.defineProperty({}, 'then', { get: forEver })),
  environments: await environments(),
  exit: await outcome(exits),
  'exit behind a timer': await outcome(async (row) => {
    await later(20);
    if (row === 3) exits();
    await later(10_000);
  }),
  'nothing wrong': await outcome(() => 'right'),
};
// What comes after a signal may end the process, whatever verifiers are at work.
process.once('SIGUSR2', () => process.exit(7));
void specOf(() => later(10_000), 30).judge(completion, 0);
process.stdout.write(`${JSON.stringify(results)}\n`);
setTimeout(() => process.kill(process.pid, 'SIGUSR2'), 50);
