import { MerfError } from '../../errors.js';
import type { Random } from '../random.js';
import { type Claim, evaluatePartially, personsOf, renderClaim } from './claim.js';

/** The part of a puzzle that reasoning needs. */
export interface Statements {
  readonly names: readonly string[];
  /** `statements[i]`: what person i says. */
  readonly statements: readonly Claim[];
}

export interface WorkedSolution {
  /** The reasoning in words, one sentence a step. */
  readonly steps: readonly string[];
  /** What it arrives at: `solution[i]` says that person i is a knight. */
  readonly solution: readonly boolean[];
}

/** The choices that the reasoning leaves open: whom to look at first, what to suppose of somebody, which words to take. */
interface Manner {
  /** The speakers in the order in which they are looked at. */
  readonly order: readonly number[];
  supposesKnight(): boolean;
  word(choices: readonly string[]): string;
}

const plainest: Omit<Manner, 'order'> = {
  supposesKnight: () => true,
  word: (choices) => choices[0] as string,
};

/** One line a person, such as `(1) Zoey is a knight`. */
export function answerLines(names: readonly string[], solution: readonly boolean[]): string {
  return names.map((name, i) => `(${i + 1}) ${role(name, solution[i] === true)}`).join('\n');
}

/**
 * Solves a puzzle the way one would on paper: suppose that somebody is a knight, follow what the claims force, and
 * where that contradicts a claim, go back and take the opposite. Every sentence states an inference that was made
 * or a claim that was checked, and the solution is what they leave, so words and answer can't disagree.
 *
 * @param random draws one of the many ways to get there and to say so (default: the plainest, knights first)
 * @throws MerfError INVALID_ARGUMENT where the puzzle has no solution
 */
export function workedSolution(puzzle: Statements, random?: Random): WorkedSolution {
  const speakers = [...puzzle.statements.keys()];
  const manner: Manner = random
    ? {
        order: random.shuffle(speakers),
        supposesKnight: () => random.chance(0.5),
        word: (choices) => random.pick(choices),
      }
    : { ...plainest, order: speakers };
  const steps: string[] = [];
  const start: (boolean | undefined)[] = new Array(puzzle.statements.length).fill(undefined);
  const solution = explore({ ...puzzle, manner }, start, new Set(), steps);
  if (solution === undefined) {
    throw new MerfError(
      'INVALID_ARGUMENT',
      'Expected statements with a solution but received contradictory ones',
    );
  }
  return { steps, solution };
}

/** The steps of `workedSolution` as running text. */
export function reasoning(puzzle: Statements, random?: Random): string {
  return workedSolution(puzzle, random).steps.join(' ');
}

interface Problem extends Statements {
  readonly manner: Manner;
}

/** @param checked the speakers whose claims the steps of this branch have been about */
function explore(
  puzzle: Problem,
  known: (boolean | undefined)[],
  checked: Set<number>,
  steps: string[],
): boolean[] | undefined {
  if (!propagate(puzzle, known, checked, steps)) return undefined;
  const { order, supposesKnight, word } = puzzle.manner;
  const person = order.find((i) => known[i] === undefined);
  if (person === undefined) {
    for (const speaker of order) {
      const isKnight = known[speaker];
      if (!checked.has(speaker)) steps.push(`${saying(puzzle, speaker, isKnight)}, which is ${isKnight}.`);
    }
    steps.push(word(['All claims fit.', 'Everything fits.', 'No claim is left that does not fit.']));
    return known.map((value) => value === true);
  }
  const name = nameOf(puzzle, person);
  const first = supposesKnight();
  const branch = (isKnight: boolean) => {
    const opening =
      isKnight === first ? word(['Suppose', 'Assume that', 'Say']) : word(['So', 'Therefore', 'Hence']);
    steps.push(`${opening} ${role(name, isKnight)}.`);
    return explore(
      puzzle,
      known.map((value, i) => (i === person ? isKnight : value)),
      new Set(checked),
      steps,
    );
  };
  return branch(first) ?? branch(!first);
}

