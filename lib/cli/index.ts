import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { Command, CommanderError } from 'commander';
import { packageRoot } from '../package-root.js';
import { announceLateFailure } from '../reward/guard.js';
import { toCamelCase } from '../settings.js';
import { type TaskFactory, taskFactories } from '../tasks/index.js';
import { addBench } from './commands/bench.js';
import { addDoctor } from './commands/doctor.js';
import { addEvaluate } from './commands/evaluate.js';
import { addPrompt } from './commands/prompt.js';
import { addSample } from './commands/sample.js';
import { addSft } from './commands/sft.js';
import { addTasks } from './commands/tasks.js';
import { addTrain } from './commands/train.js';
import { addVerify } from './commands/verify.js';
import { print, printError } from './output.js';
import { taskOfArguments } from './task-of-arguments.js';

/**
 * Runs the command line `args` (without node and script) and returns the exit code: 0, 1 for failures, 2 where the
 * command line itself is wrong, 130 where Ctrl-C gave a command up.
 */
export async function main(args: readonly string[]): Promise<number> {
  // A reader that leaves early, as `merf prompt | head -1` does, is no error.
  process.stdout.on('error', (error: NodeJS.ErrnoException) => {
    if (error.code === 'EPIPE') process.exit(0);
    throw error;
  });
  process.on('uncaughtException', (error) => {
    if (announceLateFailure(error)) return;
    process.exit(report(error));
  });
  process.exitCode = 0;
  const task = await taskOfArguments(args);
  try {
    await program(task.factory).parseAsync([...args], { from: 'user' });
    return Number(process.exitCode);
  } catch (error) {
    if (!(error instanceof CommanderError)) return report(error);
    if (error.exitCode === 0) return 0;
    if (error.code === unknownOption && task.error !== undefined) return report(task.error);
    printError(hintFor(error));
    return 2;
  }
}

/** Says what went wrong, in one line, and returns the exit code. */
function report(error: unknown): number {
  const { code } = error as { code?: unknown };
  const message = error instanceof Error ? error.message : String(error);
  const expected = typeof code === 'string';
  printError(`merf: ${message}${expected ? '' : ' (set MERF_DEBUG=1 to see where)'}\n`);
  if (process.env.MERF_DEBUG && error instanceof Error) printError(`${error.stack}\n`);
  return code === 'ABORTED' ? 130 : 1;
}

const unknownOption = 'commander.unknownOption';

/** Where an unknown flag is an option of a task that the command line does not name: which. */
function hintFor({ code, message }: CommanderError): string {
  const flag = code === unknownOption ? /'--([\w-]+)/.exec(message)?.[1] : undefined;
  if (flag === undefined) return '';
  const having = taskFactories().filter(({ options }) => toCamelCase(flag) in options.shape);
  const names = having.map(({ name }) => name);
  return names.length === 0
    ? ''
    : `merf: --${flag} is an option of the task ${names.join(', ')}: name it with --task\n`;
}

/** @param task whose options are flags of the commands that take a task */
function program(task: TaskFactory | undefined): Command {
  const { version } = JSON.parse(readFileSync(join(packageRoot(), 'package.json'), 'utf8')) as {
    version: string;
  };
  const merf = new Command('merf')
    .description(
      'Finetunes language models by reinforcement learning with verifiable rewards, with the rules of the reward ' +
        'written into the prompt (MeRF).',
    )
    .version(version)
    .configureHelp({ showGlobalOptions: false })
    .configureOutput({ writeOut: print, writeErr: printError })
    .showSuggestionAfterError()
    .addHelpText(
      'after',
      '\nA first run, with the small model that ships with merf:\n' +
        '  merf train --task knights-and-knaves --people 2 --steps 20 --out runs/first\n' +
        '  merf evaluate --task knights-and-knaves --people 2 --model runs/first\n\n' +
        'merf COMMAND --help says more about each, and with --task NAME also what there is to choose about that task.\n',
    );
  for (const add of [addTrain, addSft, addEvaluate]) add(merf, task);
  addSample(merf);
  for (const add of [addPrompt, addVerify]) add(merf, task);
  for (const add of [addTasks, addBench, addDoctor]) add(merf);
  for (const command of [merf, ...merf.commands]) command.exitOverride();
  return merf;
}
