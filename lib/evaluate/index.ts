export { type ClusteredMean, clusteredMean } from './clustered.js';
export { type EvaluateOptions, type Evaluation, evaluate, type RowResult } from './evaluate.js';
export { type PairedDifference, pairedDifference } from './paired.js';
export { passAtK } from './pass-at-k.js';
export {
  formatVerifyReport,
  type RowProblem,
  type VerifyOptions,
  type VerifyReport,
  verifyDataset,
} from './verify.js';
