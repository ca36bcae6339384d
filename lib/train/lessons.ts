import { MerfError } from '../errors.js';
import {
  type Forest,
  forestOf,
  type Loss,
  type LossStats,
  type Policy,
  type TrainTarget,
} from '../policy/index.js';
import { formatMotivation, type LearnView, type MotivationView } from '../prompt/motivation.js';
import { labelOf } from '../reward/spec.js';
import {
  branchesOf,
  type DrawnTurn,
  drawnTurns,
  type Episode,
  type EpisodeGroup,
  type EpisodePrompt,
  episodePrompt,
  type RolloutTask,
  type RolloutTokenizer,
  type TargetPlace,
} from '../rollout/index.js';
import { importanceWeights } from './importance.js';

/**
 * How a completion that was drawn under one prompt is learned under another, with ratio r = p / p_old of a token:
 * - `none`: p_old is the policy's own probability under the prompt it is learned under when the step began, so r starts
 *   at 1 and the tokens count as if they had been drawn there (recontextualization, arXiv:2512.19027; on the same
 *   weights with and without a context, OPSD, arXiv:2602.04942);
 * - `importance`: p_old is the probability that the token was drawn with, so r is the importance ratio between the two
 *   prompts and is clipped as the loss says (Guide, arXiv:2506.13923);
 * - `truncated`: as `none`, with every token's advantage times min(w, cap), w the importance ratio between the two prompts
 *   when the step began, without gradient (truncated importance sampling, Ionides 2008).
 */
export type LearnCorrection = 'none' | 'importance' | 'truncated';

export interface LessonSettings {
  loss: Exclude<Loss['type'], 'cross_entropy'>;
  kl: number;
  entropy: number;
  temperature: number;
  maskTruncated: boolean;
  miniBatches: number;
  updatesPerRollout: number;
  learnCorrection: LearnCorrection;
  learnCap: number;
  /** Coefficient of the KL penalty between two prompts, 0 for none. */
  anchor: number;
}

export interface LessonOptions<Row> {
  policy: Pick<Policy, 'score' | 'contextLength'> & { readonly tokenizer: RolloutTokenizer };
  reference?: Pick<Policy, 'score'> | undefined;
  task: RolloutTask<Row>;
  settings: LessonSettings;
  /** The prompts that a completion is learned under. */
  learnUnder: readonly LearnView[];
  /** The prompt whose words get the gradient of the anchor's penalty, and the one that they are held to. */
  anchorUnder: MotivationView;
  anchorTo: MotivationView;
  /** The ones of the groups that weights of an earlier step drew (default: none). */
  earlier?: ReadonlySet<EpisodeGroup<Row>> | undefined;
  signal?: AbortSignal | undefined;
}

/** What one optimizer update is made of. */
export interface Lesson {
  forest: Forest;
  normalizer: Counts;
  /** The turns of the model's in the order of the forest. */
  places: readonly TargetPlace[];
}

/** How far the prompts that completions are learned under are from those that drew them. */
export interface PromptGap {
  /** Tokens learned under a prompt that did not draw them. */
  tokens: number;
  /** Mean of log p(drawn under) - log p(learned under), an estimate of the KL divergence in nats a token. */
  divergence: number;
  /** The greatest importance ratio p(learned under) / p(drawn under) of a token. */
  ratioMax: number;
  /** Share of tokens whose importance ratio was cut off at the cap. */
  truncated?: number;
}

interface Counts {
  completions: number;
  tokens: number;
}

// Log-probabilities by prompt (which is of one group), episode and turn of the model's.
type Scored = Map<EpisodePrompt, Float32Array[][]>;

/**
 * What a step's episodes teach: under which prompts, with which old and reference log-probabilities and weights. The
 * tokens stay what was drawn; the prompt before them is what changes. The loss is the mean over all pairs of a
 * completion and a prompt that it is learned under. Episodes without any gradient are left out, and count all the same
 * in what the loss divides by.
 *
 * The anchor's penalty (anchoring, arXiv:2606.11627) is `anchor` times the k3 estimate of the KL divergence between what
 * the policy says of an episode under `anchorUnder` and what it said under `anchorTo` when the step began. Its mean is
 * over the step's completions, each once: its strength doesn't depend on how many prompts they are learned under.
 */
