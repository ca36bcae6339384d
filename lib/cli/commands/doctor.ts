import { freemem, totalmem } from 'node:os';
import type { Command } from 'commander';
import { native } from '../../native.js';
import { openModel } from '../../policy/index.js';
import { defaultModel, shortPath } from '../models.js';

export function addDoctor(program: Command): void {
  program
    .command('doctor')
    .summary('say which devices, instruction sets and libraries were found')
    .description('Says what merf found on this machine. Exits with 1 where it cannot train.')
    .action(doctor);
}

async function doctor(): Promise<void> {
  const line = (name: string, text: string) => process.stdout.write(`${name.padEnd(12)} ${text}\n`);
  let well = true;
  line('node', `${process.version} on ${process.platform} ${process.arch}`);
  line('memory', `${gib(totalmem())} in all, ${gib(freemem())} free`);
  try {
    const addon = native();
    line('merf', `native part ${addon.version}`);
    for (const backend of addon.backends()) {
      if (!backend.available) {
        line(backend.name, `not available: ${backend.reason ?? 'no reason given'}`);
        continue;
      }
      line(backend.name, backend.description);
      line('', `instruction set ${backend.isa}${backend.fastBf16 ? ', bfloat16 products in hardware' : ''}`);
      line(
        '',
        `${backend.threads} ${backend.threads === 1 ? 'thread' : 'threads'}, ${gib(backend.memoryBytes)} of memory`,
      );
      const libraries = backend.libraries.map(([name, version]) => `${name} ${version}`);
      if (libraries.length > 0) line('', libraries.join(', '));
    }
    well = addon.backends().some((backend) => backend.available);
  } catch (error) {
    well = false;
    line('merf', (error as Error).message);
  }
  try {
    const path = defaultModel();
    const { config } = await openModel(path);
    line(
      'model',
      `${shortPath(path)}: ${config.architecture}, ${config.layers} layers, context ${config.maxPositions}`,
    );
  } catch (error) {
    well = false;
    line('model', (error as Error).message);
  }
  line('', well ? 'Everything that training needs is there.' : 'Training will not work as things are.');
  if (!well) process.exitCode = 1;
}

function gib(bytes: number): string {
  return `${(bytes / 2 ** 30).toFixed(1)} GiB`;
}
