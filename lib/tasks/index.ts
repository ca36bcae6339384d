export { type CountdownOptions, countdown } from './countdown/index.js';
export { countdownReward } from './countdown/reward.js';
export {
  type Puzzle as CountdownPuzzle,
  type Rules as CountdownRules,
  solve as solveCountdown,
} from './countdown/solver.js';
export {
  type Fields,
  generatedRows,
  listField,
  readRows,
  requireRows,
  shuffledRows,
  splitOf,
  textField,
} from './dataset.js';
export {
  type Data,
  type DataOptions,
  type Draw,
  dataShape,
  defineTask,
  type PlainTaskDefinition,
  type TaskDefinition,
  type TaskFactory,
  type TaskParts,
} from './define.js';
export type { Environment, ModelTurn, Reply } from './environment.js';
export type { BinaryKind, Claim } from './knights-and-knaves/claim.js';
export {
  type KnightsAndKnavesRow,
  parsePublishedRow,
  parseStatements,
} from './knights-and-knaves/dataset.js';
export { generatePuzzle, type Puzzle, type PuzzleOptions } from './knights-and-knaves/generator.js';
export {
  type KnightsAndKnavesOptions,
  knightsAndKnaves,
  knightsAndKnavesInstruction,
} from './knights-and-knaves/index.js';
export { knightsAndKnavesReward } from './knights-and-knaves/reward.js';
export { solve } from './knights-and-knaves/solver.js';
export { areEquivalent, type EquivalenceOptions } from './math/equivalence.js';
export { extractAnswer } from './math/extract.js';
export { type MathOptions, math } from './math/index.js';
export { mathReward } from './math/reward.js';
export { Random } from './random.js';
export {
  getTask,
  getTaskFactory,
  importModule,
  type TaskOptions,
  taskFactories,
  taskNames,
} from './registry.js';
export { Endpoint, type EndpointFormat, type EndpointOptions } from './search/endpoint.js';
export { type SearchEnvironmentOptions, searchEnvironment } from './search/environment.js';
export { type SearchOptions, search } from './search/index.js';
export { isExactMatch, normalizeAnswer } from './search/normalize.js';
export { PassageIndex, type Retriever } from './search/passage-index.js';
export { type Passage, readCorpus } from './search/passages.js';
export { type GoldenAnswers, searchReward } from './search/reward.js';
export type { SearchRow } from './search/world.js';
export type { LoadedRow, ReadOptions, RowCheck, RowSource, Split, Task } from './task.js';
