import {
  type Branch,
  type Forest,
  forestOf,
  type Loss,
  type LossStats,
  type Policy,
  type TrainTarget,
} from '../policy/index.js';
import { formatMotivation, type LearnView, type MotivationView } from '../prompt/motivation.js';
import {
  branchesOf,
  drawnTurns,
  type Episode,
  type EpisodeGroup,
  type EpisodePrompt,
  episodePrompt,
  type RolloutTask,
  type RolloutTokenizer,
  type TargetPlace,
} from '../rollout/index.js';

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
  policy: Pick<Policy, 'score'> & { readonly tokenizer: RolloutTokenizer };
  reference?: Pick<Policy, 'score'> | undefined;
  task: RolloutTask<Row>;
  settings: LessonSettings;
  /** The prompts that a completion is learned under. */
  learnUnder: readonly LearnView[];
  /** The prompt whose words get the gradient of the anchor's penalty, and the one that they are held to. */
  anchorUnder: MotivationView;
  anchorTo: MotivationView;
  signal?: AbortSignal | undefined;
}

/** What one optimizer update is made of. */
export interface Lesson {
  forest: Forest;
  normalizer: { completions: number; tokens: number };
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

// By prompt, episode and turn of the model's.
type Targets = Map<EpisodePrompt, (TrainTarget[] | undefined)[]>;
type Scored = Map<EpisodePrompt, Float32Array[][]>;

/**
 * What a step's episodes teach: under which prompts, with which old and reference log-probabilities and weights. The
 * tokens stay what was drawn; the prompt before them is what changes. Episodes without any gradient are left out, and
 * count all the same in what the loss divides by.
 */
export class Lessons<Row> {
  readonly #groups: readonly EpisodeGroup<Row>[];
  readonly #advantages: readonly (readonly number[])[];
  readonly #options: LessonOptions<Row>;
  readonly #prompts: Map<string, EpisodePrompt>[];
  readonly #targets: Targets = new Map();
  readonly #gap = { tokens: 0, sum: 0, ratioMax: 0, truncated: 0 };

  private constructor(
    groups: readonly EpisodeGroup<Row>[],
    advantages: readonly (readonly number[])[],
    options: LessonOptions<Row>,
  ) {
    this.#groups = groups;
    this.#advantages = advantages;
    this.#options = options;
    this.#prompts = groups.map(
      ({ episodes }) => new Map(episodes.map(({ prompt }) => [keyOf(prompt.view), prompt])),
    );
  }

  /**
   * Scores what has to be known before the first update.
   * @throws MerfError as `score` does
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
    const places: TargetPlace[] = [];
    const branches = this.#branches(from, to, this.#targets, (place) => places.push(place));
    const { loss, miniBatches } = this.#options.settings;
    // DAPO and CISPO divide by the tokens of the whole rollout, in equal parts; the others by what an update holds.
    const byRollout = loss === 'dapo' || loss === 'cispo';
    const all = this.#count(0, this.#groups.length);
    const own = this.#count(from, to);
    return {
      forest: forestOf(branches),
      normalizer: { completions: own.completions, tokens: byRollout ? all.tokens / miniBatches : own.tokens },
      places,
    };
  }

  /** Takes note of the log-probabilities that a first update found under prompts that did not draw the tokens. */
  note({ places }: Lesson, logprobs: LossStats['logprobs']): void {
    places.forEach((place, i) => {
      const { prompt, turns } = this.#episode(place.group, place.episode);
      if (place.prompt === prompt || this.#isAnchorAlone(place)) return;
      const turn = turns.filter((one) => one.role === 'model')[place.index];
      turn?.logprobs.forEach((drawn, t) => {
        const learned = logprobs[i]?.[t] as number;
        this.#gap.tokens += 1;
        this.#gap.sum += drawn - learned;
        this.#gap.ratioMax = Math.max(this.#gap.ratioMax, Math.exp(learned - drawn));
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
    const { policy, reference, settings, anchorTo } = this.#options;
    const { kl, anchor, learnCorrection, updatesPerRollout, miniBatches } = settings;
    const severalUpdates = updatesPerRollout * miniBatches > 1;
    const old =
      learnCorrection === 'truncated' || (learnCorrection === 'none' && severalUpdates)
        ? await this.#score(policy, (group, episode) =>
            this.#learned(group, episode).filter((prompt) => prompt !== this.#episode(group, episode).prompt),
          )
        : new Map();
    const references =
      kl > 0 && reference
        ? await this.#score(reference, (group, episode) => this.#learned(group, episode))
        : new Map();
    const anchors =
      anchor > 0 ? await this.#score(policy, (group) => [this.#prompt(group, anchorTo)]) : new Map();
    this.#groups.forEach(({ episodes }, group) => {
      episodes.forEach((_, episode) => {
        for (const prompt of this.#learned(group, episode)) {
          if (this.#hasSignal(group, episode)) {
            this.#set(prompt, episode, this.#policyTargets(group, episode, prompt, old, references));
          }
        }
        if (anchor > 0) this.#addAnchor(group, episode, anchors);
      });
    });
  }

  #policyTargets(
    group: number,
    episode: number,
    prompt: EpisodePrompt,
    old: Scored,
    references: Scored,
  ): TrainTarget[] {
    const { settings } = this.#options;
    const { prompt: drawnUnder } = this.#episode(group, episode);
    const advantage = this.#advantages[group]?.[episode] as number;
    return drawnTurns(this.#episode(group, episode)).map(({ logprobs: drawn }, i) => {
      const before = old.get(prompt)?.[episode]?.[i];
      const referenceLogprobs = references.get(prompt)?.[episode]?.[i];
      const elsewhere = prompt !== drawnUnder && settings.learnCorrection !== 'importance';
      return {
        advantage:
          elsewhere && settings.learnCorrection === 'truncated' && before
            ? Float32Array.from(
                drawn,
                (logprob, t) => advantage * this.#weight((before[t] as number) - logprob),
              )
            : advantage,
        // Without old log-probabilities those of the update itself stand in, so that its ratio is 1.
        logprobs: elsewhere ? before : drawn,
        ...(referenceLogprobs && { referenceLogprobs }),
      };
    });
  }

