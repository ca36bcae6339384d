import { appendFileSync, writeFileSync } from 'node:fs';
import type { Command } from 'commander';
import { z } from 'zod';
import { whileWriting } from '../../atomic-files.js';
import { withControlsShown } from '../../control-characters.js';
import { type Evaluation, evaluate } from '../../evaluate/index.js';
import { Policy } from '../../policy/index.js';
import { parseMotivationView } from '../../prompt/motivation.js';
import { type LimitSettings, limitSettings, limitsOf, textOf } from '../../rollout/index.js';
import { parseSettings } from '../../settings.js';
import type { TaskFactory } from '../../tasks/index.js';
import { firstRows, fittingRows } from '../../train/evaluation.js';
import { modelShape, withTask } from '../config.js';
import { addFlags, list, number, whole } from '../flags.js';
import { print, printError, printJson } from '../output.js';
import { resolveModel, shortPath } from '../paths.js';
import { deviceText, loadOptions, type ModelFlags } from '../policies.js';
import { openTask, type TaskChoice } from '../task.js';
import { evaluationLine } from '../terminal.js';

interface Flags extends TaskChoice, ModelFlags, Partial<LimitSettings> {
  data?: string;
  prompts: number;
  filterOverlongPrompts?: boolean;
  samples: number;
  passAt?: number[];
  motivation: string[];
  temperature: number;
  topK?: number;
  topP?: number;
  minP?: number;
  seed: number;
  out?: string;
  json?: boolean;
}

export function addEvaluate(program: Command, factory: TaskFactory | undefined): void {
  const command = program
    .command('evaluate')
    .summary("measure a model's accuracy on a task, with and without motivation in the prompt")
    .description(
      "Samples completions of a task's held-out prompts and reports accuracy, mean reward and its parts, pass@k and " +
        'the length of completions, for each view of the motivation. With --data, on all rows of that file. The standard ' +
        'error after ± is over distinct rows: rows that the task takes for the same, such as a puzzle in other words, count ' +
        'as one.',
    );
  const { testData: _, ...shape } = withTask(modelShape, factory);
  addFlags(command, { ...shape, ...limitSettings('Evaluation', false) });
  command
    .optionsGroup('Evaluation:')
    .option('--prompts <n>', 'how many rows, the first of the held-out ones', whole(1), 100)
    .option(
      '--filter-overlong-prompts',
      'leave out rows whose prompt fills the context, which are an error otherwise',
    )
    .option('--samples <n>', 'completions of each prompt', whole(1), 1)
    .option('--pass-at <list>', 'the k of pass@k (default: the powers of 2 up to the samples)', (v) =>
      list(v).map(whole(1)),
    )
    .option('--motivation <list>', 'views of the motivation', list, ['none', 'full'])
    .option('--temperature <n>', 'sampling temperature; 0: greedy', number, 1)
    .option('--top-k <n>', 'draw among the k likeliest tokens; 0: off', whole(0))
    .option('--top-p <n>', 'draw among the likeliest tokens of this total probability; 1: off', number)
    .option('--min-p <n>', "drop tokens below this share of the likeliest one's probability; 0: off", number)
    .option('--seed <n>', 'seed of the draws', whole(0), 0)
    .option('--out <file>', 'write every completion with its score to this .jsonl file')
    .option('--json', 'print the numbers as JSON')
    .addHelpText(
      'after',
      '\nExamples:\n' +
        '  merf evaluate --task knights-and-knaves --people 2 --model runs/first --prompts 200\n' +
        '  merf evaluate --task knights-and-knaves --data 3ppl-test.parquet --samples 8 --motivation none\n',
    )
    .action(run);
}

async function run(flags: Flags): Promise<void> {
  const { data, ...choice } = flags;
  const task = await openTask(choice);
  const motivations = flags.motivation.map(parseMotivationView);
  for (const view of motivations) task.spec.describe(view);
  const all =
    data === undefined
      ? firstRows(await task.rows({ split: 'test', seed: 0 }), flags.prompts)
      : await task.load(data);
  const model = resolveModel(flags.model);
  const policy = await Policy.load(model, loadOptions(flags, false));
  const rows = await fittingRows(all, {
    policy,
    task,
    views: motivations,
    filter: flags.filterOverlongPrompts ?? false,
    setting: '--filter-overlong-prompts',
    onEvent: (event) => {
      if (event.type === 'notice') printError(`merf: ${event.message}\n`);
    },
  });
  const { out } = flags;
  if (out !== undefined) whileWriting(out, () => writeFileSync(out, ''));
  const limits = limitsOf(parseSettings(z.object(limitSettings('Evaluation', false)), flags, 'the flags'));
  const results: Evaluation[] = [];
  const told = new Set<string>();
  if (!flags.json) {
    const where = deviceText(policy);
    print(`${shortPath(model)} on ${rows.length} rows of ${task.name}, on ${where}\n`);
  }
  for (const [i, motivation] of motivations.entries()) {
    const result = await evaluate(policy, task, rows, {
      samples: flags.samples,
      ...(flags.passAt && { passAt: flags.passAt }),
      motivation,
      ...limits,
      temperature: flags.temperature,
      topK: flags.topK,
      topP: flags.topP,
      minP: flags.minP,
      seed: flags.seed,
      // Each view of the motivation would tell the same.
      onNotice: (message) => {
        if (!told.has(message)) printError(`merf: ${message}\n`);
        told.add(message);
      },
      onProgress: (done, all) => {
        if (process.stderr.isTTY)
          process.stderr.write(`\r${withControlsShown(`${flags.motivation[i]}`)}: ${done}/${all}\x1b[K`);
      },
      onGroup: ({ row, episodes }) => {
        if (out === undefined) return;
        const identity = task.identity(row);
        const lines = episodes.map((episode) =>
          JSON.stringify({
            motivation: flags.motivation[i],
            identity,
            prompt: episode.prompt.text,
            text: textOf(episode),
            tokens: episode.completion.tokenCount,
            finishReason: episode.end,
            reward: episode.reward.total,
            parts: episode.reward.parts,
          }),
        );
        whileWriting(out, () => appendFileSync(out, `${lines.join('\n')}\n`));
      },
    });
    if (process.stderr.isTTY) process.stderr.write('\r\x1b[K');
    results.push(result);
    if (!flags.json) {
      print(`${evaluationLine(result)}\n`);
      for (const [component, cases] of Object.entries(result.cases)) {
        const shares = Object.entries(cases).map(([name, share]) => `${name} ${(100 * share).toFixed(1)}%`);
        print(`    ${component}: ${shares.join(', ')}\n`);
      }
    }
  }
  if (flags.json) printJson(results);
  policy.dispose();
}
