export { countdown } from './countdown/index.js';
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
export { Random } from './random.js';
export {
  getTask,
  getTaskFactory,
  importModule,
  type TaskOptions,
  taskFactories,
  taskNames,
} from './registry.js';
export { search } from './search/index.js';
export type { LoadedRow, RowCheck, RowSource, Split, Task } from './task.js';