  /** The truncated importance weight of a log ratio. */
  #weight(logRatio: number): number {
    const ratio = Math.exp(logRatio);
    if (ratio > this.#options.settings.learnCap) this.#gap.truncated += 1;
    return Math.min(ratio, this.#options.settings.learnCap);
  }

  /**
   * Holds what the policy says of an episode under one prompt to what it said under the other, by the k3 estimate of
   * their KL divergence (anchoring, arXiv:2606.11627). An episode that is learned there and has no other KL penalty gets
   * it beside its loss.
   */
  #addAnchor(group: number, episode: number, anchors: Scored): void {
    const { settings, anchorUnder, anchorTo } = this.#options;
    const prompt = this.#prompt(group, anchorUnder);
    const heldTo = anchors.get(this.#prompt(group, anchorTo))?.[episode];
    const learned = settings.kl === 0 ? this.#targets.get(prompt)?.[episode] : undefined;
    const targets = drawnTurns(this.#episode(group, episode)).map((_, i): TrainTarget => {
      const penalty = { kl: settings.anchor, referenceLogprobs: heldTo?.[i] };
      return learned?.[i]
        ? { ...learned[i], ...penalty }
        : { advantage: 0, entropy: 0, logprobs: undefined, ...penalty };
    });
    this.#set(prompt, episode, targets);
  }

  #set(prompt: EpisodePrompt, episode: number, targets: TrainTarget[]): void {
    const episodes = this.#targets.get(prompt) ?? [];
    episodes[episode] = targets;
    this.#targets.set(prompt, episodes);
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

  #branches(from: number, to: number, targets: Targets, onPlace: (place: TargetPlace) => void): Branch[] {
    return branchesOf(
      this.#groups.slice(from, to),
      (place) => {
        const target = targets.get(place.prompt)?.[place.episode]?.[place.index];
        if (target === undefined) return null;
        onPlace({ ...place, group: from + place.group });
        return target;
      },
      (group) => [...(this.#prompts[from + group] as Map<string, EpisodePrompt>).values()],
    );
  }

  /** The prompts that an episode is learned under. */
  #learned(group: number, episode: number): EpisodePrompt[] {
    const { prompt } = this.#episode(group, episode);
    const { learnUnder } = this.#options;
    return [...new Set(learnUnder.map((view) => (view === 'same' ? prompt : this.#prompt(group, view))))];
  }

  /** A group's prompt under a view, which all its episodes share. */
  #prompt(group: number, view: MotivationView): EpisodePrompt {
    const prompts = this.#prompts[group] as Map<string, EpisodePrompt>;
    const key = keyOf(view);
    let prompt = prompts.get(key);
    if (prompt === undefined) {
      const { policy, task } = this.#options;
      prompt = episodePrompt(policy.tokenizer, task, (this.#groups[group] as EpisodeGroup<Row>).row, view);
      prompts.set(key, prompt);
    }
    return prompt;
  }

  #episode(group: number, episode: number): Episode {
    return (this.#groups[group] as EpisodeGroup<Row>).episodes[episode] as Episode;
  }

  #hasSignal(group: number, episode: number): boolean {
    const { kl, entropy } = this.#options.settings;
    if (this.#isMasked(group, episode)) return false;
    return kl > 0 || entropy !== 0 || this.#advantages[group]?.[episode] !== 0;
  }

  #isMasked(group: number, episode: number): boolean {
    return this.#options.settings.maskTruncated && this.#episode(group, episode).end === 'length';
  }

  #isAnchorAlone({ group, episode, prompt }: TargetPlace): boolean {
    return !this.#learned(group, episode).includes(prompt);
  }

  /** Completions and tokens that groups `from` to `to` have in the loss, those without a gradient included. */
  #count(from: number, to: number): { completions: number; tokens: number } {
    const counts = { completions: 0, tokens: 0 };
    for (let group = from; group < to; group++) {
      (this.#groups[group] as EpisodeGroup<Row>).episodes.forEach((each, episode) => {
        const prompts = this.#learned(group, episode).length;
        counts.completions += prompts;
        if (this.#isMasked(group, episode)) return;
        for (const { tokens } of drawnTurns(each)) counts.tokens += prompts * tokens.length;
      });
    }
    return counts;
  }
}

function keyOf(view: MotivationView): string {
  return JSON.stringify(view);
}

/** How the metrics name the prompts that completions are learned under. */
export function formatLearnUnder(views: readonly LearnView[]): string {
  return views.map((view) => (view === 'same' ? view : formatMotivation(view))).join('/');
}
