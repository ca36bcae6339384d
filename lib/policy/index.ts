export type { OperatorTime } from '../native.js';
export type { ChatMessage } from '../prompt/chat-template.js';
export { type Branch, countTokens, forestOf } from './branches.js';
export { configToJson, type ModelConfig } from './config.js';
export { defaultModel } from './default-model.js';
export type { DeviceDescription } from './devices.js';
export type { Forest, Segment, TrainTarget } from './forest.js';
export type { TokenizerFiles } from './gguf-tokenizer.js';
export type { Loss, LossNormalizer, LossStatistics, LossStats, PolicyLossType } from './loss.js';
export { openModel, readTokenizerFiles } from './model-files.js';
export type {
  CacheStatistics,
  CreateOptions,
  DeviceOptions,
  LoraOptions,
  OptimizerOptions,
  SaveOptions,
} from './options.js';
export { Policy, type Scores } from './policy.js';
export type { RopeConfig } from './rope.js';
export type {
  Completion,
  CompletionGroup,
  EndedCompletion,
  Prompt,
  SampleChunk,
  SampleOptions,
} from './sampling.js';
export { type SystemMessages, TextStream, Tokenizer, type TokenizerOptions } from './tokenizer.js';
