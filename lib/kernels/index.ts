export * from './attention.js';
export {
  type Device,
  type DType,
  type FloatDType,
  type OpenDeviceOptions,
  openDevice,
  type Tensor,
  type TensorOptions,
} from './device.js';
export * from './group-advantages.js';
export * from './policy-loss.js';
export * from './sample-tokens.js';
