import { existsSync, readFileSync } from 'node:fs';
import { freemem, totalmem } from 'node:os';
import type { Command } from 'commander';
import { type NativeBackend, native } from '../../native.js';
import { gib } from '../../policy/devices.js';
import { defaultModel, openModel } from '../../policy/index.js';
import { print } from '../output.js';
import { shortPath } from '../paths.js';

export function addDoctor(program: Command): void {
  program
    .command('doctor')
    .summary('say which devices, instruction sets and libraries were found')
    .description('Says what merf found on this machine. Exits with 1 where it cannot train.')
    .action(doctor);
}

async function doctor(): Promise<void> {
  const line = (name: string, text: string) => print(`${name.padEnd(14)} ${text}\n`);
  let well = true;
  line('node', `${process.version} on ${process.platform} ${process.arch}`);
  line('memory', `${gib(totalmem())} in all, ${gib(freemem())} free`);
  try {
    const addon = native();
    line('merf', `native part ${addon.version}`);
    const devices = addon.deviceNames().map((name) => addon.describeDevice(name));
    for (const device of devices) {
      for (const [i, text] of deviceLines(device).entries()) line(i === 0 ? device.name : '', text);
    }
    well = devices.some(({ name, available }) => name === 'cpu' && available);
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

function deviceLines(device: NativeBackend): string[] {
  const { name, available, reason, description, isa, threads, memoryBytes, freeBytes, fastBf16 } = device;
  const { memoryRetries = 0 } = device;
  if (!available) return [`not available: ${reason ?? 'no reason given'}`];
  if (name === 'cuda-emulated') return ["the kernels of cuda on the processor, for merf's tests: very slow"];
  const libraries = device.libraries.map(([library, version]) => `${library} ${version}`);
  const bf16 = fastBf16 ? ', bfloat16 products in hardware' : '';
  if (name === 'cpu') {
    return [
      description,
      `instruction set ${isa}${bf16}`,
      `${threads} ${threads === 1 ? 'thread' : 'threads'}, ${gib(memoryBytes)} of memory`,
      libraries.join(', '),
    ];
  }
  const products = device.libraries.some(([library]) => library === 'cuBLASLt')
    ? []
    : ["merf's own matrix products (cuBLASLt was not found)"];
  return [
    description,
    `compute capability ${isa.replace(/^sm_(\d+)(\d)$/, '$1.$2')}${bf16}`,
    `${gib(memoryBytes)} of memory, ${gib(freeBytes)} free, ${memoryRetries} retries for want of it`,
    [...driverVersion(), ...libraries, ...products].join(', '),
  ];
}

/** The driver's version as NVIDIA numbers it; the driver tells only the CUDA version that it is for. */
function driverVersion(): string[] {
  const file = '/proc/driver/nvidia/version';
  const version = existsSync(file) && /\s(\d+\.\d+(\.\d+)?)\s/.exec(readFileSync(file, 'utf8'))?.[1];
  return version ? [`driver ${version}`] : [];
}