/** Adds to `known` whatever the claims force. False where they contradict each other. */
function propagate(
  puzzle: Problem,
  known: (boolean | undefined)[],
  checked: Set<number>,
  steps: string[],
): boolean {
  for (;;) {
    const contradiction = findContradiction(puzzle, known);
    if (contradiction !== undefined) {
      steps.push(contradiction);
      return false;
    }
    const forced = findForced(puzzle, known);
    if (forced === undefined) return true;
    known[forced.person] = forced.isKnight;
    checked.add(forced.speaker);
    steps.push(forced.sentence);
  }
}

function findContradiction(puzzle: Problem, known: readonly (boolean | undefined)[]): string | undefined {
  for (const speaker of puzzle.manner.order) {
    const claim = puzzle.statements[speaker] as Claim;
    const speaks = known[speaker];
    const truth = evaluatePartially(claim, known);
    if (speaks !== undefined && truth !== undefined && truth !== speaks) {
      const end = puzzle.manner.word(['a contradiction', 'that cannot be', 'impossible']);
      return `${saying(puzzle, speaker, speaks)}, which is ${truth}: ${end}.`;
    }
  }
  return undefined;
}

function findForced(
  puzzle: Problem,
  known: readonly (boolean | undefined)[],
): { person: number; isKnight: boolean; speaker: number; sentence: string } | undefined {
  for (const [speaker, claim] of puzzle.statements.entries()) {
    const name = nameOf(puzzle, speaker);
    const speaks = known[speaker];
    if (speaks !== undefined) {
      for (const person of personsOf(claim)) {
        if (known[person] !== undefined) continue;
        const isKnight = forcedBy(claim, speaks, person, known);
        if (isKnight === undefined) continue;
        const conclusion = role(nameOf(puzzle, person), isKnight);
        return {
          person,
          isKnight,
          speaker,
          sentence: `${saying(puzzle, speaker, speaks)}, ${puzzle.manner.word(['so', 'hence', 'which means that'])} ${conclusion}.`,
        };
      }
    } else {
      const truth = evaluatePartially(claim, known);
      if (truth !== undefined) {
        const so = puzzle.manner.word(['so', 'hence', 'and']);
        const sentence = `${saying(puzzle, speaker, undefined)}, which is ${truth}, ${so} ${role(name, truth)}.`;
        return { person: speaker, isKnight: truth, speaker, sentence };
      }
    }
  }
  return undefined;
}

/** What `person` must be for the claim to come out as `truth`, where one of the two possibilities settles it wrong. */
function forcedBy(
  claim: Claim,
  truth: boolean,
  person: number,
  known: readonly (boolean | undefined)[],
): boolean | undefined {
  for (const isKnight of [true, false]) {
    const trial = [...known];
    trial[person] = !isKnight;
    const value = evaluatePartially(claim, trial);
    if (value !== undefined && value !== truth) return isKnight;
  }
  return undefined;
}

function saying(puzzle: Problem, speaker: number, isKnight: boolean | undefined): string {
  const name = nameOf(puzzle, speaker);
  const who = isKnight === undefined ? name : `The ${isKnight ? 'knight' : 'knave'} ${name}`;
  return `${who} says that ${renderClaim(puzzle.statements[speaker] as Claim, puzzle.names)}`;
}

function role(name: string, isKnight: boolean): string {
  return `${name} is a ${isKnight ? 'knight' : 'knave'}`;
}

function nameOf(puzzle: Problem, person: number): string {
  const name = puzzle.names[person];
  if (name === undefined) {
    throw new MerfError(
      'INVALID_ARGUMENT',
      `Expected ${puzzle.statements.length} names, one for each statement, but received ${puzzle.names.length}`,
    );
  }
  return name;
}
