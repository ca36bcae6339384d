import { describeValue, invalidArgument, MerfError } from '../errors.js';
import { type NativeDevice, type NativeTensor, native } from '../native.js';

export type DType = 'f32' | 'bf16' | 'i32';
/** The types that most kernels compute in; both are read as float32. */
export type FloatDType = 'f32' | 'bf16';

/** How a device is chosen. */
export interface OpenDeviceOptions {
  /** CPU threads; 0 (default): one for each processor that this process may run on. */
  threads?: number | undefined;
}

export interface TensorOptions<D extends DType = DType> {
  /** Default: i32 for an Int32Array, else f32. bf16 is rounded to nearest even. */
  dtype?: D | undefined;
  /** Default: one dimension, as long as the data. */
  shape?: readonly number[] | undefined;
}

/** Key of the constructors: devices and tensors come from `openDevice`, `device.tensor` and kernels alone. */
const internal = Symbol('merf kernels');

/**
 * A dense row-major array on a device. It holds memory there until `dispose`, or until the garbage collector finds it;
 * with large ones, don't wait for that.
 */
export class Tensor<D extends DType = DType> {
  readonly shape: readonly number[];
  readonly dtype: D;
  readonly device: Device;
  readonly #native: NativeTensor;

  /** @internal */
  constructor(key: symbol, device: Device, tensor: NativeTensor) {
    if (key !== internal) throw new MerfError('INVALID_ARGUMENT', 'Tensors are made by device.tensor');
    this.shape = tensor.shape;
    this.dtype = tensor.dtype as D;
    this.device = device;
    this.#native = tensor;
  }

  get disposed(): boolean {
    return this.#native.disposed;
  }

  /**
   * The values, row-major, when everything asked of the device before is done: an Int32Array for i32, else a
   * Float32Array.
   * @throws MerfError DISPOSED, OUT_OF_MEMORY
   */
  async read(): Promise<D extends 'i32' ? Int32Array : Float32Array> {
    return (await this.#native.read()) as D extends 'i32' ? Int32Array : Float32Array;
  }

  /** Gives the memory back when the kernels that use it are done. Any later use fails with DISPOSED. */
  dispose(): void {
    this.#native.dispose();
  }

  /** Disposes of the tensor at the end of a block: `using logits = device.tensor(values)`. */
  [Symbol.dispose](): void {
    this.dispose();
  }

  /** @internal */
  static handle(key: symbol, tensor: unknown, name: string): NativeTensor {
    if (key !== internal || !(tensor instanceof Tensor)) {
      throw new MerfError(
        'INVALID_ARGUMENT',
        `Expected a Tensor for ${name} but received ${describeValue(tensor)}`,
      );
    }
    return tensor.#native;
  }
}

/** A processor to run kernels on. They run on a thread of its own, in the order in which they were called. */
export class Device {
  readonly name: string;
  readonly #native: NativeDevice;

  /** @internal */
  constructor(key: symbol, device: NativeDevice) {
    if (key !== internal) throw new MerfError('INVALID_ARGUMENT', 'Devices are made by openDevice');
    this.#native = device;
    this.name = device.name;
  }

  /**
   * A tensor with these values, or one of zeros where a shape is given alone.
   * @throws MerfError INVALID_ARGUMENT
   */
  tensor(data: Float32Array, options?: TensorOptions<FloatDType>): Tensor<FloatDType>;
  tensor(data: Int32Array, options?: TensorOptions<'i32'>): Tensor<'i32'>;
  tensor<D extends DType = 'f32'>(shape: readonly number[], options?: { dtype?: D | undefined }): Tensor<D>;
  tensor(data: Float32Array | Int32Array | readonly number[], options: TensorOptions = {}): Tensor {
    const zeros = Array.isArray(data);
    if (!zeros && !ArrayBuffer.isView(data)) {
      throw invalidArgument('data', 'a Float32Array, an Int32Array or a shape', data);
    }
    if (zeros && options.shape !== undefined) {
      throw invalidArgument('options.shape', 'nothing beside a shape', options.shape);
    }
    const values = zeros ? null : (data as Float32Array | Int32Array);
    const integers = values !== null && Object.prototype.toString.call(values) === '[object Int32Array]';
    const shape = zeros ? data : (options.shape ?? [(values as Float32Array).length]);
    const dtype = options.dtype ?? (integers ? 'i32' : 'f32');
    return new Tensor(internal, this, this.#native.tensor(values, [...shape], dtype));
  }

  /** @internal */
  static handle(key: symbol, device: Device): NativeDevice {
    if (key !== internal) throw new MerfError('INVALID_ARGUMENT', 'Devices are made by openDevice');
    return device.#native;
  }
}

/**
 * @param name as `merf doctor` lists them
 * @throws MerfError DEVICE_UNAVAILABLE, NATIVE_MISSING
 */
export function openDevice(name = 'cpu', options: OpenDeviceOptions = {}): Device {
  return new Device(internal, native().openDevice({ name, threads: options.threads ?? 0 }));
}

/** The native side of a kernel call: the device of its tensors and a way in and out for them. @internal */
export function kernelCall(first: unknown, name: string) {
  Tensor.handle(internal, first, name);
  const { device } = first as Tensor;
  return {
    device: Device.handle(internal, device),
    handle: (tensor: Tensor, argument: string) => Tensor.handle(internal, tensor, argument),
    optional: (tensor: Tensor | undefined, argument: string) =>
      tensor === undefined ? undefined : Tensor.handle(internal, tensor, argument),
    tensor: <D extends DType>(tensor: NativeTensor) => new Tensor<D>(internal, device, tensor),
  };
}
