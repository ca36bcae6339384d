// `merf/reward`: reward specifications, motivations, tasks and advantages, without the native part and without Node. It
// runs in browsers, Bun, Deno and edge runtimes; where `merf` is imported as well, both are the same classes.
export { MerfError, type MerfErrorCode } from './errors.js';
export { type AdvantageKind, type GroupAdvantagesOptions, groupAdvantages } from './group-advantages.js';
export type { ChatMessage } from './prompt/chat-template.js';
export {
  formatMotivation,
  type Motivation,
  type MotivationMix,
  type MotivationView,
  parseMotivation,
  type Schedule,
  type Stage,
  stageAt,
  viewOf,
  withMotivation,
} from './prompt/motivation.js';
export * from './reward/portable.js';
export { type CountdownOptions, countdown } from './tasks/countdown/index.js';
export { countdownReward } from './tasks/countdown/reward.js';
export {
  type Puzzle as CountdownPuzzle,
  type Rules as CountdownRules,
  solve as solveCountdown,
} from './tasks/countdown/solver.js';
export {
  type Data,
  type DataOptions,
  type Draw,
  defineTask,
  type PlainTaskDefinition,
  type TaskDefinition,
  type TaskFactory,
  type TaskParts,
} from './tasks/define.js';
export type { Environment, ModelTurn, Reply } from './tasks/environment.js';
export type { BinaryKind, Claim } from './tasks/knights-and-knaves/claim.js';
export {
  type KnightsAndKnavesRow,
  parsePublishedRow,
  parseStatements,
} from './tasks/knights-and-knaves/dataset.js';
export { generatePuzzle, type Puzzle, type PuzzleOptions } from './tasks/knights-and-knaves/generator.js';
export {
  type KnightsAndKnavesOptions,
  knightsAndKnaves,
  knightsAndKnavesInstruction,
} from './tasks/knights-and-knaves/index.js';
export { knightsAndKnavesReward } from './tasks/knights-and-knaves/reward.js';
export { solve } from './tasks/knights-and-knaves/solver.js';
export { Random } from './tasks/random.js';
export {
  type Fields,
  generatedRows,
  listField,
  requireRows,
  shuffledRows,
  splitOf,
  textField,
} from './tasks/rows.js';
export type { LoadedRow, ReadOptions, RowCheck, RowSource, Split, Task } from './tasks/task.js';
