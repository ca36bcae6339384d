import { setMaxListeners } from 'node:events';
import { invalidArgument, throwIfAborted } from '../errors.js';
import type { Completion, Policy, SampleChunk } from '../policy/index.js';
import type { ChatMessage } from '../prompt/chat-template.js';
import { isMix, type MotivationMix, type MotivationView, viewOf } from '../prompt/motivation.js';
import { parseCompletion, type RewardSpec, type TurnText } from '../reward/index.js';
import { defaultVerifiersAtOnce, Judge } from '../reward/judge.js';
import { startWatch } from '../reward/watchdog.js';
import type { Environment } from '../tasks/index.js';
import type {
  Episode,
  EpisodeEnd,
  EpisodeGroup,
  EpisodePrompt,
  GivenTurn,
  PlainEpisode,
  Turn,
} from './episode.js';
import { type RolloutTokenizer, renderPrompt } from './prompt.js';
import { type Answer, defaultReplySeconds, type OnEnvironmentError, replyTo, startOf } from './reply.js';

/** What a rollout asks of a policy. `Policy` has it. */
export type RolloutPolicy = Pick<Policy, 'sample' | 'contextLength'> & {
  readonly tokenizer: RolloutTokenizer;
};

/** What a rollout asks of a task: prompts, and where episodes are judged a reward. `Task` has it. */
export interface RolloutTask<Row> {
  /** The conversation that an episode begins with, or a text that is taken as it stands. */
  messages(row: Row, motivation: MotivationView): string | readonly ChatMessage[];
  readonly environment?: Environment<Row>;
  readonly spec?: RewardSpec<Row>;
}

export interface CollectOptions {
  /** Episodes of each row. Default 1. */
  n?: number | undefined;
  /**
   * What the prompts say about the reward: one view, or a mix that the episodes of a row are divided over (`viewOf`).
   * Default `none`.
   */
  motivation?: MotivationView | MotivationMix | undefined;
  /** The most tokens of a turn of the model. Default 256. */
  maxTokens?: number | undefined;
  /** The most tokens of an episode after its prompt, the environment's included. Default: what the context leaves. */
  maxEpisodeTokens?: number | undefined;
  /** The most turns of the model in an episode. Default: the environment's. */
  maxTurns?: number | undefined;
  /** Seconds that a reply of the environment may take. Default: the environment's. */
  replySeconds?: number | undefined;
  /** What becomes of an episode whose environment fails. Default `fail`. */
  onEnvironmentError?: OnEnvironmentError | undefined;
  /** Completions that are judged at once. Default 64. */
  verifiersAtOnce?: number | undefined;
  temperature?: number | undefined;
  topK?: number | undefined;
  topP?: number | undefined;
  minP?: number | undefined;
  /** Strings that end a turn, beside those of the environment. */
  stop?: readonly string[] | undefined;
  /** Seed of the draws. An episode depends on it, its row's place among the rows and its own in the group. */
  seed?: number | bigint | undefined;
  /** Bytes to keep activations in, see `Policy.sample`; episodes of several turns leave them aside. */
  keepActivations?: number | undefined;
  /** How messages name the rows (default: a row's `id` or `index`, or the beginning of its JSON). */
  labels?: readonly string[] | undefined;
  signal?: AbortSignal | undefined;
  /** Hears of tokens of the first turn as they are drawn, see `Policy.sample`: `prompt` counts the rows. */
  onToken?: ((chunk: SampleChunk) => void) | undefined;
  /** How many rows were collected before these under the same seed: the place of a row among all. Default 0. */
  firstRow?: number | undefined;
  /** Told of how long the engine and the environments took, and how long judging took after them, in seconds. */
  onTimes?: ((times: { rollout: number; judging: number }) => void) | undefined;
}

// The random stream of a turn is that of a completion of its own: a group has fewer completions than this.
const streamsOfATurn = 1 << 20;

interface OpenEpisode {
  readonly prompt: EpisodePrompt;
  readonly row: number;
  readonly index: number;
  readonly turns: Turn[];
  drawn: number;
  tokens: number;
  state: Promise<unknown> | undefined;
  /** What comes after a turn that has ended while others of its wave are being drawn. */
  next: Promise<Next> | undefined;
}

type EndedTurn = Pick<Completion, 'text' | 'tokens' | 'finishReason'>;
type Judged = Omit<PlainEpisode, 'prompt' | 'turns'> & Partial<Pick<Episode, 'reward'>>;
type Next = { turn: GivenTurn } | { episode: Promise<Judged> };

