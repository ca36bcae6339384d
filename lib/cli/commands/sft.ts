import { existsSync, readFileSync } from 'node:fs';
import { extname } from 'node:path';
import type { Command } from 'commander';
import type { z } from 'zod';
import { MerfError } from '../../errors.js';
import { Policy } from '../../policy/index.js';
import type { TaskFactory } from '../../tasks/index.js';
import { sftSchema } from '../../train/settings.js';
import { readExamples, SupervisedTrainer } from '../../train/sft.js';
import { type SftFileSettings, sftFileSchema } from '../config.js';
import { shortPath } from '../paths.js';
import { deviceText } from '../policies.js';
import { addRunFlags, gather, launchOf, pick, type RunFlags, runTraining, trainedOptions } from '../runs.js';
import { openTask, type TaskChoice } from '../task.js';

export function addSft(program: Command, factory: TaskFactory | undefined): void {
  const schema = sftFileSchema(factory);
  const command = program
    .command('sft')
    .summary('warm a model up on prompts and completions, so that it writes the demanded format')
    .description(
      'Supervised finetuning, the loss on completions alone. Learns from --data, a .jsonl file whose lines have a ' +
        '"completion" and either "messages" or a "prompt"; without it, from the demonstrations that --task writes.\n\n' +
        'The folder of the run is that of merf train, without completions.',
    );
  addRunFlags(command, schema);
  command
    .addHelpText(
      'after',
      '\nExamples:\n' +
        '  merf sft --task knights-and-knaves --people 2 --steps 80 --learning-rate 3e-4 --out runs/warm\n' +
        '  merf sft --data examples.jsonl --model ./model --steps 200 --out runs/sft\n' +
        '  merf train --model runs/warm --task knights-and-knaves\n',
    )
    .action((flags: RunFlags & TaskChoice) => sft(flags, schema));
}

async function sft(flags: RunFlags & TaskChoice, schema: z.ZodObject): Promise<void> {
  const { settings, out, resumed, configPath } = await gather(flags, schema, 'sft', 'sft');
  const config = settings as SftFileSettings;
  const { data } = config;
  const isExamples = typeof data === 'string' && extname(data) === '.jsonl' && holdsExamples(data);
  if (!isExamples && config.task === undefined) {
    throw new MerfError(
      'INVALID_CONFIG',
      'Expected --data with prompts and completions, or a --task that demonstrates',
    );
  }
  const examples = isExamples ? await readExamples(data) : undefined;
  const { data: _, ...withoutData } = config;
  const task = config.task === undefined ? undefined : await openTask(isExamples ? withoutData : config);
  const launch = launchOf(config, schema, sftSchema, configPath);
  const model = launch.model as string;
  await runTraining(out, async (view, signal) => {
    const policy = await Policy.load(model, { ...trainedOptions(config), signal });
    view.event({
      type: 'notice',
      message: `Warming up ${shortPath(model)} into ${shortPath(out)}, on ${deviceText(policy)}`,
    });
    const trainer = new SupervisedTrainer({
      ...pick(config, sftSchema),
      policy,
      ...(examples && { examples }),
      ...(task && { task }),
      out,
      ...resumed,
      launch,
      onEvent: view.event,
    });
    return { trainer, policies: [policy] };
  });
}

function holdsExamples(file: string): boolean {
  if (!existsSync(file)) throw new MerfError('FILE_NOT_FOUND', `No data at ${file}`);
  const first = readFileSync(file, 'utf8').split('\n', 1)[0] ?? '';
  return /"completion"\s*:/.test(first);
}
