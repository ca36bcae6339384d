import type { Claim } from '../../lib/tasks/knights-and-knaves/claim.js';
import type { Puzzle } from '../../lib/tasks/knights-and-knaves/generator.js';
import { solve } from '../../lib/tasks/knights-and-knaves/solver.js';
import type { Random } from '../../lib/tasks/random.js';
import { takeNotes } from './notes.js';

/** How a completion is laid out, reasoned and written, apart from what it says. */
export interface Style {
  readonly layout: 'demanded' | 'unclosed' | 'swapped' | 'answer-only' | 'bare';
  /** `careful` follows the claims; `hasty` guesses aloud; `none` says nothing. */
  readonly thinking: 'careful' | 'hasty' | 'none';
  /** Reads one claim wrong before it thinks, where it thinks carefully. */
  readonly careless: boolean;
  readonly lines: 'numbered' | 'plain' | 'colon' | 'sentence';
  readonly order: 'introduced' | 'reversed';
}

/** Probabilities of what a model does. */
export interface Habits {
  readonly layout: Readonly<Record<Style['layout'], number>>;
  readonly thinking: Readonly<Record<Style['thinking'], number>>;
  readonly careless: number;
  readonly lines: Readonly<Record<Style['lines'], number>>;
  readonly reversed: number;
}

/** What the tokenizer sees: every way of thinking, often enough. */
export const varied: Habits = {
  layout: { demanded: 0.66, unclosed: 0.08, swapped: 0.04, 'answer-only': 0.1, bare: 0.12 },
  thinking: { careful: 0.3, hasty: 0.55, none: 0.15 },
  careless: 0.25,
  lines: { numbered: 0.7, plain: 0.1, colon: 0.1, sentence: 0.1 },
  reversed: 0.1,
};

/** The habits of a model that has been told no rules: it mostly guesses. */
export const usual: Habits = { ...varied, thinking: { careful: 0.12, hasty: 0.71, none: 0.17 } };

/** The habits of the first part of training, which teaches how to reason: mostly careful, without mistakes. */
export const practice: Habits = {
  ...varied,
  layout: { demanded: 0.76, unclosed: 0.06, swapped: 0.03, 'answer-only': 0.06, bare: 0.09 },
  thinking: { careful: 0.92, hasty: 0.05, none: 0.03 },
  careless: 0,
};

export function drawStyle(random: Random, habits: Habits): Style {
  return {
    layout: weighted(random, habits.layout),
    thinking: weighted(random, habits.thinking),
    careless: random.chance(habits.careless),
    lines: weighted(random, habits.lines),
    order: random.chance(habits.reversed) ? 'reversed' : 'introduced',
  };
}

/** A completion in the style; what a hasty one answers is a guess. */
export function write(style: Style, puzzle: Puzzle, random: Random): string {
  const { text, solution } = think(style, puzzle, random);
  const answer = answerOf(style, puzzle, solution);
  const thinking = text === '' ? '' : `${text}\n`;
  switch (style.layout) {
    case 'demanded':
      return `<think>\n${thinking}</think>\n<answer>\n${answer}\n</answer>`;
    case 'unclosed':
      return `<think>\n${thinking}<answer>\n${answer}\n</answer>`;
    case 'swapped':
      return `<answer>\n${answer}\n</answer>\n<think>\n${thinking}</think>`;
    case 'answer-only':
      return `<answer>\n${answer}\n</answer>`;
    case 'bare':
      return `${thinking}${answer}`;
  }
}

function think(style: Style, puzzle: Puzzle, random: Random): { text: string; solution: readonly boolean[] } {
  if (style.thinking === 'careful') {
    const { steps, solution } = takeNotes(style.careless ? misread(puzzle, random) : puzzle);
    return { text: steps.join('\n'), solution };
  }
  const solution = puzzle.names.map(() => random.chance(0.5));
  if (style.thinking === 'none') return { text: '', solution };
  const roles = puzzle.names.map((name, i) => `${name} is a ${solution[i] ? 'knight' : 'knave'}`);
  const guesses = [
    `I guess that ${join(roles)}.`,
    `It sounds as if ${join(roles)}.`,
    `Probably ${join(roles)}.`,
  ];
  return { text: random.pick(guesses), solution };
}

/** The puzzle with one role in one claim turned into the other, such that it still has a solution. */
function misread(puzzle: Puzzle, random: Random): Puzzle {
  for (let attempt = 0; attempt < 20; attempt++) {
    const speaker = random.below(puzzle.names.length);
    const statements = puzzle.statements.map((claim, i) => (i === speaker ? turnOne(claim, random) : claim));
    if (solve(statements, 1).length > 0) return { ...puzzle, statements };
  }
  return puzzle;
}

function turnOne(claim: Claim, random: Random): Claim {
  switch (claim.kind) {
    case 'knight':
      return { kind: 'knave', person: claim.person };
    case 'knave':
      return { kind: 'knight', person: claim.person };
    case 'not':
      return { kind: 'not', claim: turnOne(claim.claim, random) };
    default:
      return random.chance(0.5)
        ? { ...claim, left: turnOne(claim.left, random) }
        : { ...claim, right: turnOne(claim.right, random) };
  }
}

function answerOf(style: Style, puzzle: Puzzle, solution: readonly boolean[]): string {
  const roles = puzzle.names.map((name, i) => ({ name, role: solution[i] ? 'knight' : 'knave' }));
  if (style.order === 'reversed') roles.reverse();
  switch (style.lines) {
    case 'numbered':
      return roles.map(({ name, role }, i) => `(${i + 1}) ${name} is a ${role}`).join('\n');
    case 'plain':
      return roles.map(({ name, role }) => `${name} is a ${role}`).join('\n');
    case 'colon':
      return roles.map(({ name, role }) => `${name}: ${role}`).join('\n');
    case 'sentence':
      return `${join(roles.map(({ name, role }) => `${name} is a ${role}`))}.`;
  }
}

function join(items: readonly string[]): string {
  return items.length === 2
    ? items.join(' and ')
    : `${items.slice(0, -1).join(', ')}, and ${items[items.length - 1]}`;
}

function weighted<Key extends string>(random: Random, weights: Readonly<Record<Key, number>>): Key {
  const entries = Object.entries(weights) as [Key, number][];
  let left = random.uniform() * entries.reduce((sum, [, weight]) => sum + weight, 0);
  for (const [key, weight] of entries) {
    left -= weight;
    if (left < 0) return key;
  }
  return (entries[entries.length - 1] as [Key, number])[0];
}
