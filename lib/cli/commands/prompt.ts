import type { Command } from 'commander';
import { MerfError } from '../../errors.js';
import type { TokenizerOptions } from '../../policy/index.js';
import { formatMotivation, type MotivationMix, parseMotivation } from '../../prompt/motivation.js';
import { episodePrompt } from '../../rollout/index.js';
import { parseSettings } from '../../settings.js';
import type { Task, TaskFactory } from '../../tasks/index.js';
import { AdaptiveMotivation, adaptiveWord } from '../../train/adaptive.js';
import { grpoSchema } from '../../train/settings.js';
import { modelShape, tokenizerShape, withTask } from '../config.js';
import { addFlags, whole } from '../flags.js';
import { print, TextPrinter } from '../output.js';
import { openTokenizer } from '../policies.js';
import { openTask, type TaskChoice } from '../task.js';

interface PromptFlags extends TaskChoice, TokenizerOptions {
  model?: string;
  motivation: string;
  split: 'train' | 'test';
  seed: number;
  row: number;
  verbatim?: boolean;
}

export function addPrompt(program: Command, factory: TaskFactory | undefined): void {
  const command = program
    .command('prompt')
    .summary('print exactly what the model sees')
    .description(
      "Prints the prompt of one of a task's rows with the model's chat template applied, as the model will see it.",
    );
  addFlags(command, withTask({ model: modelShape.model, ...tokenizerShape }, factory));
  command
    .optionsGroup('Prompt:')
    .option(
      '--motivation <view>',
      'none, full, adverse, partial:COMPONENT, template:FILE; of a mix or a schedule every prompt is shown, of ' +
        "adaptive those of a run's first step",
      'full',
    )
    .option('--row <n>', 'which row, from 0', whole(0), 0)
    .option('--split <name>', 'train or test', 'train')
    .option('--seed <n>', 'seed of the rows and their order', whole(0), 0)
    .option('--verbatim', 'print control characters in it as they are, not written out')
    .addHelpText(
      'after',
      '\nExamples:\n' +
        '  merf prompt --task knights-and-knaves --people 3 --motivation full\n' +
        '  merf prompt --task knights-and-knaves --motivation partial:correctness --row 7\n' +
        '  merf prompt --task countdown --motivation full/none@0,none@100\n',
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
  const adaptive = flags.motivation === adaptiveWord;
  const schedule = adaptive ? [{ step: 0, value: firstMix(task) }] : parseMotivation(flags.motivation);
  const { tokenizer } = await openTokenizer(flags.model, flags);
  const row = rows.at(flags.row);
  const alone = schedule.length === 1 && schedule[0]?.value.length === 1;
  const printer = new TextPrinter(flags.verbatim ?? false);
  if (adaptive) print(`${aboutAdaptive}\n`);
  for (const { step, value: mix } of schedule) {
    for (const view of new Set(mix)) {
      const { text, tokens } = episodePrompt(tokenizer, task, row, view);
      if (alone) printer.print(text);
      else {
        const share = `${mix.filter((one) => one === view).length} of ${mix.length} completions`;
        const from = schedule.length > 1 ? `from step ${step + 1}, ` : '';
        const title = `${from}${share} under ${formatMotivation(view)}, ${tokens.length} tokens`;
        print(`${'='.repeat(80)}\n${title}\n\n`);
        printer.print(`${text}\n`);
      }
    }
  }
  if (process.stdout.isTTY) print('\n');
  printer.close();
}

const aboutAdaptive =
  'An adaptive motivation begins with these. Later steps leave out the components in turn, and the words of those that\n' +
  'no longer raise their own score are withdrawn; motivation.jsonl in the folder of a run says when and why.';

/** The mix of an adaptive motivation before it has measured anything, in groups of the default size. */
function firstMix(task: Task): MotivationMix {
  return new AdaptiveMotivation(task.spec, parseSettings(grpoSchema, {})).mix(1);
}
