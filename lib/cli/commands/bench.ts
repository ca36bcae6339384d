import { existsSync } from 'node:fs';
import { join } from 'node:path';
import { type Command, Option } from 'commander';
import { MerfError } from '../../errors.js';
import { native } from '../../native.js';
import { packageRoot } from '../../package-root.js';
import { importModule } from '../../tasks/index.js';
import { list, positive } from '../flags.js';

/** The flags; benchmarks/index.ts says what they mean. */
type BenchFlags = Record<string, unknown>;
type Bench = (options: BenchFlags) => Promise<boolean>;

export function addBench(program: Command): void {
  program
    .command('bench')
    .summary('measure how fast GRPO steps are on this machine')
    .description(
      'Measures GRPO steps on the processor, with random weights: whole step, generation, training and memory; what a ' +
        "motivation costs; the machine's own rate of matrix products and so the least that a step could take; and, in " +
        'turn with them, the peers that are installed. Then single operators, beside PyTorch where it is installed.',
    )
    .option(
      '--peers <list>',
      'which peers to measure beside: llama.cpp, trl, pytorch, or none (default: those installed, as far as the minutes ' +
        'go; `npm run bench` in a clone brings those that are named)',
      list,
    )
    .option(
      '--minutes <n>',
      'for all measured rounds together (default: 15; 10 without --peers; 8 with --scaling, 5 with --agent)',
      positive,
    )
    .addOption(
      new Option(
        '--dtype <type>',
        'of weights (default: f32, and bf16 where the processor multiplies it in hardware)',
      ).choices(['f32', 'bf16']),
    )
    .option('--model <path>', "whose shape the random weights have (default: SmolLM2-135M's)")
    .option('--sizes <sizes>', 'PROMPTSxTOKENSxGROUPxTOKENS (default: 4x256x8x64)')
    .option('--no-operators', 'leaves the single operators out')
    .option('--profile', "prints where a step's time goes, operator by operator, and measures nothing else")
    .option(
      '--scaling',
      "measures a step's cost against group, prompt and completion tokens and threads instead, and plots it",
    )
    .option(
      '--agent',
      'measures the rollout of episodes of four turns instead, with a session, which keeps what was computed from turn to ' +
        'turn, and without',
    )
    .option(
      '--launches',
      'counts what a decode step and a training step launch on a GPU and which bytes they move, and measures nothing; ' +
        'needs --device cuda-emulated and a clone; --model is then also qwen2.5-0.5b or another that is in ' +
        "benchmarks/launches.ts (default: qwen2.5-0.5b's and qwen2.5-7b-lora's shapes)",
    )
    .addOption(new Option('--device <name>', 'for --launches alone').choices(['cuda-emulated']))
    .option('--out <folder>', 'where to write the results (default: benchmarks/results in the package)')
    .action(bench);
}

async function bench(flags: BenchFlags): Promise<void> {
  // Compiled with the package, or in a clone as its source.
  const built = join(packageRoot(), 'dist', 'benchmarks', 'index.js');
  const entry = existsSync(built) ? built : join(packageRoot(), 'benchmarks', 'index.ts');
  const module = (await importModule(entry)) as { bench?: Bench };
  if (!module.bench) throw new MerfError('INTERNAL', `Expected ${entry} to export bench`);
  const processor = native().describeDevice('cpu');
  if (!(await module.bench({ ...flags, processor }))) process.exitCode = 1;
}
