import { readFileSync } from 'node:fs';
import type { Command } from 'commander';
import { MerfError } from '../../errors.js';
import { openModel, Policy, Tokenizer } from '../../policy/index.js';
import { motivationAt, parseMotivation } from '../../prompt/motivation.js';
import { formatVerifyReport, verifyDataset } from '../../tasks/index.js';
import { modelShape, taskShape } from '../config.js';
import { addFlags, number, whole } from '../flags.js';
import { resolveModel } from '../models.js';
import { loadOptions, openTask, type TaskChoice } from './training.js';

interface SampleFlags {
  model?: string;
  device?: string;
  dtype?: 'auto' | 'f32' | 'bf16';
  threads?: number;
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
    .option('--stop <text...>', 'strings that end a completion')
    .option('--seed <n>', 'the same seed draws the same completions', whole(0), 0)
    .addHelpText(
      'after',
      '\nExamples:\n' +
        "  merf sample --model SmolLM2-135M-Instruct.Q4_1.gguf --prompt 'What is the capital of France?' --temperature 0\n" +
        '  merf prompt --task knights-and-knaves | merf sample --raw --prompt -\n',
    )
    .action(sample);
}

async function sample(flags: SampleFlags): Promise<void> {
  const prompt = flags.prompt === '-' ? readFileSync(0, 'utf8') : flags.prompt;
  const model = resolveModel(flags.model);
  const policy = await Policy.load(model, loadOptions({ device: 'auto', dtype: 'auto', ...flags }, false));
  const { reason } = policy.device;
  // Where there is a driver somebody may expect a GPU.
  if (reason !== undefined && !reason.startsWith('No NVIDIA driver')) {
    process.stderr.write(`merf: on the CPU: ${reason}\n`);
  }
  const messages = [
    ...(flags.system === undefined ? [] : [{ role: 'system' as const, content: flags.system }]),
    { role: 'user' as const, content: prompt },
  ];
  const abort = new AbortController();
  const onInterrupt = () => abort.abort();
  process.once('SIGINT', onInterrupt);
  try {
    const streams = flags.n === 1;
    const groups = await policy.sample([flags.raw ? prompt : { messages }], {
      n: flags.n,
      maxTokens: flags.maxTokens,
      temperature: flags.temperature,
      ...(flags.topK !== undefined && { topK: flags.topK }),
      ...(flags.topP !== undefined && { topP: flags.topP }),
      ...(flags.minP !== undefined && { minP: flags.minP }),
      ...(flags.stop && { stop: flags.stop }),
      seed: flags.seed,
      signal: abort.signal,
      ...(streams && { onToken: ({ text }: { text: string }) => void process.stdout.write(text) }),
    });
    const completions = groups[0]?.completions ?? [];
    if (streams) process.stdout.write('\n');
    else {
      for (const [i, completion] of completions.entries()) {
        process.stdout.write(
          `--- ${i + 1} (${completion.tokens.length} tokens, ${completion.finishReason})\n${completion.text}\n`,
        );
      }
    }
  } finally {
    process.off('SIGINT', onInterrupt);
    policy.dispose();
  }
}

interface PromptFlags extends TaskChoice {
  model?: string;
  motivation: string;
  split: 'train' | 'test';
  seed: number;
  row: number;
  reference?: boolean;
}

export function addPrompt(program: Command): void {
  const command = program
    .command('prompt')
    .summary('print exactly what the model sees')
    .description(
      "Prints the prompt of one of a task's rows with the model's chat template applied, as the model will see it.",
    );
  addFlags(command, { ...taskShape, model: modelShape.model });
  command
    .optionsGroup('Prompt:')
    .option('--motivation <view>', 'none, full, adverse, partial:COMPONENT, template:FILE', 'full')
    .option('--row <n>', 'which row, from 0', whole(0), 0)
    .option('--split <name>', 'train or test', 'train')
    .option('--seed <n>', 'seed of the rows and their order', whole(0), 0)
    .addHelpText(
      'after',
      '\nExamples:\n' +
        '  merf prompt --task knights-and-knaves --people 3 --motivation full\n' +
        '  merf prompt --task knights-and-knaves --motivation partial:correctness --row 7\n',
    )
    .action(prompt);
}

async function prompt(flags: PromptFlags): Promise<void> {
  const task = await openTask(flags);
  if (flags.split !== 'train' && flags.split !== 'test') {
    throw new MerfError(
      'INVALID_ARGUMENT',
      `Expected train or test for --split but received ${String(flags.split)}`,
    );
  }
  const rows = await task.rows({ split: flags.split, seed: flags.seed });
  const view = motivationAt(parseMotivation(flags.motivation), 0);
  const { tokenizer } = await openTokenizer(flags.model);
  const messages = task.messages(rows.at(flags.row), view);
  process.stdout.write(tokenizer.applyChatTemplate(messages, { addGenerationPrompt: true }));
  if (process.stdout.isTTY) process.stdout.write('\n');
}

async function openTokenizer(model: string | undefined) {
  const path = resolveModel(model);
  const files = await openModel(path);
  return { tokenizer: new Tokenizer(files.tokenizer, path), contextLength: files.config.maxPositions };
}

interface VerifyFlags extends TaskChoice {
  model?: string;
  motivation: string;
  maxTokens: number;
  problems: number;
  json?: boolean;
}

export function addVerify(program: Command): void {
  const command = program
    .command('verify')
    .summary('check a data set before spending a night on it')
    .description(
      'Checks every row of a data file: that it can be read, that its reference answer gets the highest total, that ' +
        'its prompt and a completion fit the context, that it is there only once, and what the task itself can check ' +
        '(for knights and knaves, the solver against the published solution). Exits with 1 where something is off.',
    );
  const { data: _, testData: __, ...task } = taskShape;
  addFlags(command, { ...task, model: modelShape.model });
  command
    .optionsGroup('Checks:')
    .requiredOption('--data <file>', 'a .jsonl or .parquet file')
    .option('--motivation <view>', 'the view that prompts are measured with', 'full')
    .option('--max-tokens <n>', 'room that a prompt must leave for the completion, in tokens', whole(0), 256)
    .option('--problems <n>', 'how many offending rows to list', whole(0), 20)
    .option('--json', 'print the report as JSON')
    .addHelpText('after', '\nExample:\n  merf verify --task knights-and-knaves --data 3ppl-test.parquet\n')
    .action(verify);
}

async function verify(flags: VerifyFlags): Promise<void> {
  const { data, ...choice } = flags;
  const task = await openTask(choice);
  const view = motivationAt(parseMotivation(flags.motivation), 0);
  const { tokenizer, contextLength } = await openTokenizer(flags.model);
  const report = await verifyDataset(task, data as string, {
    motivation: view,
    countTokens: (messages) =>
      tokenizer.encodePrompt(tokenizer.applyChatTemplate([...messages], { addGenerationPrompt: true }))
        .length,
    maxPromptTokens: contextLength - flags.maxTokens,
  });
  process.stdout.write(
    `${flags.json ? JSON.stringify(report, null, 2) : formatVerifyReport(report, flags.problems)}\n`,
  );
  if (report.problems.length > 0) process.exitCode = 1;
}
