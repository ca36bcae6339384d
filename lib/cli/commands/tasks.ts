import type { Command } from 'commander';
import { dataShape } from '../../tasks/define.js';
import { taskFactories } from '../../tasks/index.js';
import { describeOptions } from '../flags.js';
import { print, printJson } from '../output.js';

export function addTasks(program: Command): void {
  program
    .command('tasks')
    .summary('list the tasks that ship with merf, with their options')
    .description(
      'Lists the tasks that ship with merf and the options of each, which are flags of every command that takes --task ' +
        'and keys of config files. All tasks also have --data and --test-data.',
    )
    .option('--json', 'print the list as JSON')
    .action(tasks);
}

function tasks({ json }: { json?: boolean }): void {
  const listed = taskFactories().map(({ name, summary, options }) => {
    const own = Object.entries(options.shape).filter(([key]) => !(key in dataShape));
    return { name, summary, options: describeOptions(Object.fromEntries(own)) };
  });
  if (json) {
    printJson(listed);
    return;
  }
  for (const { name, summary, options } of listed) {
    print(`${name}\n  ${summary}\n`);
    const width = Math.max(0, ...options.map(({ flag }) => flag.length));
    for (const { flag, description } of options) {
      print(`    ${flag.padEnd(width)}  ${description}\n`);
    }
  }
}
