import { z } from 'zod';
import { MerfError } from '../errors.js';
import { formatMotivation, type MotivationMix, type MotivationView } from '../prompt/motivation.js';
import type { Episode, EpisodeGroup } from '../rollout/index.js';
import { unhinted } from './hints.js';
import type { GrpoSettings } from './settings.js';

/** The word for a motivation that withdraws itself, where others are views, mixes or schedules. */
export const adaptiveWord = 'adaptive';

export type AdaptiveSettings = Pick<
  GrpoSettings,
  'groupSize' | 'adaptiveWindow' | 'adaptiveFloor' | 'adaptiveLift'
>;

/** What of a reward specification decides which of its words are said. `RewardSpec` has it. */
export interface AdaptiveSpec {
  readonly components: readonly { readonly name: string }[];
  bounds(components?: readonly string[]): { readonly least: number; readonly greatest: number };
}

/** What words were measured to do, as shares of the range of the score that they are compared by. */
export interface Lift {
  /** Mean difference between completions of the same prompt with and without the words; null before any was measured. */
  lift: number | null;
  /** The 90% interval around it: each end is passed by chance in one case of 20. Null below two groups. */
  interval: [low: number, high: number] | null;
}

export interface MeasuredLift extends Lift {
  /** The same of the total reward. */
  total: Lift;
  /** Steps and groups that measured it. */
  steps: number;
  groups: number;
}

export interface ComponentRecord extends MeasuredLift {
  /** Whether most completions of the step saw the component's words, and the share of all that did. */
  said: boolean;
  share: number;
  /** What becomes of them with the next step, and why. */
  decision: 'stays' | 'withdrawn' | 'said again';
  why: string;
}

/** One line of motivation.jsonl. */
export interface AdaptiveRecord {
  step: number;
  /** The mix of views that the step's completions were drawn under. */
  mix: string;
  components: Record<string, ComponentRecord>;
  /** Where several components are withdrawn: the lift of the words of all of them together. */
  together?: MeasuredLift;
}

interface Sums {
  sum: number;
  squares: number;
}

/** What one step measured of a part: differences between the means of groups, as shares of their range. */
interface Evidence {
  groups: number;
  own: Sums;
  total: Sums;
}

interface Interval {
  low: number;
  high: number;
}

const keptSums = z.object({ sum: z.number(), squares: z.number() });
const keptState = z.object({
  said: z.array(z.string()),
  evidence: z.record(
    z.string(),
    z.array(z.object({ groups: z.int().min(0), own: keptSums, total: keptSums })),
  ),
});

interface AdaptiveState {
  said: string[];
  /** By part, the newest last. */
  evidence: Record<string, Evidence[]>;
}

/** Components whose words are taken away or put back together, with the views that differ in them alone. */
interface Part {
  name: string;
  components: readonly string[];
  said: boolean;
  withWords: MotivationView;
  without: MotivationView;
}

type ByView = ReadonlyMap<string, readonly Episode[]>;

// An end of the interval is passed by chance in one case of 20.
const deviations = 1.645;
// Words come back for a lift that is this many times the one below which they are withdrawn.
const returnFactor = 2;

/**
 * A motivation that withdraws itself as the model comes to do without it (the idea of SKILL0, arXiv:2604.02268, for the
 * words of a reward).
 *
 * Most completions of a group see the words of the components that are said. Some see all words, some see none, and some
 * see the words with one component's taken away or put back, in turn over the steps. The lift of a component's words is
 * the difference in its own score between completions of one prompt with and without them, averaged over groups. Groups
 * are independent, completions of a group are not, so the error is that of a mean over groups. The component's own score
 * decides, and not the total: it is what the words are about, it has the least noise, and a share of its range means the
 * same for every component. The total has a veto: words that are shown to raise it stay.
 *
 * A component is withdrawn where even the upper end of its lift is below `adaptiveLift`, and said again where even the
 * lower end is above twice that. There is one decision at a time, on a full window, and then all is measured afresh: what
 * a component's words do depends on what else is said.
 */
export class AdaptiveMotivation {
  readonly #spec: AdaptiveSpec;
  readonly #settings: AdaptiveSettings;
  readonly #names: readonly string[];
  /** Completions of a group that see everything, that see nothing, and that probe. */
  readonly #few: number;
  readonly #ranges = new Map<string, number>();
  #state: AdaptiveState;

