export { type EvaluateOptions, type Evaluation, evaluate } from './evaluate.js';
export { passAtK } from './pass-at-k.js';
export {
  formatVerifyReport,
  type RowProblem,
  type VerifyOptions,
  type VerifyReport,
  verifyDataset,
} from './verify.js';
