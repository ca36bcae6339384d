import { MerfError } from '../../errors.js';
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

/** One line a person, such as `(1) Zoey is a knight`. */
export function answerLines(names: readonly string[], solution: readonly boolean[]): string {
  return names.map((name, i) => `(${i + 1}) ${role(name, solution[i] === true)}`).join('\n');
}

/**
 * Solves a puzzle the way one would on paper: suppose that somebody is a knight, follow what the claims force, and
 * where that contradicts a claim, go back and take the opposite. Every sentence states an inference that was made
 * or a claim that was checked, and the solution is what they leave, so words and answer can't disagree.
 *
 * @throws MerfError INVALID_ARGUMENT where the puzzle has no solution
 */
export function workedSolution(puzzle: Statements): WorkedSolution {
  const steps: string[] = [];
  const start: (boolean | undefined)[] = new Array(puzzle.statements.length).fill(undefined);
  const solution = explore(puzzle, start, new Set(), steps);
  if (solution === undefined) {
    throw new MerfError(
      'INVALID_ARGUMENT',
      'Expected statements with a solution but received contradictory ones',
    );
  }
  return { steps, solution };
}

/** The steps of `workedSolution` as running text. */
export function reasoning(puzzle: Statements): string {
  return workedSolution(puzzle).steps.join(' ');
}

/** @param checked the speakers whose claims the steps of this branch have been about */
function explore(
  puzzle: Statements,
  known: (boolean | undefined)[],
  checked: Set<number>,
  steps: string[],
): boolean[] | undefined {
  if (!propagate(puzzle, known, checked, steps)) return undefined;
  const person = known.indexOf(undefined);
  if (person === -1) {
    for (const [speaker, isKnight] of known.entries()) {
      if (!checked.has(speaker)) steps.push(`${saying(puzzle, speaker, isKnight)}, which is ${isKnight}.`);
    }
    steps.push('All claims fit.');
    return known.map((value) => value === true);
  }
  const name = nameOf(puzzle, person);
  const branch = (isKnight: boolean) => {
    steps.push(`${isKnight ? 'Suppose' : 'So'} ${role(name, isKnight)}.`);
    return explore(
      puzzle,
      known.map((value, i) => (i === person ? isKnight : value)),
      new Set(checked),
      steps,
    );
  };
  return branch(true) ?? branch(false);
}

/** Adds to `known` whatever the claims force. False where they contradict each other. */
function propagate(
  puzzle: Statements,
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

function findContradiction(puzzle: Statements, known: readonly (boolean | undefined)[]): string | undefined {
  for (const [speaker, claim] of puzzle.statements.entries()) {
    const speaks = known[speaker];
    const truth = evaluatePartially(claim, known);
    if (speaks !== undefined && truth !== undefined && truth !== speaks) {
      return `${saying(puzzle, speaker, speaks)}, which is ${truth}: a contradiction.`;
    }
  }
  return undefined;
}

function findForced(
  puzzle: Statements,
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
          sentence: `${saying(puzzle, speaker, speaks)}, so ${conclusion}.`,
        };
      }
    } else {
      const truth = evaluatePartially(claim, known);
      if (truth !== undefined) {
        const sentence = `${saying(puzzle, speaker, undefined)}, which is ${truth}, so ${role(name, truth)}.`;
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

function saying(puzzle: Statements, speaker: number, isKnight: boolean | undefined): string {
  const name = nameOf(puzzle, speaker);
  const who = isKnight === undefined ? name : `The ${isKnight ? 'knight' : 'knave'} ${name}`;
  return `${who} says that ${renderClaim(puzzle.statements[speaker] as Claim, puzzle.names)}`;
}

function role(name: string, isKnight: boolean): string {
  return `${name} is a ${isKnight ? 'knight' : 'knave'}`;
}

function nameOf(puzzle: Statements, person: number): string {
  const name = puzzle.names[person];
  if (name === undefined) {
    throw new MerfError(
      'INVALID_ARGUMENT',
      `Expected ${puzzle.statements.length} names, one for each statement, but received ${puzzle.names.length}`,
    );
  }
  return name;
}
