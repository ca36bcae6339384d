import { invalidArgument, MerfError } from '../errors.js';
import { type NativeBackend, type NativeModel, native } from '../native.js';
import { type ModelConfig, parameterCount } from './config.js';
import { checkLora, type DeviceOptions } from './options.js';
import { inverseFrequencies } from './rope.js';
import { seedOf } from './sampling.js';

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
 * The device of that name. `auto` is the GPU, or the CPU with the reason where there is no GPU to use or less
 * of its memory is free than `neededBytes` of it.
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

export interface PlacedModel {
  model: NativeModel;
  device: DeviceDescription;
  dtype: 'f32' | 'bf16';
  trainable: boolean;
  /** 0 where it has no adapters. */
  loraRank: number;
}

const autoBf16Parameters = 50_000_000;

/**
 * A model without weights on the device and of the type that the options ask for, or that suit it.
 * @throws MerfError INVALID_ARGUMENT, DEVICE_UNAVAILABLE, UNSUPPORTED
 */
export function placeModel(config: ModelConfig, options: DeviceOptions): PlacedModel {
  const { threads = 0, trainable = true, dtype: wanted = 'auto', lora, sessionBytes } = options;
  if (!Number.isInteger(threads) || threads < 0 || threads > 4096) {
    throw invalidArgument('threads', 'an integer from 0 to 4096', threads);
  }
  if (!['auto', 'f32', 'bf16'].includes(wanted)) throw invalidArgument('dtype', 'auto, f32 or bf16', wanted);
  if (lora !== undefined) checkLora(lora, trainable, config);
  if (sessionBytes !== undefined && !(Number.isSafeInteger(sessionBytes) && sessionBytes >= 0)) {
    throw invalidArgument('sessionBytes', 'a non-negative integer', sessionBytes);
  }
  const large = parameterCount(config) >= autoBf16Parameters;
  const dtypeOn = ({ fastBf16 }: { fastBf16: boolean }) =>
    wanted === 'auto' ? (fastBf16 && large ? 'bf16' : 'f32') : wanted;
  const { device, reason } = chooseDevice(options.device ?? 'auto', (candidate) =>
    parameterBytes(config, { dtype: dtypeOn(candidate), trainable, lora: lora !== undefined }),
  );
  const dtype = dtypeOn(device);
  const { rope, architecture: _, ...sizes } = config;
  const model = native().createModel(
    {
      ...sizes,
      rope: { inverseFrequencies: inverseFrequencies(rope, config.headSize), attentionScale: 1 },
      dtype,
    },
    { name: device.name, threads, profile: options.profile ?? false, exact: options.exact ?? false },
    lora === undefined ? trainable : { loraRank: lora.rank, loraSeed: seedOf(lora.seed ?? 0) },
    sessionBytes,
  );
  const { name, description, isa, memoryBytes } = device;
  const described = { name, description, isa, threads: threads || device.threads, memoryBytes, reason };
  return { model, device: described, dtype, trainable, loraRank: lora?.rank ?? 0 };
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

/** Bytes of the device's memory that could be taken now. */
export function freeBytesOf(device: string): number {
  return native().describeDevice(device).freeBytes;
}

export function gib(bytes: number): string {
  return `${(bytes / 2 ** 30).toFixed(1)} GiB`;
}
