export {
  type CollectOptions,
  collect,
  episodePrompt,
  type RolloutPolicy,
  type RolloutTask,
} from './collect.js';
export {
  type DrawnTurn,
  drawnTurns,
  type Episode,
  type EpisodeEnd,
  type EpisodeGroup,
  type EpisodePrompt,
  type GivenTurn,
  type PlainEpisode,
  type RenderedPrompt,
  type Turn,
  textOf,
} from './episode.js';
export {
  checkPrompts,
  movedNotice,
  type RenderedCompletion,
  type RolloutTokenizer,
  renderCompletion,
  renderPrompt,
} from './prompt.js';
export { PromptBounds, type PromptLengthOptions, PromptLengths } from './prompt-lengths.js';
export type { OnEnvironmentError } from './reply.js';
export { type LimitSettings, limitSettings, limitsOf } from './settings.js';
export { EpisodeTally } from './tally.js';
export { branchesOf, countDrawn, type TargetPlace } from './targets.js';