  /** @throws MerfError INVALID_CONFIG where groups are too small to compare within */
  constructor(spec: AdaptiveSpec, settings: AdaptiveSettings) {
    this.#spec = spec;
    this.#settings = settings;
    this.#names = spec.components.map(({ name }) => name);
    const { groupSize, adaptiveFloor } = settings;
    const views = Math.min(this.#names.length + 1, 4);
    if (groupSize < views) {
      throw new MerfError(
        'INVALID_CONFIG',
        `Expected groupSize to be at least ${views}, for the views that an adaptive motivation of ` +
          `${this.#names.length} components compares, but it was ${groupSize}`,
      );
    }
    this.#few = Math.max(1, Math.floor(adaptiveFloor * groupSize));
    this.#state = { said: [...this.#names], evidence: {} };
  }

  /** The components whose words most completions see. */
  get said(): readonly string[] {
    return this.#state.said;
  }

  /** The views of a group's completions in step `step`, counted from 1: one for each completion. */
  mix(step: number): MotivationMix {
    const main = this.#view(this.#state.said);
    const probe = this.#probe(step);
    const first = main === 'full' ? [] : this.#times('full');
    const last = [...(probe ? this.#times(probe) : []), ...(main === 'none' ? [] : this.#times('none'))];
    const rest = this.#settings.groupSize - first.length - last.length;
    return [...first, ...new Array<MotivationView>(rest).fill(main), ...last];
  }

  /**
   * Learns from the groups that were drawn under the mix of step `step`, and decides what is said from the next step on.
   *
   * @param groups all that were drawn: to leave out some whose rewards are alike would make the lift seem greater. Of those
   *   that were drawn again under a hint, the episodes before count.
   */
  learn(step: number, groups: readonly EpisodeGroup[]): AdaptiveRecord {
    const mix = this.mix(step);
    const { said } = this.#state;
    const parts = this.#parts();
    const byView = groups.map((group) => episodesByView(unhinted(group)));
    for (const part of parts) this.#measure(part, byView);
    const decided = this.#decide(parts);
    const records = this.#names.map((name): [string, ComponentRecord] => {
      const part = parts.find((one) => one.name === name) as Part;
      const changed = decided?.components.includes(name) === true;
      return [
        name,
        {
          said: said.includes(name),
          share: mix.filter((view) => this.#shows(view, name)).length / mix.length,
          ...this.#measured(part),
          decision: changed ? (part.said ? 'withdrawn' : 'said again') : 'stays',
          why: this.#why(changed ? (decided as Part) : part, decided),
        },
      ];
    });
    const joint = parts.find(({ components }) => components.length > 1);
    const record: AdaptiveRecord = {
      step,
      mix: formatMotivation(mix),
      components: Object.fromEntries(records),
      ...(joint && { together: this.#measured(joint) }),
    };
    if (decided) {
      const after = this.#names.filter((name) =>
        decided.components.includes(name) ? !decided.said : said.includes(name),
      );
      this.#state = { said: after, evidence: {} };
    }
    return record;
  }

  /** What the next step depends on, as JSON. */
  save(): unknown {
    return structuredClone(this.#state);
  }

  load(state: unknown): void {
    const { said, evidence } = keptState.parse(state);
    const unknown = said.find((name) => !this.#names.includes(name));
    if (unknown !== undefined) throw new Error(`the reward has no component ${unknown}`);
    this.#state = { said, evidence };
  }

  #times(view: MotivationView): MotivationView[] {
    return new Array<MotivationView>(this.#few).fill(view);
  }

  #view(names: readonly string[]): MotivationView {
    if (names.length === this.#names.length) return 'full';
    return names.length === 0 ? 'none' : { partial: this.#names.filter((name) => names.includes(name)) };
  }

  #shows(view: MotivationView, name: string): boolean {
    return view === 'full' || (typeof view === 'object' && 'partial' in view && view.partial.includes(name));
  }

  /** The views with and without a set of components, the others as they are. */
  #part(components: readonly string[], said: boolean): Part {
    const others = this.#state.said.filter((name) => !components.includes(name));
    const withWords = this.#view([...others, ...components]);
    return { name: components.join('+'), components, said, withWords, without: this.#view(others) };
  }

  #parts(): Part[] {
    const { said } = this.#state;
    const withdrawn = this.#names.filter((name) => !said.includes(name));
    const single = this.#names.map((name) => this.#part([name], said.includes(name)));
    return withdrawn.length > 1 ? [...single, this.#part(withdrawn, false)] : single;
  }

  /** The view with one component taken away or put back, in turn among those that no other view of the mix tells of. */
  #probe(step: number): MotivationView | undefined {
    const views = this.#parts()
      .map((part) => (part.said ? part.without : part.withWords))
      .filter((view) => view !== 'full' && view !== 'none');
    return views[(step - 1) % views.length];
  }

  #measure(part: Part, groups: readonly ByView[]): void {
    const withWords = formatMotivation(part.withWords);
    const without = formatMotivation(part.without);
    const ownRange = this.#range(part.components);
    const totalRange = this.#range(this.#names);
    const evidence: Evidence = { groups: 0, own: { sum: 0, squares: 0 }, total: { sum: 0, squares: 0 } };
    for (const byView of groups) {
      const seeing = byView.get(withWords);
      const others = byView.get(without);
      if (seeing === undefined || others === undefined) continue;
      const difference = (score: (episode: Episode) => number) => mean(seeing, score) - mean(others, score);
      evidence.groups += 1;
      add(evidence.own, difference((episode) => ownScore(episode, part.components)) / ownRange);
      add(evidence.total, difference(({ reward }) => reward.total) / totalRange);
    }
    if (evidence.groups === 0) return;
    const kept = [...this.#evidence(part), evidence];
    this.#state.evidence[part.name] = kept.slice(-this.#settings.adaptiveWindow);
  }

  /** The range of the sum of some components' scores. */
  #range(components: readonly string[]): number {
    const key = components.join('+');
    let range = this.#ranges.get(key);
    if (range === undefined) {
      const { least, greatest } = this.#spec.bounds(components);
      // Scores that are always the same differ by 0 of any range.
      range = greatest - least || 1;
      this.#ranges.set(key, range);
    }
    return range;
  }

  #evidence(part: Part): readonly Evidence[] {
    return this.#state.evidence[part.name] ?? [];
  }

  #interval(part: Part, score: 'own' | 'total'): Interval | undefined {
    return intervalOf(this.#evidence(part), score);
  }

  #measured(part: Part): MeasuredLift {
    const evidence = this.#evidence(part);
    const liftOf = (score: 'own' | 'total'): Lift => {
      const interval = intervalOf(evidence, score);
      const { groups, sum } = sumsOf(evidence, score);
      return {
        lift: groups > 0 ? sum / groups : null,
        interval: interval ? [interval.low, interval.high] : null,
      };
    };
    const { groups } = sumsOf(evidence, 'own');
    return { ...liftOf('own'), total: liftOf('total'), steps: evidence.length, groups };
  }

  #isFull(part: Part): boolean {
    return this.#evidence(part).length >= this.#settings.adaptiveWindow;
  }

