import { describeValue, invalidArgument, MerfError, throwIfAborted } from '../errors.js';
import type { MotivationView } from '../prompt/motivation.js';
import type { ParsedCompletion } from './completion.js';
import { describeRules } from './describe.js';
import { ProcessExitRefused, runWithin, TimeLimitExceeded, turnToAwait } from './guard.js';

/** One way in which a completion can turn out under a component. */
export interface RewardCase {
  /** What the verifier returns to choose this case. */
  readonly name: string;
  /** Added to the total; any finite number. */
  readonly score: number;
  /** Completes "+2 points …", as in "if the answer is right". */
  readonly sentence: string;
  /**
   * Cases of later components that follow from this one, `{ correctness: 'unreadable' }` for instance. Their
   * verifiers are then not asked, and the motivation says so.
   */
  readonly implies?: Readonly<Record<string, string>>;
}

/** What a verifier may look at besides the completion and its row. */
export interface VerifierContext {
  /** The cases that the components before this one came to. */
  readonly cases: Readonly<Record<string, string>>;
  /** Fires when the time is up or the caller gives up; for verifiers that wait for something. */
  readonly signal: AbortSignal;
}

/** A component whose verifier chooses one of its cases. */
export interface CaseComponent<Row = unknown> {
  readonly name: string;
  readonly cases: readonly RewardCase[];
  /** The name of the case that holds. */
  verify(completion: ParsedCompletion, row: Row, context: VerifierContext): string | Promise<string>;
}

/** A component whose verifier measures a number, as a time or a share. */
export interface NumericComponent<Row = unknown> {
  readonly name: string;
  /** Least and greatest score; a verifier that returns a number outside has failed. */
  readonly range: readonly [least: number, greatest: number];
  /** Says what the number measures: completes "from 0 to +1 points: …". */
  readonly sentence: string;
  /** A number inside `range`. */
  verify(completion: ParsedCompletion, row: Row, context: VerifierContext): number | Promise<number>;
}

export type Component<Row = unknown> = CaseComponent<Row> | NumericComponent<Row>;

export interface RewardPart {
  /** The case's name; `measured` for a numeric component. */
  readonly case: string;
  readonly score: number;
}

export interface Reward {
  /** The sum of the parts. */
  readonly total: number;
  /** By component name. */
  readonly parts: Readonly<Record<string, RewardPart>>;
}

export interface RewardSpecOptions<Row> {
  readonly name: string;
  /** In the order in which they are judged and described. */
  readonly components: readonly Component<Row>[];
  /** How long one verifier may take for one completion, in seconds (default 30). */
  readonly timeoutSeconds?: number;
}

export interface JudgeOptions {
  /** How error messages name the row (default: its `id` or `index`, or the beginning of its JSON). */
  readonly label?: string;
  readonly signal?: AbortSignal;
}

const maxCombinations = 100_000;

/** The least and greatest score of a component; both the same for a case. */
type Span = readonly [least: number, greatest: number];

/**
 * The rules by which completions are scored: verifiers choose the cases, and the same cases and scores in words are
 * the motivation, so the words cannot drift from the function.
 */
export class RewardSpec<Row = unknown> {
  readonly name: string;
  readonly components: readonly Component<Row>[];
  readonly timeoutSeconds: number;
  /** Every outcome that can occur together, each a span a component. */
  readonly #outcomes: readonly (readonly Span[])[];

  /** @throws MerfError INVALID_ARGUMENT that names the component and case at fault */
  constructor(options: RewardSpecOptions<Row>) {
    this.name = options.name;
    this.components = options.components;
    this.timeoutSeconds = options.timeoutSeconds ?? 30;
    checkComponents(this.name, this.components);
    if (!(this.timeoutSeconds > 0 && this.timeoutSeconds <= 86_400)) {
      throw invalidArgument(
        'timeoutSeconds',
        'a number of seconds above 0, 86400 at most,',
        this.timeoutSeconds,
      );
    }
    this.#outcomes = possibleOutcomes(this.name, this.components);
  }

  /**
   * The motivation: what the prompt says about this reward, with neither leading nor trailing white space. Empty for
   * the view `none`.
   *
   * @throws MerfError INVALID_ARGUMENT for a component or a template variable that does not exist
   */
  describe(view: MotivationView): string {
    return describeRules(this, view);
  }

