// What a session saves an agent: the rollout of episodes of several turns, with and without it.
import type { Policy } from 'merf';
import { say } from './paths.js';
import type { Machine } from './report.js';
import { type Dtype, promptsOf, randomPolicy, type Workload } from './workloads.js';

/** Turns of an episode, and the tokens of each: what the model draws, and the environment's answer to it. */
export const agentTurns = 4;
export const turnTokens = 256;

/** One rollout: seconds until every turn's first token is there, seconds after that, and what prompts cost. */
export interface AgentRun {
  prefill: number;
  decode: number;
  tokensPrefilled: number;
  tokensReused: number;
}

export interface AgentMeasurement {
  session: AgentRun[];
  plain: AgentRun[];
}

/** Rounds of a rollout with a session and one without, on the same prompts, until the time is over; one at least. */
export async function measureAgent(
  workload: Workload,
  dtype: Dtype,
  threads: number,
  seconds: number,
): Promise<AgentMeasurement> {
  const { prompts, group, promptTokens, completionTokens } = workload.sizes;
  say(
    `${workload.title}, ${dtype}: ${prompts * group} episodes of ${agentTurns} turns behind ${promptTokens} tokens; ` +
      `a turn is ${completionTokens} tokens drawn and ${turnTokens - completionTokens} of the environment's`,
  );
  const options = { dtype, threads, trainable: false };
  const session = await randomPolicy(workload, options);
  const plain = await randomPolicy(workload, { ...options, sessionBytes: 0 });
  const measured: AgentMeasurement = { session: [], plain: [] };
  try {
    const start = performance.now();
    for (let round = 0; round < 1 || performance.now() - start < 1000 * seconds; ++round) {
      // Other prompts every round, or a session would know them.
      measured.session.push(await rollout(session, workload, round));
      measured.plain.push(await rollout(plain, workload, round));
      const [a, b] = [measured.session, measured.plain].map((runs) => wholeOf(runs.at(-1) as AgentRun));
      say(`  with a session ${(a as number).toFixed(2)} s, without ${(b as number).toFixed(2)} s`);
    }
  } finally {
    session.dispose();
    plain.dispose();
  }
  return measured;
}

async function rollout(policy: Policy, workload: Workload, round: number): Promise<AgentRun> {
  const { group, completionTokens } = workload.sizes;
  const { vocabSize } = workload.config;
  let prompts: ArrayLike<number>[] = promptsOf(workload).map((prompt) =>
    prompt.map((id) => (id + 101 * round) % vocabSize),
  );
  policy.resetCacheStatistics();
  let [prefill, decode] = [0, 0];
  for (let turn = 0; turn < agentTurns; ++turn) {
    const n = turn === 0 ? group : 1;
    const waiting = new Set(Array.from({ length: n * prompts.length }, (_, i) => i));
    const start = performance.now();
    let first = start;
    const groups = await policy.sample(prompts, {
      n,
      maxTokens: completionTokens,
      seed: agentTurns * round + turn,
      onToken: ({ prompt, completion }) => {
        if (waiting.delete(prompt * n + completion) && waiting.size === 0) first = performance.now();
      },
    });
    prefill += (first - start) / 1000;
    decode += (performance.now() - first) / 1000;
    prompts = groups.flatMap(({ promptTokens, completions }) =>
      completions.map(({ tokens }, i) => [
        ...promptTokens,
        ...tokens,
        ...Array.from(
          { length: turnTokens - completionTokens },
          (_, t) => ((t + 31 * i + 17 * turn + round) * 6151) % vocabSize,
        ),
      ]),
    );
  }
  const { tokensPrefilled, tokensReused } = await policy.cacheStatistics();
  return { prefill, decode, tokensPrefilled, tokensReused };
}

const wholeOf = ({ prefill, decode }: AgentRun) => prefill + decode;

export function agentMarkdown(
  machine: Machine,
  { title, sizes }: Workload,
  dtype: Dtype,
  { session, plain }: AgentMeasurement,
): string {
  const median = (runs: readonly AgentRun[], of: (run: AgentRun) => number) => {
    const sorted = runs.map(of).sort((a, b) => a - b);
    return sorted[Math.floor(sorted.length / 2)] as number;
  };
  const row = (name: string, of: (run: AgentRun) => number, digits: number) => {
    const [a, b] = [median(session, of), median(plain, of)];
    return `| ${name} | ${a.toFixed(digits)} | ${b.toFixed(digits)} | ${(b / a).toFixed(2)} x |`;
  };
  return [
    '# An agent with a session and without',
    '',
    `${machine.date}, ${machine.processor} (${machine.isa}, ${machine.threads} threads), merf ${machine.versions.merf}.`,
    `${title}, ${dtype}: ${sizes.prompts} prompts of ${sizes.promptTokens} tokens x ${sizes.group} episodes of ` +
      `${agentTurns} turns; a turn is ${sizes.completionTokens} tokens that the model draws and ` +
      `${turnTokens - sizes.completionTokens} that the environment answers. Medians of ${session.length} rollouts of ` +
      'each, in turn. Prefill: until every completion of a turn has its first token, added up over the turns.',
    '',
    '| a rollout | with a session | without | |',
    '|---|---|---|---|',
    row('seconds', wholeOf, 2),
    row('prefill, seconds', ({ prefill }) => prefill, 2),
    row('decoding, seconds', ({ decode }) => decode, 2),
    row('tokens prefilled', ({ tokensPrefilled }) => tokensPrefilled, 0),
    '',
  ].join('\n');
}
