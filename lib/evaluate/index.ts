export {
  type EvaluateOptions,
  type EvaluatingPolicy,
  type Evaluation,
  evaluate,
  ScoreTally,
} from './evaluate.js';
export { passAtK } from './pass-at-k.js';
export { isCorrect, scoreGroups } from './score.js';
