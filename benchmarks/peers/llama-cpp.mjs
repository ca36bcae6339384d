// Generation by llama.cpp (node-llama-cpp) on the workload that merf is measured on, once for every line of the
// standard input.
//
//   node llama-cpp.mjs SPEC.json
//
// SPEC: gguf (a model), module (the URL of node-llama-cpp), prompts (ids of each), workload.sizes, threads. Answers with
// one JSON object a line: when it is loaded, then the seconds of each run.
//
// All sequences decode as one batch, with flash attention. Each prompt is computed once and its state given to the
// other sequences of its group.
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { createInterface } from 'node:readline';

const { prompts, threads, gguf, module, workload } = JSON.parse(readFileSync(process.argv[2], 'utf8'));
const { group, promptTokens, completionTokens } = workload.sizes;
const { getLlama, getModuleVersion } = await import(module);
const answer = (value) => process.stdout.write(`${JSON.stringify(value)}\n`);

const llama = await getLlama({ gpu: false, build: 'never', maxThreads: threads, logLevel: 'error' });
const model = await llama.loadModel({ modelPath: gguf });
const context = await model.createContext({
  sequences: prompts.length * group,
  contextSize: promptTokens + completionTokens,
  batchSize: 2048,
  flashAttention: true,
  threads,
});
const sequences = Array.from({ length: prompts.length * group }, () => context.getSequence());
const folder = mkdtempSync(join(tmpdir(), 'merf-llama-'));
const next = { generateNext: { token: true, options: { temperature: 1, topK: 0, topP: 1, minP: 0 } } };

async function generate() {
  await Promise.all(
    prompts.map(async (prompt, p) => {
      const [first, ...others] = sequences.slice(p * group, (p + 1) * group);
      await first.evaluateWithoutGeneratingNewTokens(prompt.slice(0, -1));
      const state = join(folder, `prompt-${p}`);
      await first.saveStateToFile(state);
      for (const sequence of others) await sequence.loadStateFromFile(state, { acceptRisk: true });
    }),
  );
  let last = sequences.map((_, i) => prompts[Math.floor(i / group)].at(-1));
  for (let drawn = 0; drawn < completionTokens; ++drawn) {
    last = await Promise.all(
      sequences.map(async (sequence, i) => {
        const [output] = await sequence.controlledEvaluate([[last[i], next]]);
        return output.next.token;
      }),
    );
  }
  return sequences.length * completionTokens;
}

const { release } = llama.llamaCppRelease;
answer({ versions: { 'llama.cpp': release, 'node-llama-cpp': await getModuleVersion() } });
for await (const _ of createInterface({ input: process.stdin })) {
  const start = performance.now();
  const tokens = await generate();
  answer({ generation: (performance.now() - start) / 1000, tokens });
  for (const sequence of sequences) await sequence.clearHistory();
}
rmSync(folder, { recursive: true });
await llama.dispose();
