// The longest blocks of the event loop in what merf does with a model:
//
//   npx tsx scripts/event-loop.ts [MODEL]    (default: the model that ships with merf)
//
// Wall time, so that it says something on a machine that does nothing else.
import { monitorEventLoopDelay } from 'node:perf_hooks';
import { setTimeout as sleep } from 'node:timers/promises';
import { defaultModel, Policy } from '../lib/policy/index.js';

const path = process.argv[2] ?? defaultModel();

async function measured<T>(what: string, work: () => Promise<T> | T): Promise<T> {
  const delays = monitorEventLoopDelay({ resolution: 1 });
  delays.enable();
  await sleep(20);
  delays.reset();
  // The first turn after a reset only starts the clock.
  await sleep(5);
  const before = process.cpuUsage();
  const started = performance.now();
  const result = await work();
  const seconds = (performance.now() - started) / 1000;
  // A block that ends with the work is seen by the timer after it.
  await sleep(20);
  delays.disable();
  const { user, system } = process.cpuUsage(before);
  process.stdout.write(
    `${what.padEnd(34)} longest block ${(delays.max / 1e6).toFixed(1).padStart(8)} ms, ` +
      `${seconds.toFixed(2)} s in all, ${((user + system) / 1e6).toFixed(2)} s of processors\n`,
  );
  return result;
}

const policy = await measured('loading', () => Policy.load(path, { trainable: true }));
const { tokenizer } = policy;
const sentence = 'The quick brown fox jumps over 12 lazy dogs, one after another.\n';
for (const kilobytes of [4, 64, 1024]) {
  const text = sentence.repeat((kilobytes * 1024) / sentence.length);
  await measured(`encoding ${kilobytes} KiB`, () => tokenizer.encode(text));
}
const prompt = tokenizer.encode('A very special island is inhabited only by knights and knaves.');
const groups = await measured('sampling 8 completions', () =>
  policy.sample([prompt], { n: 8, maxTokens: 32, seed: 1 }),
);
const children = groups.flatMap(({ completions }) =>
  completions.map(({ tokens, logprobs }) => ({
    tokens,
    train: { advantage: 1, logprobs },
  })),
);
await measured('a training step', async () => {
  await policy.forwardBackward([{ tokens: prompt, children }], { type: 'grpo' });
  await policy.optimStep({ learningRate: 1e-6 });
});
policy.dispose();
