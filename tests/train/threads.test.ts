// Several policies in one process: beside each other on the main thread, and in threads of their own.
import { once } from 'node:events';
import { Worker } from 'node:worker_threads';
import { expect, test } from '@jest/globals';
import { typeScriptLoader } from '../../lib/reward/worker.js';
import { type Outcome, trainTiny } from './training-thread.js';

const rates = [1e-3, 3e-3];

async function inThread(learningRate: number): Promise<Outcome> {
  const worker = new Worker(new URL('./training-thread.ts', import.meta.url), {
    workerData: learningRate,
    execArgv: ['--import', typeScriptLoader()],
  });
  const [outcome] = (await once(worker, 'message')) as [Outcome];
  await worker.terminate();
  return outcome;
}

test('two policies train beside each other, and in two threads, as each does alone', async () => {
  const alone: Outcome[] = [];
  for (const rate of rates) alone.push(await trainTiny(rate));
  expect(alone[0]?.losses).toHaveLength(3);
  expect(alone[0]?.weights).not.toBe(alone[1]?.weights);
  expect(await Promise.all(rates.map(trainTiny))).toEqual(alone);
  expect(await Promise.all(rates.map(inThread))).toEqual(alone);
}, 180_000);

test('a thread that is ended in its work leaves the others to theirs', async () => {
  const doomed = new Worker(new URL('./training-thread.ts', import.meta.url), {
    workerData: 1e-3,
    execArgv: ['--import', typeScriptLoader()],
  });
  await once(doomed, 'online');
  const [outcome] = await Promise.all([
    trainTiny(1e-3),
    new Promise((resolve) => setTimeout(resolve, 700)).then(() => doomed.terminate()),
  ]);
  expect(outcome).toEqual(await trainTiny(1e-3));
}, 180_000);
