import { extname } from 'node:path';
import type { Command } from 'commander';
import type { z } from 'zod';
import { Policy } from '../../policy/index.js';
import type { TaskFactory } from '../../tasks/index.js';
import { grpoSchema } from '../../train/settings.js';
import { Trainer } from '../../train/trainer.js';
import { type TrainSettings, trainSchema } from '../config.js';
import { shortPath } from '../paths.js';
import { deviceText, loadOptions } from '../policies.js';
import { addRunFlags, gather, launchOf, pick, type RunFlags, runTraining, trainedOptions } from '../runs.js';
import { openTask, openTaskWith, type TaskChoice } from '../task.js';

export function addTrain(program: Command, factory: TaskFactory | undefined): void {
  const schema = trainSchema(factory);
  const command = program
    .command('train')
    .summary('train a model by reinforcement learning (GRPO), with its reward rules in the prompt')
    .description(
      'Trains a model by GRPO on a task. By default the prompt states the reward rules in full, which is MeRF; ' +
        '--motivation none is the plain RLVR baseline.\n\n' +
        'The folder of the run holds metrics.jsonl (a line a step), completions/ (every completion with its score, ' +
        'as JSONL and as a transcript), checkpoints/ and, in the end, model/ in Hugging Face layout. Ctrl-C or ' +
        'SIGTERM ends the step, saves and leaves; a second one gives up at once.',
    );
  addRunFlags(command, schema);
  command
    .addHelpText(
      'after',
      '\nExamples:\n' +
        '  merf train --task knights-and-knaves --people 2 --steps 20 --out runs/first\n' +
        '  merf train --resume runs/first --steps 40\n' +
        '  merf train --config grpo.yaml --motivation none --out runs/rlvr\n' +
        '  merf train --task ./my-task.ts --model ./SmolLM2-135M-Instruct.Q4_1.gguf --motivation full@0,none@100\n\n' +
        'A config file holds the same keys as the flags, in snake_case or camelCase:\n' +
        '  task: knights-and-knaves\n  people: 2-3\n  learning_rate: 2e-5\n',
    )
    .action((flags: RunFlags & TaskChoice) => train(flags, schema));
}

async function train(flags: RunFlags & TaskChoice, schema: z.ZodObject): Promise<void> {
  const name = typeof flags.task === 'string' && extname(flags.task) === '' ? flags.task : 'train';
  const { settings, out, resumed, configPath } = await gather(flags, schema, 'grpo', name);
  const config = settings as TrainSettings;
  const task = await openTask(config);
  const launch = launchOf(config, schema, grpoSchema, configPath);
  const model = launch.model as string;
  await runTraining(out, async (view, signal) => {
    const policy = await Policy.load(model, { ...trainedOptions(config), signal });
    const reference =
      config.kl > 0 ? await Policy.load(model, { ...loadOptions(config, false), signal }) : undefined;
    view.event({
      type: 'notice',
      message: `Training ${shortPath(model)} on ${task.name} into ${shortPath(out)}, on ${deviceText(policy)}`,
    });
    const trainer = new Trainer({
      ...pick(config, grpoSchema),
      policy,
      task,
      ...(config.curriculum !== undefined && { openTask: (changed) => openTaskWith(config, changed) }),
      ...(reference && { reference }),
      out,
      ...resumed,
      launch,
      onEvent: view.event,
    });
    return { trainer, policies: reference ? [policy, reference] : [policy] };
  });
}
