// What the options of a task are declared with.
export { z } from 'zod';
export { defineConfig, type SftConfig, type TrainConfig } from './cli/config.js';
export * from './evaluate/index.js';
export {
  type AdvantageKind,
  type GroupAdvantagesOptions,
  groupAdvantages,
} from './kernels/group-advantages.js';
export * as kernels from './kernels/index.js';
export * from './policy/index.js';
export * from './reward/index.js';
export * from './reward.js';
export * from './rollout/index.js';
export * from './tasks/index.js';
export * from './train/index.js';
