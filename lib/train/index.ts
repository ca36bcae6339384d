export { defaultKeepActivations } from './activation-memory.js';
export {
  AdaptiveMotivation,
  type AdaptiveRecord,
  type AdaptiveSettings,
  type AdaptiveSpec,
  type ComponentRecord,
  type Lift,
  type MeasuredLift,
} from './adaptive.js';
export { type Checkpoint, listCheckpoints, type Progress } from './checkpoint.js';
export type { CompletionRecord } from './completions.js';
export type { OpenTask } from './curriculum.js';
export { type Example, readExamples } from './examples.js';
export { type ImportanceWeightOptions, importanceWeights } from './importance.js';
export { type Phase, type RunResult, readSavedRun, type SavedRun, type TrainingEvent } from './loop.js';
export { type MetricsRow, readMetrics } from './metrics.js';
export { learningRateAt, type ScheduleKind, type ScheduleOptions } from './schedule.js';
export type { GrpoOptions, GrpoSettings, SftOptions, SftSettings } from './settings.js';
export {
  type SftMetrics,
  SupervisedTrainer,
  type SupervisedTrainerOptions,
} from './sft.js';
export {
  type GrpoMetrics,
  type ReferencePolicy,
  type TrainablePolicy,
  Trainer,
  type TrainerOptions,
} from './trainer.js';
