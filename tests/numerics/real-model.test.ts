import { existsSync } from 'node:fs';
import { fileURLToPath } from 'node:url';
import { expect, test } from '@jest/globals';
import { Policy } from '../../lib/policy/index.js';
import { readJson } from '../support/fixtures.js';
import { report } from '../support/report.js';

interface Case {
  messages: { role: 'user'; content: string }[];
  prompt: number[];
  completion: number[];
  text: string;
  logprobs: number[];
}

const { file, cases } = readJson<{ file: string; cases: Case[] }>('smollm2.json');
const path = fileURLToPath(new URL(`../../../shared/models/${file}`, import.meta.url));

(existsSync(path) ? test : test.skip)(
  'SmolLM2-135M from GGUF: prompts, log-probabilities and greedy answers are those of transformers [needs ../shared]',
  async () => {
    const policy = await Policy.load(path, { dtype: 'f32', trainable: false });
    const groups = await policy.sample(cases, { temperature: 0, maxTokens: 32 });
    expect(groups.map(({ promptTokens }) => promptTokens)).toEqual(cases.map(({ prompt }) => prompt));
    const completions = groups.map(({ completions }) => completions[0]);
    expect(completions.map((completion) => Array.from(completion?.tokens ?? []))).toEqual(
      cases.map(({ completion }) => completion),
    );
    expect(completions.map((completion) => completion?.text)).toEqual(cases.map(({ text }) => text));
    const gaps = completions.flatMap((completion, i) =>
      Array.from(completion?.logprobs ?? [], (logprob, t) =>
        Math.abs(logprob - (cases[i]?.logprobs[t] as number)),
      ),
    );
    report('SmolLM2-135M, largest gap in log-probability to transformers', Math.max(...gaps));
    expect(Math.max(...gaps)).toBeLessThan(1e-3);
    policy.dispose();
  },
  180_000,
);
