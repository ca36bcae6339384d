import type { ChatMessage } from '../prompt/chat-template.js';
import type { FinishReason } from '../reward/completion.js';

/** What the model wrote before its environment answers. */
export interface ModelTurn {
  /** Which of the model's turns in the episode, from 0. */
  readonly index: number;
  /** The turn's text without special tokens; a stop string is part of it. */
  readonly text: string;
  readonly tokens: Int32Array;
  readonly finishReason: FinishReason;
}

/**
 * What is appended to an episode: text inside the assistant's turn, which goes on after it, or messages of a tool or a
 * user that the chat template writes, with which a new turn of the assistant's begins.
 */
export type Reply = string | readonly ChatMessage[];

/**
 * The world that a model acts in, in turns. A model's turn ends with one of the `stop` strings or with its end token;
 * turns that ran out of tokens end the episode without a reply.
 */
export interface Environment<Row = unknown, State = unknown> {
  /** Strings that end a turn of the model, `</search>` for instance. */
  readonly stop?: readonly string[];
  /** Turns of the model in an episode at most (default 4). */
  readonly maxTurns?: number;
  /** Seconds that one reply may take (default 30). */
  readonly timeoutSeconds?: number;
  /** Tools that the chat template describes to the model, in the form that templates take as `tools`. */
  readonly tools?: readonly object[];
  /** The state of a new episode, which `reply` may change. */
  start?(row: Row): State | Promise<State>;
  /**
   * What follows a turn of the model; undefined where the episode has ended. Replies to different episodes run side by
   * side.
   * @param context.signal fires when the time is up or the caller gives up
   * @param context.turnsLeft how many turns of the model may still follow, at least 1
   */
  reply(
    turn: ModelTurn,
    row: Row,
    state: State,
    context: { readonly signal: AbortSignal; readonly turnsLeft: number },
  ): Reply | undefined | Promise<Reply | undefined>;
  /** What the model is told where a reply failed and the run's settings say so (default: the failure in brackets). */
  failed?(failure: string): Reply;
}
