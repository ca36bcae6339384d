import { existsSync } from 'node:fs';
import { join } from 'node:path';
import type { Command } from 'commander';
import { MerfError } from '../../errors.js';
import { importModule } from '../../tasks/index.js';
import { list } from '../flags.js';
import { packageRoot } from '../models.js';

export interface BenchOptions {
  peers?: string[];
  out?: string;
}

export function addBench(program: Command): void {
  program
    .command('bench')
    .summary('measure how fast rollouts and training are on this machine')
    .description(
      'Measures tokens/s of rollout and of training for the model that ships with merf and for a random model of ' +
        '135M parameters, beside its peers where they are installed.',
    )
    .option(
      '--peers <list>',
      'which peers to measure beside, such as pytorch (default: those installed)',
      list,
    )
    .option('--out <folder>', 'where to write the table, as Markdown and as JSON')
    .action(bench);
}

async function bench(options: BenchOptions): Promise<void> {
  // Compiled with the package, or in a clone as its source.
  const built = join(packageRoot(), 'dist', 'benchmarks', 'index.js');
  const entry = existsSync(built) ? built : join(packageRoot(), 'benchmarks', 'index.ts');
  const module = (await importModule(entry)) as { bench?: (options: BenchOptions) => Promise<void> };
  if (!module.bench) throw new MerfError('INTERNAL', `Expected ${entry} to export bench`);
  await module.bench(options);
}
