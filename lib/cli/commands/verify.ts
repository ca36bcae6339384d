import type { Command } from 'commander';
import { formatVerifyReport, verifyDataset } from '../../evaluate/index.js';
import type { TokenizerOptions } from '../../policy/index.js';
import { parseMotivationView } from '../../prompt/motivation.js';
import type { TaskFactory } from '../../tasks/index.js';
import { modelShape, tokenizerShape, withTask } from '../config.js';
import { addFlags, whole } from '../flags.js';
import { print, printJson } from '../output.js';
import { openTokenizer } from '../policies.js';
import { openTask, type TaskChoice } from '../task.js';

interface VerifyFlags extends TaskChoice, TokenizerOptions {
  model?: string;
  testData?: string;
  motivation: string;
  maxTokens: number;
  problems: number;
  json?: boolean;
}

export function addVerify(program: Command, factory: TaskFactory | undefined): void {
  const command = program
    .command('verify')
    .summary('check a data set before spending a night on it')
    .description(
      'Checks every row of a data file: that it can be read, that its reference answer gets the highest total, that ' +
        'its prompt and a completion fit the context, that it is there only once, and what the task itself can check ' +
        '(for knights and knaves, the solver against the published solution). Counts the rows that differ, whatever their ' +
        'wording, and with --test-data the test rows that are the same as a row of the data. Exits with 1 where something ' +
        'is off.',
    );
  const {
    data: _,
    testData: __,
    ...shape
  } = withTask({ model: modelShape.model, ...tokenizerShape }, factory);
  addFlags(command, shape);
  command
    .optionsGroup('Checks:')
    .requiredOption('--data <file>', 'a .jsonl or .parquet file')
    .option('--test-data <file>', 'rows to evaluate on, none of which may be the same as one of the data')
    .option('--motivation <view>', 'the view that prompts are measured with', 'full')
    .option('--max-tokens <n>', 'room that a prompt must leave for the completion, in tokens', whole(0), 256)
    .option('--problems <n>', 'how many offending rows to list', whole(0), 20)
    .option('--json', 'print the report as JSON')
    .addHelpText('after', '\nExample:\n  merf verify --task knights-and-knaves --data 3ppl-test.parquet\n')
    .action(verify);
}

async function verify(flags: VerifyFlags): Promise<void> {
  const { data, testData, ...choice } = flags;
  const task = await openTask(choice);
  const view = parseMotivationView(flags.motivation);
  const { tokenizer, contextLength } = await openTokenizer(flags.model, flags);
  const report = await verifyDataset(task, data as string, {
    motivation: view,
    tokenizer,
    maxPromptTokens: contextLength - flags.maxTokens,
    ...(testData !== undefined && { testFile: testData }),
  });
  if (flags.json) printJson(report);
  else print(`${formatVerifyReport(report, flags.problems)}\n`);
  if (report.problems.length > 0) process.exitCode = 1;
}