export class Lessons<Row> {
  readonly #groups: readonly EpisodeGroup<Row>[];
  readonly #advantages: readonly (readonly number[])[];
  readonly #options: LessonOptions<Row>;
  /** By group and view. Views that say the same share a prompt. */
  readonly #prompts: Map<string, EpisodePrompt>[];
  /** By group: where the anchor's penalty stands. */
  readonly #anchored: (EpisodePrompt | undefined)[] = [];
  /** What the policy said when the step began, where that is needed and the rollout does not tell. */
  #before: Scored = new Map();
  #references: Scored = new Map();
  readonly #gap = { tokens: 0, sum: 0, ratioMax: 0, truncated: 0 };

  private constructor(
    groups: readonly EpisodeGroup<Row>[],
    advantages: readonly (readonly number[])[],
    options: LessonOptions<Row>,
  ) {
    this.#groups = groups;
    this.#advantages = advantages;
    this.#options = options;
    this.#prompts = groups.map(() => new Map());
    groups.forEach(({ episodes }, group) => {
      for (const { prompt } of episodes) this.#prompt(group, prompt.view, () => prompt);
    });
  }

  /**
   * Scores what has to be known before the first update.
   * @throws MerfError CONTEXT_EXCEEDED where an episode is too long under a prompt that did not draw it, and as `score`
   *   does
   */
  static async prepare<Row>(
    groups: readonly EpisodeGroup<Row>[],
    advantages: readonly (readonly number[])[],
    options: LessonOptions<Row>,
  ): Promise<Lessons<Row>> {
    const lessons = new Lessons(groups, advantages, options);
    await lessons.#prepare();
    return lessons;
  }

  /** The lessons of groups `from` to `to`, which one update learns. */
  slice(from: number, to: number): Lesson {
    const { normalizer, drawn } = this.#divisors(from, to);
    const byTokens = ['dapo', 'bnpo', 'cispo'].includes(this.#options.settings.loss);
    const repeats = byTokens ? normalizer.tokens / drawn.tokens : normalizer.completions / drawn.completions;
    const places: TargetPlace[] = [];
    const branches = branchesOf(
      this.#groups.slice(from, to),
      (found) => {
        const place = { ...found, group: from + found.group };
        places.push(place);
        return this.#target(place, repeats);
      },
      (group, episode) => this.#taughtUnder(from + group, episode),
    );
    return { forest: forestOf(branches), normalizer, places };
  }

  /**
   * Takes note of how far the prompts of a lesson are from those that drew its tokens, by the log-probabilities that its
   * first update found, or those of before where they are known.
   */
  note({ places }: Lesson, logprobs: LossStats['logprobs']): void {
    const { learnCap } = this.#options.settings;
    places.forEach((place, i) => {
      const { group, episode, prompt, index } = place;
      if (!this.#isLearned(place) || prompt === this.#drawnUnder(group, episode)) return;
      const learned = this.#before.get(prompt)?.[episode]?.[index] ?? logprobs[i];
      this.#turn(place).logprobs.forEach((drawn, t) => {
        const difference = drawn - (learned?.[t] as number);
        const ratio = Math.exp(-difference);
        this.#gap.tokens += 1;
        this.#gap.sum += difference;
        this.#gap.ratioMax = Math.max(this.#gap.ratioMax, ratio);
        if (ratio > learnCap) this.#gap.truncated += 1;
      });
    });
  }

  /** Undefined where all is learned under the prompts that drew it. */
  gap(): PromptGap | undefined {
    const { tokens, sum, ratioMax, truncated } = this.#gap;
    if (tokens === 0) return undefined;
    const cut = this.#options.settings.learnCorrection === 'truncated' && { truncated: truncated / tokens };
    return { tokens, divergence: sum / tokens, ratioMax, ...cut };
  }

