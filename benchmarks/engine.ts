// merf as the engines in peers.ts are run: a process of its own that reads a workload from the file it is given, says
// that it is ready, and answers each line of its standard input, {"prompts": [[id, ...], ...]}, with the times of one
// step on them, as a trainer takes it by default; {"keepActivations": bytes} beside them are what its rollout may keep.
import { readFileSync } from 'node:fs';
import { createInterface } from 'node:readline';
import type { EngineSpec } from './peers.js';
import { grpoStep } from './step.js';
import { randomPolicy } from './workloads.js';

const answer = (value: object) => process.stdout.write(`${JSON.stringify(value)}\n`);

const spec = JSON.parse(readFileSync(process.argv[2] as string, 'utf8')) as EngineSpec;
const policy = await randomPolicy(spec.workload, spec);
await grpoStep(policy, [[1, 2, 3, 4]], { group: 2, completionTokens: 4 }, 0);
answer({ versions: {} });
let seed = 0;
for await (const line of createInterface({ input: process.stdin })) {
  const { prompts, keepActivations } = JSON.parse(line) as { prompts: number[][]; keepActivations?: number };
  answer(await grpoStep(policy, prompts, spec.workload.sizes, ++seed, keepActivations));
}
policy.dispose();
