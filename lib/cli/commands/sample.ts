import { readFileSync } from 'node:fs';
import type { Command } from 'commander';
import { Policy } from '../../policy/index.js';
import { checkPrompts, collect } from '../../rollout/index.js';
import { modelShape } from '../config.js';
import { addFlags, number, texts, whole } from '../flags.js';
import { print, printError, TextPrinter } from '../output.js';
import { resolveModel } from '../paths.js';
import { loadOptions, type ModelFlags, tellNotices } from '../policies.js';

interface SampleFlags extends ModelFlags {
  prompt: string;
  system?: string;
  raw?: boolean;
  n: number;
  maxTokens: number;
  temperature: number;
  topK?: number;
  topP?: number;
  minP?: number;
  stop?: string[];
  seed: number;
  verbatim?: boolean;
}

export function addSample(program: Command): void {
  const command = program
    .command('sample')
    .summary('ask a model')
    .description(
      "Completes a prompt. It goes through the model's chat template as the user's message, unless --raw is given.",
    );
  addFlags(command, modelShape);
  command
    .optionsGroup('Sampling:')
    .requiredOption('--prompt <text>', 'what to ask; - reads it from the standard input')
    .option('--system <text>', 'a system message before it')
    .option('--raw', 'complete the prompt as it stands, without a chat template')
    .option('--n <n>', 'completions', whole(1), 1)
    .option('--max-tokens <n>', 'longest completion, in tokens', whole(1), 256)
    .option('--temperature <n>', '0: greedy', number, 1)
    .option('--top-k <n>', 'draw among the k likeliest tokens; 0: off', whole(0))
    .option('--top-p <n>', 'draw among the likeliest tokens of this total probability; 1: off', number)
    .option('--min-p <n>', "drop tokens below this share of the likeliest one's probability; 0: off", number)
    .option('--stop <text...>', 'strings that end a completion, as they stand or as JSON', texts('stop'))
    .option('--seed <n>', 'the same seed draws the same completions', whole(0), 0)
    .option('--verbatim', 'print control characters in completions as they are, not written out')
    .addHelpText(
      'after',
      '\nExamples:\n' +
        "  merf sample --model SmolLM2-135M-Instruct.Q4_1.gguf --prompt 'What is the capital of France?' --temperature 0\n" +
        '  merf prompt --task knights-and-knaves --verbatim | merf sample --raw --prompt -\n',
    )
    .action(sample);
}

async function sample(flags: SampleFlags): Promise<void> {
  const prompt = flags.prompt === '-' ? readFileSync(0, 'utf8') : flags.prompt;
  const model = resolveModel(flags.model);
  const policy = await Policy.load(model, loadOptions(flags, false));
  const { reason } = policy.device;
  // Where there is a driver somebody may expect a GPU.
  if (reason !== undefined && !reason.startsWith('No NVIDIA driver')) {
    printError(`merf: on the CPU: ${reason}\n`);
  }
  const task = {
    messages: () =>
      flags.raw
        ? prompt
        : [
            ...(flags.system === undefined ? [] : [{ role: 'system', content: flags.system }]),
            { role: 'user', content: prompt },
          ],
  };
  const printer = new TextPrinter(flags.verbatim ?? false);
  tellNotices(checkPrompts(policy.tokenizer, task, prompt, ['none']));
  const abort = new AbortController();
  const onInterrupt = () => abort.abort();
  process.once('SIGINT', onInterrupt);
  try {
    const streams = flags.n === 1;
    const [group] = await collect(policy, task, [prompt], {
      n: flags.n,
      maxTokens: flags.maxTokens,
      temperature: flags.temperature,
      topK: flags.topK,
      topP: flags.topP,
      minP: flags.minP,
      stop: flags.stop,
      seed: flags.seed,
      signal: abort.signal,
      ...(streams && { onToken: ({ text }: { text: string }) => printer.print(text) }),
    });
    if (streams) print('\n');
    else {
      for (const [i, { completion }] of (group?.episodes ?? []).entries()) {
        const { tokenCount, finishReason, raw } = completion;
        print(`--- ${i + 1} (${tokenCount} tokens, ${finishReason})\n`);
        printer.print(`${raw}\n`);
      }
    }
    printer.close();
  } finally {
    process.off('SIGINT', onInterrupt);
    policy.dispose();
  }
}