  #isDue(part: Part): boolean {
    const { adaptiveLift } = this.#settings;
    const own = this.#interval(part, 'own');
    if (own === undefined || !this.#isFull(part)) return false;
    if (!part.said) return own.low > returnFactor * adaptiveLift;
    return own.high < adaptiveLift && !this.#raisesTotal(part);
  }

  #raisesTotal(part: Part): boolean {
    return (this.#interval(part, 'total')?.low ?? 0) > 0;
  }

  /** The part whose words come back, or else the part whose words are withdrawn, if any is due. */
  #decide(parts: readonly Part[]): Part | undefined {
    const due = parts.filter((part) => this.#isDue(part));
    const own = (part: Part) => this.#interval(part, 'own') as Interval;
    const [back] = due.filter(({ said }) => !said).sort((a, b) => own(b).low - own(a).low);
    const [away] = due.filter(({ said }) => said).sort((a, b) => own(a).high - own(b).high);
    return back ?? away;
  }

  #why(part: Part, decided: Part | undefined): string {
    const { adaptiveWindow, adaptiveLift } = this.#settings;
    const own = this.#interval(part, 'own');
    const steps = this.#evidence(part).length;
    if (own === undefined || !this.#isFull(part)) {
      return `${steps} of the ${adaptiveWindow} steps that decide have measured it`;
    }
    const limit = number(part.said ? adaptiveLift : returnFactor * adaptiveLift);
    const end = part.said
      ? `the upper end of its lift, ${number(own.high)},`
      : `the lower end, ${number(own.low)},`;
    if (part === decided) {
      if (part.said) return `${end} is below ${limit}`;
      return `${end} of the lift of ${part.name} is above ${limit}`;
    }
    if (this.#isDue(part)) return `${part.name} is due too, but there is one decision at a time`;
    if (part.said && own.high < adaptiveLift) {
      const total = number(this.#interval(part, 'total')?.low ?? 0);
      return `${end} is below ${limit}, but its words raise the total by ${total} of its range or more`;
    }
    return part.said ? `${end} is not below ${limit}` : `${end} of its lift is not above ${limit}`;
  }
}

function episodesByView(episodes: readonly Episode[]): ByView {
  const byView = new Map<string, Episode[]>();
  for (const episode of episodes) {
    const view = formatMotivation(episode.prompt.view);
    const others = byView.get(view);
    if (others) others.push(episode);
    else byView.set(view, [episode]);
  }
  return byView;
}

function sumsOf(evidence: readonly Evidence[], score: 'own' | 'total'): Sums & { groups: number } {
  const all = { groups: 0, sum: 0, squares: 0 };
  for (const one of evidence) {
    all.groups += one.groups;
    all.sum += one[score].sum;
    all.squares += one[score].squares;
  }
  return all;
}

function intervalOf(evidence: readonly Evidence[], score: 'own' | 'total'): Interval | undefined {
  const { groups, sum, squares } = sumsOf(evidence, score);
  if (groups < 2) return undefined;
  const mean = sum / groups;
  // As if one more deviation were the whole range: a few groups that agree are no proof that all would.
  const variance = (Math.max(0, squares - sum * mean) + 1) / (groups - 1);
  const margin = deviations * Math.sqrt(variance / groups);
  return { low: mean - margin, high: mean + margin };
}

function mean(episodes: readonly Episode[], score: (episode: Episode) => number): number {
  return episodes.reduce((sum, episode) => sum + score(episode), 0) / episodes.length;
}

function ownScore({ reward }: Episode, components: readonly string[]): number {
  return components.reduce((sum, name) => sum + (reward.parts[name]?.score ?? 0), 0);
}

function add(sums: Sums, difference: number): void {
  sums.sum += difference;
  sums.squares += difference * difference;
}

function number(value: number): string {
  return String(Number(value.toFixed(3)));
}
