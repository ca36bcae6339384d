import type { Command } from 'commander';
import { MerfError } from '../../errors.js';
import { motivationAt, parseMotivation } from '../../prompt/motivation.js';
import { renderPrompt } from '../../rollout/index.js';
import type { TaskFactory } from '../../tasks/index.js';
import { modelShape, withTask } from '../config.js';
import { addFlags, whole } from '../flags.js';
import { openTokenizer } from '../policies.js';
import { openTask, type TaskChoice } from '../task.js';

interface PromptFlags extends TaskChoice {
  model?: string;
  motivation: string;
  split: 'train' | 'test';
  seed: number;
  row: number;
  reference?: boolean;
}

export function addPrompt(program: Command, factory: TaskFactory | undefined): void {
  const command = program
    .command('prompt')
    .summary('print exactly what the model sees')
    .description(
      "Prints the prompt of one of a task's rows with the model's chat template applied, as the model will see it.",
    );
  addFlags(command, withTask({ model: modelShape.model }, factory));
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
  process.stdout.write(renderPrompt(tokenizer, messages, task.environment?.tools).text);
  if (process.stdout.isTTY) process.stdout.write('\n');
}