  async #prepare(): Promise<void> {
    const { policy, reference, settings, anchorUnder, anchorTo, earlier } = this.#options;
    const { kl, anchor, learnCorrection, updatesPerRollout, miniBatches } = settings;
    if (anchor > 0) {
      this.#groups.forEach((_, group) => {
        const prompt = this.#prompt(group, anchorUnder);
        // A target has one KL penalty: where the loss has its own, the anchor's takes a path of its own.
        this.#anchored[group] = kl > 0 ? { ...prompt } : prompt;
      });
    }
    this.#checkLengths();

    const severalUpdates = updatesPerRollout * miniBatches > 1;
    const asksForOld = learnCorrection === 'truncated' || (learnCorrection === 'none' && severalUpdates);
    this.#before = await this.#score(policy, (group, episode) => {
      const drawnUnder = this.#drawnUnder(group, episode);
      const learned = asksForOld && this.#hasSignal(group, episode) ? this.#learned(group, episode) : [];
      const old = learned.filter((prompt) => prompt !== drawnUnder);
      if (anchor === 0 || this.#isMasked(group, episode)) return old;
      const heldTo = this.#prompt(group, anchorTo);
      const rolloutTells = heldTo === drawnUnder && !earlier?.has(this.#groups[group] as EpisodeGroup<Row>);
      return rolloutTells ? old : unique([...old, heldTo]);
    });
    if (kl > 0 && reference) {
      this.#references = await this.#score(reference, (group, episode) =>
        this.#hasSignal(group, episode) ? this.#learned(group, episode) : [],
      );
    }
  }

  /** What is trained on at a place; `repeats` is how often what the loss divides by counts a completion or token. */
  #target(place: TargetPlace, repeats: number): TrainTarget {
    const { group, episode, index } = place;
    const { anchor, kl } = this.#options.settings;
    const target = this.#isLearned(place)
      ? this.#policyTarget(place)
      : { advantage: 0, entropy: 0, logprobs: undefined };
    if (place.prompt !== this.#anchored[group]) {
      const referenceLogprobs = kl > 0 ? this.#references.get(place.prompt)?.[episode]?.[index] : undefined;
      return { ...target, ...(referenceLogprobs && { referenceLogprobs }) };
    }
    const heldTo = this.#prompt(group, this.#options.anchorTo);
    return { ...target, kl: anchor * repeats, referenceLogprobs: this.#logprobsBefore(place, heldTo) };
  }

  #policyTarget(place: TargetPlace): TrainTarget {
    const { group, episode, prompt } = place;
    const { learnCorrection, learnCap } = this.#options.settings;
    const { logprobs: drawn } = this.#turn(place);
    const advantage = this.#advantages[group]?.[episode] as number;
    if (learnCorrection === 'importance' || prompt === this.#drawnUnder(group, episode)) {
      return { advantage, logprobs: drawn };
    }
    // Without old log-probabilities those of the update itself stand in, so that its ratio is 1.
    const old = this.#logprobsBefore(place, prompt);
    if (learnCorrection === 'none' || old === undefined) return { advantage, logprobs: old };
    const weights = importanceWeights(old, drawn, { cap: learnCap });
    return { advantage: weights.map((weight) => advantage * weight), logprobs: old };
  }

  /** What the policy said of a turn under a prompt when the step began; undefined where nothing asked for it. */
  #logprobsBefore(place: TargetPlace, prompt: EpisodePrompt): Float32Array | undefined {
    const { group, episode, index } = place;
    const scored = this.#before.get(prompt)?.[episode]?.[index];
    return scored ?? (prompt === this.#drawnUnder(group, episode) ? this.#turn(place).logprobs : undefined);
  }

  /** Log-probabilities of the episodes under the prompts that `under` gives for each. */
  async #score(
    policy: Pick<Policy, 'score'>,
    under: (group: number, episode: number) => readonly EpisodePrompt[],
  ): Promise<Scored> {
    const places: TargetPlace[] = [];
    const branches = branchesOf(
      this.#groups,
      (place) => {
        places.push(place);
        return {};
      },
      under,
    );
    const scored: Scored = new Map();
    if (branches.length === 0) return scored;
    const { signal, settings } = this.#options;
    const { logprobs } = await policy.score(forestOf(branches), {
      temperature: settings.temperature,
      signal,
    });
    places.forEach(({ prompt, episode, index }, i) => {
      const episodes = scored.get(prompt) ?? [];
      scored.set(prompt, episodes);
      episodes[episode] ??= [];
      (episodes[episode] as Float32Array[])[index] = logprobs[i] as Float32Array;
    });
    return scored;
  }

  /** The prompts that an episode has a gradient under. */
  #taughtUnder(group: number, episode: number): EpisodePrompt[] {
    if (this.#isMasked(group, episode)) return [];
    const learned = this.#hasSignal(group, episode) ? this.#learned(group, episode) : [];
    const anchored = this.#anchored[group];
    return unique(anchored ? [...learned, anchored] : learned);
  }

  /** The prompts that an episode is learned under. */
  #learned(group: number, episode: number): EpisodePrompt[] {
    const drawnUnder = this.#drawnUnder(group, episode);
    const { learnUnder } = this.#options;
    return unique(learnUnder.map((view) => (view === 'same' ? drawnUnder : this.#prompt(group, view))));
  }

  #isLearned({ group, episode, prompt }: TargetPlace): boolean {
    return this.#learned(group, episode).includes(prompt);
  }

  #drawnUnder(group: number, episode: number): EpisodePrompt {
    return this.#prompt(group, this.#episode(group, episode).prompt.view);
  }

  /** A group's prompt under a view, which all its episodes share. */
  #prompt(group: number, view: MotivationView, render = () => this.#render(group, view)): EpisodePrompt {
    const prompts = this.#prompts[group] as Map<string, EpisodePrompt>;
    const key = JSON.stringify(view);
    let prompt = prompts.get(key);
    if (prompt === undefined) {
      const rendered = render();
      prompt = [...prompts.values()].find((other) => isSame(other.tokens, rendered.tokens)) ?? rendered;
      prompts.set(key, prompt);
    }
    return prompt;
  }

  #render(group: number, view: MotivationView): EpisodePrompt {
    const { policy, task } = this.#options;
    return episodePrompt(policy.tokenizer, task, (this.#groups[group] as EpisodeGroup<Row>).row, view);
  }

  #episode(group: number, episode: number): Episode {
    return (this.#groups[group] as EpisodeGroup<Row>).episodes[episode] as Episode;
  }

  #turn({ group, episode, index }: TargetPlace): DrawnTurn {
    return drawnTurns(this.#episode(group, episode))[index] as DrawnTurn;
  }

  /** Whether an episode has a gradient beside the anchor's. */
  #hasSignal(group: number, episode: number): boolean {
    const { kl, entropy } = this.#options.settings;
    if (this.#isMasked(group, episode)) return false;
    return kl > 0 || entropy !== 0 || this.#advantages[group]?.[episode] !== 0;
  }

  #isMasked(group: number, episode: number): boolean {
    return this.#options.settings.maskTruncated && this.#episode(group, episode).end === 'length';
  }

  /** @throws MerfError CONTEXT_EXCEEDED naming the row and the view, before anything is scored or learned */
  #checkLengths(): void {
    const { policy, settings, anchorTo } = this.#options;
    this.#groups.forEach(({ row, episodes }, group) => {
      episodes.forEach(({ turns }, episode) => {
        const prompts = this.#taughtUnder(group, episode);
        if (prompts.length > 0 && settings.anchor > 0) prompts.push(this.#prompt(group, anchorTo));
        const after = turns.reduce((sum, { tokens }) => sum + tokens.length, 0);
        for (const { tokens, view } of prompts) {
          if (tokens.length + after <= policy.contextLength) continue;
          throw new MerfError(
            'CONTEXT_EXCEEDED',
            `Expected at most ${policy.contextLength} tokens but completion ${episode} of row ${labelOf(row)} has ` +
              `${after} behind the ${tokens.length} of its prompt under ${formatMotivation(view)}, which did not draw it`,
          );
        }
      });
    });
  }

  /** What the loss over groups `from` to `to` divides by, and the same with each completion once. */
  #divisors(from: number, to: number): { normalizer: Counts; drawn: Counts } {
    const { loss, miniBatches } = this.#options.settings;
    const own = this.#count(from, to);
    // DAPO and CISPO divide by the tokens of the whole rollout, in equal parts; the others by what an update holds.
    if (loss !== 'dapo' && loss !== 'cispo') return own;
    const all = this.#count(0, this.#groups.length);
    return {
      normalizer: { ...own.normalizer, tokens: all.normalizer.tokens / miniBatches },
      drawn: { ...own.drawn, tokens: all.drawn.tokens / miniBatches },
    };
  }

  /** Completions and tokens that groups `from` to `to` have in the loss, those without a gradient included. */
  #count(from: number, to: number): { normalizer: Counts; drawn: Counts } {
    const normalizer = { completions: 0, tokens: 0 };
    const drawn = { completions: 0, tokens: 0 };
    for (let group = from; group < to; group++) {
      (this.#groups[group] as EpisodeGroup<Row>).episodes.forEach((each, episode) => {
        const prompts = this.#learned(group, episode).length;
        normalizer.completions += prompts;
        drawn.completions += 1;
        if (this.#isMasked(group, episode)) return;
        for (const { tokens } of drawnTurns(each)) {
          normalizer.tokens += prompts * tokens.length;
          drawn.tokens += tokens.length;
        }
      });
    }
    return { normalizer, drawn };
  }
}

function unique<Value>(values: readonly Value[]): Value[] {
  return [...new Set(values)];
}

function isSame(a: readonly number[], b: readonly number[]): boolean {
  return a.length === b.length && a.every((token, i) => token === b[i]);
}

/** How the metrics name the prompts that completions are learned under. */
export function formatLearnUnder(views: readonly LearnView[]): string {
  return views.map((view) => (view === 'same' ? view : formatMotivation(view))).join('/');
}
