import type { ChatMessage } from '../../lib/prompt/chat-template.js';
import { withMotivation } from '../../lib/prompt/motivation.js';
import { type ParsedCompletion, parseCompletion } from '../../lib/reward/completion.js';
import type { CaseComponent, RewardSpec } from '../../lib/reward/spec.js';
import type { Puzzle } from '../../lib/tasks/knights-and-knaves/generator.js';
import { knightsAndKnaves, knightsAndKnavesInstruction } from '../../lib/tasks/knights-and-knaves/index.js';
import { Random } from '../../lib/tasks/random.js';
import { drawStyle, type Habits, practice, type Style, usual, write } from './answers.js';
import { drawRuleSet } from './rule-sets.js';

/** Questions and answers under one system message. */
export interface Lesson {
  readonly system: ChatMessage;
  readonly examples: readonly { readonly question: ChatMessage; readonly completion: string }[];
}

export interface CorpusOptions {
  readonly seed: number;
  readonly examplesPerLesson: number;
  /** How many lessons that practise careful reasoning come first. */
  readonly practiceLessons: number;
  /** Share of lessons whose system message states rules. */
  readonly withRules: { readonly practice: number; readonly habits: number };
  /** Share of puzzles with three people; the others have two. */
  readonly threePeople: number;
  /** How strictly answers follow stated rules, in points; see `styleFor`. */
  readonly temperature: { readonly practice: number; readonly habits: number };
  /** The habits that follow the practice (default: the usual ones). */
  readonly habits?: Habits;
}

const instructions: readonly string[] = [
  knightsAndKnavesInstruction,
  'Find out who is a knight and who is a knave. Think, then answer.',
  'Solve the puzzle.',
];

/**
 * An endless seeded corpus. Lesson i does not depend on those before it. Puzzles come from the task's training
 * split alone, so the held-out puzzles stay unseen.
 */
export class Corpus {
  readonly #rows: Promise<readonly { at(position: number): Puzzle }[]>;

  constructor(readonly options: CorpusOptions) {
    const sources = [2, 3].map(async (people) =>
      (await knightsAndKnaves.open({ people })).rows({ split: 'train', seed: options.seed }),
    );
    this.#rows = Promise.all(sources) as Promise<readonly { at(position: number): Puzzle }[]>;
  }

  async lesson(index: number): Promise<Lesson> {
    const { seed, examplesPerLesson, practiceLessons, withRules, threePeople } = this.options;
    const random = new Random(seed, index);
    const rows = await this.#rows;
    const puzzles = Array.from({ length: examplesPerLesson }, (_, i) =>
      (rows[random.chance(threePeople) ? 1 : 0] as { at(position: number): Puzzle }).at(
        index * examplesPerLesson + i,
      ),
    );
    const instruction = random.chance(0.75) ? (instructions[0] as string) : random.pick(instructions);
    const practising = index < practiceLessons;
    const part = practising ? 'practice' : 'habits';
    const rules = random.chance(withRules[part]) ? drawRuleSet(random) : undefined;
    const habits = practising ? practice : (this.options.habits ?? usual);
    const draw = rules
      ? styleFor(rules, puzzles, habits, random, this.options.temperature[part])
      : () => drawStyle(random, habits);
    const base: ChatMessage[] = [{ role: 'system', content: instruction }];
    const [system] = rules ? withMotivation<ChatMessage>(base, rules.describe('full')) : base;
    return {
      system: system as ChatMessage,
      examples: puzzles.map((puzzle) => ({
        question: { role: 'user', content: puzzle.quiz },
        completion: write(draw(), puzzle, random),
      })),
    };
  }
}

const candidates = 32;
const trials = 3;

/**
 * Draws styles with probability proportional to habit(style) * exp(score(style) / temperature), the optimum of a
 * reward under a Kullback-Leibler penalty towards the habits. A style's score is its mean over a few puzzles: a
 * guess that happens to be right earns its style no credit that a guesser could not expect.
 */
function styleFor(
  rules: RewardSpec<Puzzle>,
  puzzles: readonly Puzzle[],
  habits: Habits,
  random: Random,
  temperature: number,
): () => Style {
  const styles = Array.from({ length: candidates }, () => drawStyle(random, habits));
  const scores: number[] = [];
  for (const style of styles) {
    let total = 0;
    for (let trial = 0; trial < trials; trial++) {
      const puzzle = random.pick(puzzles);
      total += totalOf(rules, parseCompletion({ raw: write(style, puzzle, random) }), puzzle);
    }
    scores.push(total / trials);
  }
  const best = Math.max(...scores);
  const weights = scores.map((score) => Math.exp((score - best) / temperature));
  const sum = weights.reduce((a, b) => a + b, 0);
  return () => {
    let left = random.uniform() * sum;
    const chosen = weights.findIndex((weight) => {
      left -= weight;
      return left < 0;
    });
    return styles[chosen < 0 ? styles.length - 1 : chosen] as Style;
  };
}

const never = new AbortController().signal;

/** What `RewardSpec.score` totals, without its guard against verifiers that hang: these do not, and are asked often. */
function totalOf(rules: RewardSpec<Puzzle>, completion: ParsedCompletion, puzzle: Puzzle): number {
  const implied = new Map<string, string>();
  const cases: Record<string, string> = {};
  let total = 0;
  for (const component of rules.components as readonly CaseComponent<Puzzle>[]) {
    const name =
      implied.get(component.name) ??
      (component.verify(completion, puzzle, { cases, signal: never }) as string);
    cases[component.name] = name;
    const chosen = component.cases.find((option) => option.name === name);
    total += chosen?.score ?? 0;
    for (const [other, otherCase] of Object.entries(chosen?.implies ?? {})) implied.set(other, otherCase);
  }
  return total;
}
