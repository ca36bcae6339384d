import { describeValue, MerfError, throwIfAborted } from '../errors.js';
import { runWithin, TimeLimitExceeded } from '../reward/guard.js';
import type { Environment, ModelTurn, Reply } from '../tasks/index.js';
import type { GivenTurn } from './episode.js';
import { continuationOf, encodeReply, type RolloutTokenizer } from './prompt.js';

/**
 * What becomes of an episode whose environment fails: `fail` ends the run, `end` the episode, `report` tells the model
 * in the environment's place.
 */
export type OnEnvironmentError = 'fail' | 'end' | 'report';

export const defaultReplySeconds = 30;

export interface ReplyOptions {
  readonly onEnvironmentError: OnEnvironmentError;
  /** Seconds that a reply may take. */
  readonly seconds: number;
  readonly signal: AbortSignal;
}

/** How to ask for a reply. */
export interface ReplyRequest extends ReplyOptions {
  /** Turns of the model that may still follow. */
  readonly turnsLeft: number;
}

/** What the environment made of a turn: tokens to go on from, an end, or a failure that ends the episode. */
export type Answer = { turn: GivenTurn } | { end: 'done' } | { end: 'failed'; failure: string };

/**
 * Asks an environment for its reply to a turn, and writes it in tokens.
 * @throws MerfError ENVIRONMENT_FAILED, ENVIRONMENT_TIMEOUT where `onEnvironmentError` is `fail`, ABORTED
 */
export async function replyTo<Row, State>(
  environment: Environment<Row, State>,
  tokenizer: RolloutTokenizer,
  turn: ModelTurn,
  row: Row,
  state: State,
  options: ReplyRequest,
): Promise<Answer> {
  const asked = await askWithin(
    (signal) => environment.reply(turn, row, state, { signal, turnsLeft: options.turnsLeft }),
    `turn ${turn.index + 1}`,
    options,
  );
  const write = (reply: Reply) => written(tokenizer, reply, turn, environment.tools);
  if ('value' in asked) {
    if (asked.value === undefined) return { end: 'done' };
    const problem = whatIsNoReply(asked.value);
    if (problem === undefined) return { turn: write(asked.value) };
    throw new MerfError('ENVIRONMENT_FAILED', `The environment's reply to turn ${turn.index + 1} ${problem}`);
  }
  const { failure } = asked;
  if (options.onEnvironmentError === 'end') return { end: 'failed', failure };
  return { turn: { ...write(environment.failed?.(failure) ?? `\n[${failure}]\n`), failure } };
}

/** The state of a new episode. @throws MerfError ENVIRONMENT_FAILED, ENVIRONMENT_TIMEOUT, ABORTED */
export async function startOf<Row, State>(
  environment: Environment<Row, State>,
  row: Row,
  options: Omit<ReplyOptions, 'onEnvironmentError'>,
): Promise<State> {
  const begin = async (): Promise<State> => environment.start?.(row) as State;
  const asked = await askWithin(begin, 'its start', { ...options, onEnvironmentError: 'fail' });
  return (asked as { value: State }).value;
}

async function askWithin<T>(
  work: (signal: AbortSignal) => T | Promise<T>,
  where: string,
  options: ReplyOptions,
): Promise<{ value: T } | { failure: string }> {
  const { seconds, signal } = options;
  const controller = new AbortController();
  const both = AbortSignal.any([signal, controller.signal]);
  try {
    return { value: await runWithin(() => work(both), seconds, signal) };
  } catch (cause) {
    throwIfAborted(signal, 'a rollout');
    const late = cause instanceof TimeLimitExceeded;
    const failure = late
      ? `The environment took longer than ${seconds} s at ${where}`
      : `The environment failed at ${where}: ${cause instanceof Error ? cause.message : String(cause)}`;
    if (options.onEnvironmentError !== 'fail') return { failure };
    throw new MerfError(late ? 'ENVIRONMENT_TIMEOUT' : 'ENVIRONMENT_FAILED', failure, { cause });
  } finally {
    controller.abort();
  }
}

function whatIsNoReply(reply: unknown): string | undefined {
  if (typeof reply === 'string') return reply === '' ? 'is empty text' : undefined;
  if (Array.isArray(reply) && reply.length > 0) return undefined;
  return `is ${describeValue(reply)}, not text, messages or undefined`;
}

function written(
  tokenizer: RolloutTokenizer,
  reply: Reply,
  turn: ModelTurn,
  tools: readonly object[] | undefined,
): GivenTurn {
  if (typeof reply === 'string') {
    const tokens = Int32Array.from(encodeReply(tokenizer, reply));
    return { role: 'environment', text: reply, tokens };
  }
  const lastToken = turn.finishReason === 'stop' ? tokenizer.decode(turn.tokens.slice(-1)) : '';
  const { text, tokens } = continuationOf(tokenizer, reply, lastToken, tools);
  return { role: 'environment', text, tokens: Int32Array.from(tokens) };
}
