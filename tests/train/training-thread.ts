// A short run on a tiny model, in whatever thread imports this, and in a thread of its own for those who start one.
import { createHash } from 'node:crypto';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { parentPort, workerData } from 'node:worker_threads';
import { Policy } from '../../lib/policy/index.js';
import { Trainer } from '../../lib/train/index.js';
import { task as letters } from '../cli/letters-task.js';

const model = fileURLToPath(new URL('../fixtures/llama', import.meta.url));

export interface Outcome {
  losses: unknown[];
  /** Hash of every parameter after the run. */
  weights: string;
}

/** Three steps with a learning rate, to the last bit the same wherever they are run. */
export async function trainTiny(learningRate: number): Promise<Outcome> {
  const out = mkdtempSync(join(tmpdir(), 'merf-threads-'));
  try {
    await using policy = await Policy.load(model);
    const trainer = new Trainer({
      policy,
      task: await letters.open(),
      out,
      steps: 3,
      promptsPerStep: 2,
      groupSize: 4,
      maxTokens: 8,
      learningRate,
    });
    const losses: unknown[] = [];
    for await (const event of trainer) if (event.type === 'step') losses.push(event.metrics.loss);
    const hash = createHash('sha256');
    for (const { name } of policy.parameters()) hash.update(await policy.readParameter(name));
    return { losses, weights: hash.digest('hex') };
  } finally {
    rmSync(out, { recursive: true });
  }
}

if (parentPort) parentPort.postMessage(await trainTiny(workerData as number));
