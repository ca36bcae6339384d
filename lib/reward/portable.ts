// What of specifications and their parsing runs without Node.
export {
  type CompletionInput,
  type FinishReason,
  type ParsedCompletion,
  parseCompletion,
  type TurnText,
} from './completion.js';
export { formatScore } from './describe.js';
export {
  type CaseComponent,
  type Component,
  type JudgeOptions,
  type NumericComponent,
  type Reward,
  type RewardCase,
  type RewardPart,
  RewardSpec,
  type RewardSpecOptions,
  type VerifierContext,
} from './spec.js';