  /**
   * Judges one completion, component after component.
   *
   * @throws MerfError VERIFIER_FAILED where a verifier throws or returns what is no case or number of its component,
   * VERIFIER_TIMEOUT where it takes too long, ABORTED
   */
  async judge(completion: ParsedCompletion, row: Row, options: JudgeOptions = {}): Promise<Reward> {
    const parts: Record<string, RewardPart> = {};
    const implied = new Map<string, string>();
    for (const component of this.components) {
      for (let turn = turnToAwait(); turn; turn = turnToAwait()) await turn;
      throwIfAborted(options.signal, 'judging');
      const cases = Object.fromEntries(Object.entries(parts).map(([name, part]) => [name, part.case]));
      const verdict =
        implied.get(component.name) ?? (await this.#ask(component, completion, row, cases, options));
      const part = this.#part(component, verdict, row, options);
      parts[component.name] = part;
      if ('cases' in component) {
        const chosen = component.cases.find((candidate) => candidate.name === part.case);
        for (const [other, name] of Object.entries(chosen?.implies ?? {})) {
          if (!implied.has(other)) implied.set(other, name);
        }
      }
    }
    return { total: sum(Object.values(parts).map((part) => part.score)), parts };
  }

  /**
   * Every total that `judge` can come to, highest first; undefined with a numeric component, where they are not a
   * finite set.
   *
   * @param components the totals of these alone (default: all)
   */
  totals(components?: readonly string[]): readonly number[] | undefined {
    const indices = this.#indices(components);
    if (indices.some((i) => !('cases' in (this.components[i] as Component<Row>)))) return undefined;
    const totals = this.#outcomes.map((outcome) => sum(indices.map((i) => (outcome[i] as Span)[0])));
    return [...new Set(totals)].sort((a, b) => b - a);
  }

  /**
   * The least and the greatest total that `judge` can come to.
   *
   * @param components the totals of these alone (default: all)
   */
  bounds(components?: readonly string[]): { readonly least: number; readonly greatest: number } {
    const indices = this.#indices(components);
    let least = Number.POSITIVE_INFINITY;
    let greatest = Number.NEGATIVE_INFINITY;
    for (const outcome of this.#outcomes) {
      least = Math.min(least, sum(indices.map((i) => (outcome[i] as Span)[0])));
      greatest = Math.max(greatest, sum(indices.map((i) => (outcome[i] as Span)[1])));
    }
    return { least, greatest };
  }

  /**
   * The greatest total of the components with cases, which a correct completion gets; of all components where none
   * has cases. What numeric components measure is left aside, as few completions reach the end of a range.
   */
  get highest(): number {
    return this.bounds(this.#decisive()).greatest;
  }

  /** Whether a reward by this specification is the highest, see `highest`: whether the completion is correct. */
  isHighest(reward: Reward): boolean {
    return sum(this.#decisive().map((name) => reward.parts[name]?.score ?? Number.NaN)) >= this.highest;
  }

  #decisive(): string[] {
    const withCases = this.components.filter((component) => 'cases' in component);
    return (withCases.length > 0 ? withCases : this.components).map((component) => component.name);
  }

  /** @throws MerfError INVALID_ARGUMENT for a name that is none of this specification's components */
  #indices(names: readonly string[] | undefined): number[] {
    const all = this.components.map((component) => component.name);
    const unknown = names?.find((name) => !all.includes(name));
    if (unknown !== undefined) {
      throw invalidArgument('component', `one of ${all.join(', ')}`, unknown);
    }
    return [...all.keys()].filter((i) => names?.includes(all[i] as string) ?? true);
  }

  async #ask(
    component: Component<Row>,
    completion: ParsedCompletion,
    row: Row,
    cases: Readonly<Record<string, string>>,
    options: JudgeOptions,
  ): Promise<string | number> {
    const controller = new AbortController();
    const signal = options.signal ? AbortSignal.any([options.signal, controller.signal]) : controller.signal;
    try {
      const work = (): string | number | Promise<string | number> =>
        component.verify(completion, row, { cases, signal });
      return await runWithin(work, this.timeoutSeconds, options.signal);
    } catch (cause) {
      throwIfAborted(options.signal, 'judging');
      const where = this.#locate(component, row, options);
      if (cause instanceof TimeLimitExceeded) {
        throw new MerfError(
          'VERIFIER_TIMEOUT',
          `The verifier of ${where} took longer than ${this.timeoutSeconds} s`,
        );
      }
      if (cause instanceof ProcessExitRefused) {
        throw new MerfError(
          'VERIFIER_FAILED',
          `The verifier of ${where} called process.exit(${cause.exitCode})`,
        );
      }
      const message = cause instanceof Error ? cause.message : String(cause);
      throw new MerfError('VERIFIER_FAILED', `The verifier of ${where} threw: ${message}`, { cause });
    } finally {
      controller.abort();
    }
  }

  #part(component: Component<Row>, verdict: unknown, row: Row, options: JudgeOptions): RewardPart {
    if ('cases' in component) {
      const chosen = component.cases.find((candidate) => candidate.name === verdict);
      if (chosen) return { case: chosen.name, score: chosen.score };
      throw new MerfError(
        'VERIFIER_FAILED',
        `Expected one of the cases ${component.cases.map((c) => c.name).join(', ')} from the verifier of ` +
          `${this.#locate(component, row, options)} but received ${describeValue(verdict)}`,
      );
    }
    const [least, greatest] = component.range;
    if (typeof verdict === 'number' && verdict >= least && verdict <= greatest) {
      return { case: 'measured', score: verdict };
    }
    throw new MerfError(
      'VERIFIER_FAILED',
      `Expected a number from ${least} to ${greatest} from the verifier of ` +
        `${this.#locate(component, row, options)} but received ${describeValue(verdict)}`,
    );
  }

  #locate(component: Component<Row>, row: Row, options: JudgeOptions): string {
    return `${component.name} (reward ${this.name}, row ${options.label ?? labelOf(row)})`;
  }
}