/**
 * Draws `n` episodes of every row and judges them: the one way from rows to judged episodes, which training, evaluation
 * and a user's own loop share. What the model drew stays the tokens it drew; nothing is decoded and encoded again.
 *
 * Turns are drawn in waves: those of all episodes that are ready go to the engine together. Environments and verifiers
 * work on what has ended while the engine goes on with the rest, and no wave waits for an environment that is slower
 * than others. What is drawn does not depend on how episodes fall into waves.
 *
 * @param task one without `spec` gives episodes that are not judged
 * @returns groups in the order of the rows
 * @throws MerfError INVALID_ARGUMENT, CONTEXT_EXCEEDED where a prompt fills the context, VERIFIER_FAILED,
 *   VERIFIER_TIMEOUT, ENVIRONMENT_FAILED, ENVIRONMENT_TIMEOUT, ABORTED
 */
export function collect<Row>(
  policy: RolloutPolicy,
  task: RolloutTask<Row> & { readonly spec: RewardSpec<Row> },
  rows: readonly Row[],
  options?: CollectOptions,
): Promise<EpisodeGroup<Row>[]>;
export function collect<Row>(
  policy: RolloutPolicy,
  task: RolloutTask<Row>,
  rows: readonly Row[],
  options?: CollectOptions,
): Promise<EpisodeGroup<Row, PlainEpisode>[]>;
export function collect<Row>(
  policy: RolloutPolicy,
  task: RolloutTask<Row>,
  rows: readonly Row[],
  options: CollectOptions = {},
): Promise<EpisodeGroup<Row, PlainEpisode | Episode>[]> {
  return new Collection(policy, task, rows, options).run();
}

class Collection<Row> {
  readonly #open: OpenEpisode[][];
  readonly #judge: Judge<Row> | undefined;
  readonly #ended: Promise<PlainEpisode | Episode>[][];
  readonly #maxTurns: number;
  // Fires where the caller gives up, and where one part fails, so that the others do not go on.
  readonly #abort = new AbortController();
  readonly #signal: AbortSignal;
  #failure: { error: unknown } | undefined;
  #ready: OpenEpisode[] = [];
  readonly #following = new Set<Promise<void>>();

