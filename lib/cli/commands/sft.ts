import type { Command } from 'commander';
import type { z } from 'zod';
import { MerfError } from '../../errors.js';
import { Policy } from '../../policy/index.js';
import { firstFields } from '../../tasks/dataset.js';
import type { TaskFactory } from '../../tasks/index.js';
import { holdsExample, readExamples } from '../../train/examples.js';
import { sftSchema } from '../../train/settings.js';
import { SupervisedTrainer } from '../../train/sft.js';
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
      'Supervised finetuning, the loss on completions alone. Learns from --data, a .jsonl or .parquet file whose rows ' +
        'have a "prompt" and a "completion", both text or both messages, or "messages", in which every reply of the ' +
        'assistant is learned; without it, from the demonstrations that --task writes.\n\n' +
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
  if (data === undefined && config.task === undefined) {
    throw new MerfError(
      'INVALID_CONFIG',
      'Expected --data with prompts and completions, or a --task that demonstrates',
    );
  }
  const file = typeof data === 'string' ? data : undefined;
  // Without a task whatever stands there are examples, so that the line which is none is named.
  const isExamples = file !== undefined && (config.task === undefined || (await areExamples(file)));
  const examples = isExamples ? await readExamples(file) : undefined;
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

async function areExamples(file: string): Promise<boolean> {
  const fields = await firstFields(file);
  return fields !== undefined && holdsExample(fields);
}
