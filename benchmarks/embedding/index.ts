// How fast merf's kernels are in a trainer of one's own, beside loops in JavaScript and TensorFlow.js. All are given typed
// arrays and give typed arrays, copies to and from their tensors included.
//
//   npx tsx benchmarks/embedding/index.ts [rounds]
//
// TensorFlow.js is measured where build/peers/tfjs has it:
//   npm install --prefix build/peers/tfjs @tensorflow/tfjs @tensorflow/tfjs-backend-wasm    (or @tensorflow/tfjs-node)
import { existsSync } from 'node:fs';
import { join } from 'node:path';
import { peersFolder, root, say } from '../paths.js';
import {
  byLoops,
  byMerf,
  type Contestant,
  caseNames,
  type Inputs,
  inputsOf,
  type Sizes,
  smallModel,
} from './cases.js';

interface TensorFlow {
  load(folder: string): Promise<{ tf: unknown; name: string }>;
  contestant(tf: unknown, inputs: Inputs, sizes: Sizes): Contestant;
}

async function tensorFlow(inputs: Inputs, sizes: Sizes): Promise<[string, Contestant][]> {
  const folder = join(peersFolder, 'tfjs');
  if (!existsSync(join(folder, 'node_modules', '@tensorflow'))) {
    say(`TensorFlow.js is not measured: there is none in ${folder}`);
    return [];
  }
  const peer = (await import(join(root, 'benchmarks', 'peers', 'tfjs.mjs'))) as TensorFlow;
  const { tf, name } = await peer.load(folder);
  return [[name, peer.contestant(tf, inputs, sizes)]];
}

const rounds = Number(process.argv[2] ?? 3);
const inputs = inputsOf(smallModel);
const contestants: [string, Contestant][] = [
  ['merf', byMerf(inputs, smallModel)],
  ['JavaScript', byLoops(inputs, smallModel)],
  ...(await tensorFlow(inputs, smallModel)),
];

// Milliseconds of the processor, of all threads together, and elapsed ones: the least of all rounds, which take turns. The
// former say little of what else the machine does.
const least = new Map<string, [processor: number, elapsed: number]>();
for (let round = 0; round <= rounds; round++) {
  for (const name of caseNames) {
    for (const [who, contestant] of contestants) {
      const run = contestant[name];
      if (!run) continue;
      const [start, used] = [performance.now(), process.cpuUsage()];
      await run();
      const elapsed = performance.now() - start;
      const { user, system } = process.cpuUsage(used);
      const key = `${who} ${name}`;
      const [processor, whole] = least.get(key) ?? [Number.POSITIVE_INFINITY, Number.POSITIVE_INFINITY];
      // The first round warms up.
      if (round > 0) least.set(key, [Math.min(processor, (user + system) / 1000), Math.min(whole, elapsed)]);
    }
  }
  say(`round ${round}`);
}

for (const [of, place] of [['processor', 0] as const, ['elapsed', 1] as const]) {
  console.log(`| ms, ${of} | ${contestants.map(([who]) => who).join(' | ')} |`);
  console.log(`| --- |${' ---: |'.repeat(contestants.length)}`);
  for (const name of caseNames) {
    const cells = contestants.map(([who]) => least.get(`${who} ${name}`)?.[place].toFixed(1) ?? '');
    console.log(`| ${name} | ${cells.join(' | ')} |`);
  }
  console.log('');
}
// Threads of TensorFlow.js would keep the process from its end.
process.exit();