/** A sum without the noise of binary fractions: 0.1 + 0.2 is 0.3. */
function sum(values: readonly number[]): number {
  return Number(values.reduce((total, value) => total + value, 0).toPrecision(12));
}

/** How messages name a row: its `id` or `index`, or the beginning of its JSON. */
export function labelOf(row: unknown): string {
  if (typeof row === 'object' && row !== null) {
    for (const key of ['id', 'index']) {
      const value = (row as Record<string, unknown>)[key];
      if (typeof value === 'string' || typeof value === 'number') return String(value);
    }
  }
  try {
    const text = JSON.stringify(row) ?? String(row);
    return text.length > 100 ? `${text.slice(0, 100)}…` : text;
  } catch {
    return describeValue(row);
  }
}

/** Every combination of cases, less those that an `implies` rules out. */
function possibleOutcomes(specName: string, components: readonly Component<never>[]): Span[][] {
  const outcomes: Span[][] = [];
  const visit = (spans: readonly Span[], implied: Readonly<Record<string, string>>): void => {
    const component = components[spans.length];
    if (!component) {
      outcomes.push([...spans]);
      if (outcomes.length > maxCombinations) {
        throw new MerfError(
          'INVALID_ARGUMENT',
          `Expected at most ${maxCombinations} combinations of cases in the reward ${specName} but received more`,
        );
      }
    } else if ('cases' in component) {
      for (const option of component.cases) {
        if ((implied[component.name] ?? option.name) !== option.name) continue;
        visit([...spans, [option.score, option.score]], { ...option.implies, ...implied });
      }
    } else visit([...spans, component.range], implied);
  };
  visit([], {});
  return outcomes;
}

function checkComponents(specName: string, components: readonly Component<never>[]): void {
  const fail = (message: string): never => {
    throw new MerfError('INVALID_ARGUMENT', `${message} in the reward ${specName}`);
  };
  if (!Array.isArray(components) || components.length === 0) {
    fail(`Expected at least one component but received ${describeValue(components)}`);
  }
  const implications: { where: string; component: string; target: string; to: string }[] = [];
  components.forEach((component, i) => {
    const { name } = component;
    if (!/^[A-Za-z][\w-]*$/.test(name)) {
      fail(`Expected letters, digits, - and _ for a component's name but received ${describeValue(name)}`);
    }
    if (components.findIndex((other) => other.name === name) !== i) {
      fail(`Expected different names for the components but received ${name} twice`);
    }
    if (typeof component.verify !== 'function') {
      fail(`Expected a function for the verifier of ${name} but received ${describeValue(component.verify)}`);
    }
    if ('range' in component) {
      checkSentence(component.sentence, name, fail);
      const [least, greatest] = component.range;
      if (!(Number.isFinite(least) && Number.isFinite(greatest) && least < greatest)) {
        fail(`Expected two ascending numbers for the range of ${name} but received ${least} and ${greatest}`);
      }
      return;
    }
    if (!Array.isArray(component.cases) || component.cases.length === 0) {
      fail(`Expected at least one case for ${name} but received ${describeValue(component.cases)}`);
    }
    component.cases.forEach((option, j) => {
      const where = `${name}.${option.name}`;
      if (!/^[A-Za-z][\w-]*$/.test(option.name)) {
        fail(`Expected letters, digits, - and _ for a case's name of ${name} but received ${option.name}`);
      }
      if (component.cases.findIndex((other) => other.name === option.name) !== j) {
        fail(`Expected different names for the cases but received ${where} twice`);
      }
      checkSentence(option.sentence, where, fail);
      if (!Number.isFinite(option.score)) {
        fail(
          `Expected a finite number for the score of ${where} but received ${describeValue(option.score)}`,
        );
      }
      for (const [other, otherCase] of Object.entries(option.implies ?? {})) {
        const target = components.slice(i + 1).find((candidate) => candidate.name === other);
        if (!target || !('cases' in target) || !target.cases.some((c) => c.name === otherCase)) {
          fail(
            `Expected a case of a later component for what ${where} implies but received ${other}.${otherCase}`,
          );
        }
        const conflict = implications.find(
          (e) => e.target === other && e.component !== name && e.to !== otherCase,
        );
        if (conflict) {
          fail(
            `Expected one case of ${other} to be implied but ${conflict.where} and ${where} imply different ones`,
          );
        }
        implications.push({ where, component: name, target: other, to: otherCase });
      }
    });
  });
}

function checkSentence(sentence: unknown, where: string, fail: (message: string) => never): void {
  if (typeof sentence === 'string' && sentence.trim() !== '' && !sentence.includes('\n')) return;
  fail(`Expected one line of words for the sentence of ${where} but received ${describeValue(sentence)}`);
}
