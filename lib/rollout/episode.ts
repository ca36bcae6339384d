import type { ChatMessage } from '../prompt/chat-template.js';
import type { MotivationView } from '../prompt/motivation.js';
import type { FinishReason, ParsedCompletion, Reward } from '../reward/index.js';

/** A prompt in the model's own terms. */
export interface RenderedPrompt {
  /** The conversation, where the prompt is one; undefined for text that is taken as it stands. */
  readonly messages: readonly ChatMessage[] | undefined;
  /** The prompt as the model sees it. */
  readonly text: string;
  readonly tokens: readonly number[];
  /**
   * The special tokens that the row's words name, which stay text unless the tokenizer allows them; absent
   * where there are none.
   */
  readonly named?: readonly string[];
}

/** What an episode begins with. */
export interface EpisodePrompt extends RenderedPrompt {
  /** What it says about the reward. */
  readonly view: MotivationView;
}

/** Tokens that the model drew, and the ones that are trained on. */
export interface DrawnTurn {
  readonly role: 'model';
  /** The tokens' text without the end token; a stop string is part of it. */
  readonly text: string;
  /** [tokens] with the token that ended the turn, if one did. */
  readonly tokens: Int32Array;
  /** [tokens] log-probabilities under softmax(logits / temperature), untruncated; where greedy, under softmax(logits). */
  readonly logprobs: Float32Array;
  /** [tokens] entropies of that distribution, in nats. */
  readonly entropies: Float32Array;
  readonly finishReason: FinishReason;
}

/** Tokens that the environment put in, which carry no loss. */
export interface GivenTurn {
  readonly role: 'environment';
  readonly text: string;
  readonly tokens: Int32Array;
  /** What the environment failed with, where these tokens tell the model of it. */
  readonly failure?: string;
}

export type Turn = DrawnTurn | GivenTurn;

/**
 * How an episode ended: as its last turn of the model did (`stop`, `stop_string`; `length`: that turn or the episode
 * ran out of tokens), at the limit of `turns`, or because its environment `failed`.
 */
export type EpisodeEnd = 'stop' | 'stop_string' | 'length' | 'turns' | 'failed';

/** An episode that has not been judged. */
export interface PlainEpisode {
  /** Episodes of a row that see the same view share one. */
  readonly prompt: EpisodePrompt;
  /** What follows the prompt; the first turn and every second one after it are the model's. */
  readonly turns: readonly Turn[];
  readonly end: EpisodeEnd;
  readonly completion: ParsedCompletion;
}

/** What one completion of a prompt became. */
export interface Episode extends PlainEpisode {
  readonly reward: Reward;
}

/** The episodes of one row. */
export interface EpisodeGroup<Row = unknown, E extends PlainEpisode = Episode> {
  readonly row: Row;
  readonly episodes: readonly E[];
  /** The episodes that were drawn first, where all of them failed and these were drawn under a hint in their place. */
  readonly failed?: readonly E[];
}

/** The turns of the model alone. */
export function drawnTurns(episode: PlainEpisode): DrawnTurn[] {
  return episode.turns.filter((turn) => turn.role === 'model');
}

/** All that follows the prompt, as text. */
export function textOf(episode: PlainEpisode): string {
  return episode.turns.map((turn) => turn.text).join('');
}
