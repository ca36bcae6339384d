import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { Command, CommanderError } from 'commander';
import { addBench } from './commands/bench.js';
import { addDoctor } from './commands/doctor.js';
import { addEvaluate } from './commands/evaluate.js';
import { addPrompt, addSample, addVerify } from './commands/prompting.js';
import { addSft, addTrain } from './commands/training.js';
import { packageRoot } from './models.js';

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
  process.exitCode = 0;
  try {
    await program().parseAsync([...args], { from: 'user' });
    return Number(process.exitCode);
  } catch (error) {
    if (error instanceof CommanderError) return error.exitCode === 0 ? 0 : 2;
    const { code } = error as { code?: unknown };
    const message = error instanceof Error ? error.message : String(error);
    const expected = typeof code === 'string';
    process.stderr.write(`merf: ${message}${expected ? '' : ' (set MERF_DEBUG=1 to see where)'}\n`);
    if (process.env.MERF_DEBUG && error instanceof Error) process.stderr.write(`${error.stack}\n`);
    return code === 'ABORTED' ? 130 : 1;
  }
}

function program(): Command {
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
    .showSuggestionAfterError()
    .addHelpText(
      'after',
      '\nA first run, with the small model that ships with merf:\n' +
        '  merf train --task knights-and-knaves --people 2 --steps 20 --out runs/first\n' +
        '  merf evaluate --task knights-and-knaves --people 2 --model runs/first\n\n' +
        'merf COMMAND --help says more about each.\n',
    );
  for (const add of [addTrain, addSft, addEvaluate, addSample, addPrompt, addVerify, addBench, addDoctor])
    add(merf);
  for (const command of [merf, ...merf.commands]) command.exitOverride();
  return merf;
}
