import { invalidArgument, MerfError } from '../errors.js';
import { type NativeBackend, native } from '../native.js';
import { type ModelConfig, parameterCount } from './config.js';

export interface DeviceDescription {
  name: string;
  /** Processor or card, as its maker names it. */
  description: string;
  isa: string;
  threads: number;
  memoryBytes: number;
  /** Why `auto` chose the CPU and not a GPU; absent where it did not. */
  reason?: string | undefined;
}

/**
 * The device of that name. `auto` is the GPU, or the CPU with the reason where there is no GPU to use or less of its
 * memory is free than `neededBytes` of it.
 * @throws MerfError INVALID_ARGUMENT, DEVICE_UNAVAILABLE
 */
export function chooseDevice(
  wanted: string,
  neededBytes: (device: NativeBackend) => number,
  describe = (name: string) => native().describeDevice(name),
): { device: NativeBackend; reason?: string | undefined } {
  if (wanted === 'auto') {
    const gpu = describe('cuda');
    const reason = gpu.available ? whyTooFull(gpu, neededBytes(gpu)) : (gpu.reason ?? 'no reason is known');
    return reason === undefined ? { device: gpu } : { device: describe('cpu'), reason };
  }
  const names = native().deviceNames();
  if (!names.includes(wanted)) throw invalidArgument('device', ['auto', ...names].join(', '), wanted);
  const device = describe(wanted);
  if (!device.available) {
    throw new MerfError(
      'DEVICE_UNAVAILABLE',
      `Device ${wanted} is not available: ${device.reason ?? 'no reason is known'}`,
    );
  }
  return { device };
}

function whyTooFull(device: NativeBackend, needed: number): string | undefined {
  if (device.freeBytes >= needed) return undefined;
  return (
    `The GPU ${device.description} has ${gib(device.freeBytes)} free of its ${gib(device.memoryBytes)}, ` +
    `and this model needs at least ${gib(needed)}`
  );
}

/** The memory that parameters take at least, in bytes, with gradients and moments where they are trained. */
export function parameterBytes(
  config: ModelConfig,
  { dtype, trainable, lora }: { dtype: 'f32' | 'bf16'; trainable: boolean; lora: boolean },
): number {
  const size = dtype === 'bf16' ? 2 : 4;
  const count = parameterCount(config);
  if (!trainable || lora) return count * size;
  return count * 16;
}

export function gib(bytes: number): string {
  return `${(bytes / 2 ** 30).toFixed(1)} GiB`;
}