  constructor(
    private readonly policy: RolloutPolicy,
    private readonly task: RolloutTask<Row>,
    private readonly rows: readonly Row[],
    private readonly options: CollectOptions,
  ) {
    const { environment, spec } = task;
    if (environment) startWatch();
    const n = whole('n', options.n, 1);
    whole('maxEpisodeTokens', options.maxEpisodeTokens, 1);
    this.#maxTurns = environment ? whole('maxTurns', options.maxTurns, environment.maxTurns ?? 4) : 1;
    const atOnce = whole('verifiersAtOnce', options.verifiersAtOnce, defaultVerifiersAtOnce);
    this.#judge = spec && new Judge(spec, atOnce);
    const { motivation = 'none' } = options;
    const mix = isMix(motivation) ? motivation : [motivation];
    if (mix.length === 0 || mix.length > n) {
      throw invalidArgument('motivation', `1 to ${n} views, for ${n} episodes of a row,`, motivation);
    }
    this.#open = rows.map((row, i) => {
      const prompts = new Map<string, EpisodePrompt>();
      const promptOf = (view: MotivationView) => {
        const key = JSON.stringify(view);
        const prompt = prompts.get(key) ?? episodePrompt(policy.tokenizer, task, row, view);
        prompts.set(key, prompt);
        return prompt;
      };
      return Array.from({ length: n }, (_, index) => ({
        prompt: promptOf(viewOf(mix, index, n)),
        row: i,
        index,
        turns: [],
        drawn: 0,
        tokens: 0,
        state: undefined,
        next: undefined,
      }));
    });
    this.#ended = rows.map(() => new Array<Promise<PlainEpisode>>(n));
    const { signal } = options;
    this.#signal = signal ? AbortSignal.any([signal, this.#abort.signal]) : this.#abort.signal;
    // Every verifier and environment listens to it.
    setMaxListeners(0, this.#signal);
  }

  async run(): Promise<EpisodeGroup<Row, PlainEpisode | Episode>[]> {
    const started = performance.now();
    throwIfAborted(this.options.signal, 'a rollout');
    try {
      if (this.rows.length > 0) await this.#firstTurns();
      for (;;) {
        if (this.#failure) throw this.#failure.error;
        if (this.#ready.length > 0) await this.#furtherTurns(this.#ready.splice(0));
        else if (this.#following.size > 0) await Promise.race(this.#following);
        else break;
      }
      const rolledOut = performance.now();
      const groups = await Promise.all(
        this.rows.map(async (row, i) => ({
          row,
          episodes: await Promise.all(this.#ended[i] as Promise<PlainEpisode>[]),
        })),
      );
      const judging = (performance.now() - rolledOut) / 1000;
      this.options.onTimes?.({ rollout: (rolledOut - started) / 1000, judging });
      return groups;
    } catch (error) {
      throwIfAborted(this.options.signal, 'a rollout');
      throw this.#failure?.error ?? error;
    } finally {
      this.#abort.abort();
    }
  }

  async #firstTurns(): Promise<void> {
    const episodes = this.#open.flat();
    const { firstRow = 0, onToken, keepActivations } = this.options;
    // Episodes of one prompt are asked for together; of a mix each has a prompt of its own, in the same random stream.
    const alike = this.#open.every((row) => row.every(({ prompt }) => prompt === row[0]?.prompt));
    const firsts = alike ? this.#open.map(([first]) => first as OpenEpisode) : episodes;
    const n = episodes.length / firsts.length;
    await this.#draw(
      episodes,
      firsts.map(({ prompt }) => prompt.tokens),
      {
        n,
        keys: firsts.map(({ row }) => firstRow + row),
        firstIndices: firsts.map(({ index }) => index),
        ...(onToken && {
          onToken: ({ prompt, completion, ...chunk }) => {
            const { row, index } = episodes[prompt * n + completion] as OpenEpisode;
            onToken({ prompt: row, completion: index, ...chunk });
          },
        }),
      },
      // An episode of several turns has no update right after its first sampling.
      this.task.environment ? 0 : keepActivations,
    );
  }

  async #furtherTurns(episodes: readonly OpenEpisode[]): Promise<void> {
    const { firstRow = 0 } = this.options;
    const prompts = episodes.map(({ prompt, turns }) =>
      Int32Array.from([prompt.tokens, ...turns.map((turn) => turn.tokens)].flatMap((part) => [...part])),
    );
    await this.#draw(
      episodes,
      prompts,
      {
        keys: episodes.map(({ row }) => firstRow + row),
        firstIndices: episodes.map(({ index, drawn }) => index + drawn * streamsOfATurn),
      },
      0,
    );
  }

  /** Draws the next turn of `episodes`, which are in the order of the completions. */
  async #draw(
    episodes: readonly OpenEpisode[],
    prompts: readonly ArrayLike<number>[],
    request: Parameters<RolloutPolicy['sample']>[1],
    keepActivations: number | undefined,
  ): Promise<void> {
    const { maxTokens = 256, temperature, topK, topP, minP, stop = [], seed } = this.options;
    const n = episodes.length / prompts.length;
    const stops = [...stop, ...(this.task.environment?.stop ?? [])];
    const groups = await this.policy.sample(prompts, {
      ...request,
      maxTokens: prompts.map((_, p) => Math.min(maxTokens, this.#room(episodes[p * n] as OpenEpisode))),
      temperature,
      topK,
      topP,
      minP,
      ...(stops.length > 0 && { stop: stops }),
      seed,
      keepActivations,
      signal: this.#signal,
      onCompletion: ({ prompt, completion, ...ended }) => {
        const episode = episodes[prompt * n + completion] as OpenEpisode;
        episode.next = this.#next(episode, ended);
        episode.next.catch(() => undefined);
      },
    });
    throwIfAborted(this.#signal, 'a rollout');
    for (const [p, group] of groups.entries()) {
      for (const [i, completion] of group.completions.entries()) {
        this.#take(episodes[p * n + i] as OpenEpisode, completion);
      }
    }
  }

  /** Adds a turn of the model's, and what follows it once that is there. */
  #take(open: OpenEpisode, completion: Completion): void {
    const { text, tokens, logprobs, entropies, finishReason } = completion;
    const next = open.next ?? this.#next(open, completion);
    open.next = undefined;
    open.turns.push({ role: 'model', text, tokens, logprobs, entropies, finishReason });
    open.tokens += tokens.length;
    open.drawn += 1;
    const following = next
      .then((value) => this.#follow(open, value))
      .finally(() => this.#following.delete(following));
    // What fails ends the rest at once and is told when that has ended.
    following.catch((error: unknown) => this.#fail(error));
    this.#following.add(following);
  }

  /** What comes after a turn that the model has ended and that is not among the episode's turns yet. */
  async #next(open: OpenEpisode, ended: EndedTurn): Promise<Next> {
    const { environment } = this.task;
    const { finishReason } = ended;
    // The turn joins the others while its environment is at work: what is read after that would count it twice.
    const before = [...open.turns];
    const room = this.#room(open);
    const end = (how: EpisodeEnd): Next => {
      const episode = this.#episode(open, before, ended, how);
      // Its failure has ended the rollout by the time that anyone awaits it.
      episode.catch(() => undefined);
      return { episode };
    };
    try {
      if (finishReason === 'pending' || finishReason === 'length') return end('length');
      if (environment === undefined) return end(finishReason);
      // A stop string asks the environment for something, an end token need not.
      if (open.drawn + 1 >= this.#maxTurns) return end(finishReason === 'stop' ? 'stop' : 'turns');
      const answer = await this.#answer(environment, open, ended);
      if ('turn' in answer) {
        const left = room - ended.tokens.length - answer.turn.tokens.length;
        // A reply that leaves the model no room to go on is left out.
        return left < 1 ? end('length') : answer;
      }
      return end(answer.end === 'failed' ? 'failed' : finishReason);
    } catch (error) {
      this.#fail(error);
      throw error;
    }
  }

  async #answer(environment: Environment<Row>, open: OpenEpisode, ended: EndedTurn): Promise<Answer> {
    const row = this.rows[open.row] as Row;
    const { onEnvironmentError = 'fail' } = this.options;
    const seconds = this.options.replySeconds ?? environment.timeoutSeconds ?? defaultReplySeconds;
    const turnsLeft = this.#maxTurns - open.drawn - 1;
    const options = { onEnvironmentError, seconds, turnsLeft, signal: this.#signal };
    open.state ??= startOf(environment, row, options);
    const { text, tokens, finishReason } = ended;
    const turn = { index: open.drawn, text, tokens, finishReason };
    return replyTo(environment, this.policy.tokenizer, turn, row, await open.state, options);
  }

  /** Judges the episode that ends with `last` after `turns`. */
  async #episode(
    { prompt, row }: OpenEpisode,
    turns: readonly Turn[],
    last: EndedTurn,
    end: EpisodeEnd,
  ): Promise<Judged> {
    const texts: TurnText[] = [...turns, { role: 'model' as const, text: last.text }];
    const drawn = turns.reduce((sum, turn) => sum + (turn.role === 'model' ? turn.tokens.length : 0), 0);
    const completion = parseCompletion({
      raw: texts.map(({ role, text }) => (role === 'model' ? text : '')).join(''),
      prompt: prompt.text,
      finishReason: last.finishReason,
      tokenCount: drawn + last.tokens.length,
      turns: texts.map(({ role, text }) => ({ role, text })),
    });
    try {
      const label = this.options.labels?.[row];
      const options = { signal: this.#signal, ...(label !== undefined && { label }) };
      const reward = await this.#judge?.judge(completion, this.rows[row] as Row, options);
      return { end, completion, ...(reward && { reward }) };
    } catch (error) {
      this.#fail(error);
      throw error;
    }
  }

  #follow(open: OpenEpisode, next: Next): void {
    if ('turn' in next) {
      open.turns.push(next.turn);
      open.tokens += next.turn.tokens.length;
      this.#ready.push(open);
      return;
    }
    const { prompt, turns } = open;
    (this.#ended[open.row] as Promise<PlainEpisode>[])[open.index] = next.episode.then((judged) => ({
      prompt,
      turns,
      ...judged,
    }));
  }

  /** Tokens that may follow what an episode has. */
  #room({ prompt, tokens }: OpenEpisode): number {
    const most = this.options.maxEpisodeTokens ?? Number.POSITIVE_INFINITY;
    // A prompt that fills the context is for the policy to refuse.
    return Math.max(1, Math.min(this.policy.contextLength - prompt.tokens.length, most) - tokens);
  }

  #fail(error: unknown): void {
    this.#failure ??= { error };
    this.#abort.abort();
  }
}

/** The prompt of a row under a view. */
export function episodePrompt<Row>(
  tokenizer: RolloutTokenizer,
  task: RolloutTask<Row>,
  row: Row,
  view: MotivationView,
): EpisodePrompt {
  return { ...renderPrompt(tokenizer, task.messages(row, view), task.environment?.tools), view };
}

function whole(name: string, value: number | undefined, fallback: number): number {
  const chosen = value ?? fallback;
  if (!Number.isInteger(chosen) || chosen < 1) throw invalidArgument(name, 'a whole number from 1', value);
  return chosen;
}
