export {
  type CompletionInput,
  type FinishReason,
  type ParsedCompletion,
  parseCompletion,
} from './completion.js';
export { formatScore } from './describe.js';
export {
  type CaseComponent,
  type Component,
  type NumericComponent,
  type RewardCase,
  RewardSpec,
  type RewardSpecOptions,
  type Score,
  type ScoreOptions,
  type ScorePart,
  type VerifierContext,
} from './spec.js';
export { inWorker, type WorkerOptions, type WorkerVerifier } from './worker.js';
