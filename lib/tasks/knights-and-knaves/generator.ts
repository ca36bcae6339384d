import { MerfError } from '../../errors.js';
import { Random } from '../random.js';
import { type BinaryKind, type Claim, renderQuiz, speechFormCount } from './claim.js';
import { solve } from './solver.js';

/** Some of the names of the published quizzes: few, so that small models meet each of them often. */
export const defaultNames: readonly string[] =
  'Abigail Benjamin Chloe Daniel Emily Ethan Grace Jacob Lily Mason Noah Olivia Samuel Sophia William Zoey'.split(
    ' ',
  );

export interface Puzzle {
  /** The puzzle in words. */
  readonly quiz: string;
  readonly names: readonly string[];
  /** `solution[i]`: person i is a knight. It is the only solution. */
  readonly solution: readonly boolean[];
  /** `statements[i]`: what person i says. */
  readonly statements: readonly Claim[];
}

export interface PuzzleOptions {
  /** How many people, 2 to 8. */
  readonly people: number;
  /**
   * How deep connectives may nest, 1 to 4. The published quizzes have 1, which is the default. 0 is impossible:
   * where everybody just calls somebody a knight or a knave, swapping everybody's role turns a solution into
   * another one.
   */
  readonly depth?: number;
  readonly seed: number | bigint;
  /** The puzzle's number under the seed (default 0); none of the others need be generated for it. */
  readonly index?: number;
  /** Names to draw from, at least as many as there are people (default: `defaultNames`). */
  readonly names?: readonly string[];
}

/**
 * A puzzle with exactly one solution. Claims are drawn until they have one, so that every uniquely solvable set of
 * claims is as likely as any other of the same drawing probability. Nobody claims plainly to be a knight or a
 * knave himself, and a connective joins different persons, as in most published quizzes.
 *
 * @throws MerfError INVALID_ARGUMENT
 */
export function generatePuzzle(options: PuzzleOptions): Puzzle {
  const { people, seed } = options;
  const depth = options.depth ?? 1;
  const index = options.index ?? 0;
  const pool = options.names ?? defaultNames;
  requireInteger('people', people, 2, 8);
  requireInteger('depth', depth, 1, 4);
  requireInteger('index', index, 0, 2 ** 31 - 1);
  if (typeof seed !== 'bigint' && !Number.isSafeInteger(seed)) {
    throw new MerfError('INVALID_ARGUMENT', `Expected an integer for seed but received ${String(seed)}`);
  }
  if (new Set(pool).size !== pool.length) {
    throw new MerfError('INVALID_ARGUMENT', 'Expected different names for names but received one twice');
  }
  if (pool.length < people) {
    throw new MerfError('INVALID_ARGUMENT', `Expected at least ${people} names but received ${pool.length}`);
  }

  const random = new Random(seed, index);
  const names = random.shuffle(pool).slice(0, people);
  for (;;) {
    const statements = names.map((_, speaker) => drawStatement(random, speaker, people, depth));
    const [solution, another] = solve(statements, 2);
    if (solution === undefined || another !== undefined) continue;
    const forms = names.map(() => random.below(speechFormCount));
    return { quiz: renderQuiz(names, statements, forms), names, solution, statements };
  }
}

const kinds: readonly (BinaryKind | 'atom' | 'not')[] = ['atom', 'not', 'and', 'or', 'if', 'iff'];

function drawStatement(random: Random, speaker: number, people: number, depth: number): Claim {
  const kind = random.pick(kinds);
  const others = Array.from({ length: people - 1 }, (_, i) => (i < speaker ? i : i + 1));
  if (kind === 'atom') return drawAtom(random, random.pick(others));
  if (kind === 'not') {
    return {
      kind,
      claim: depth === 1 ? drawAtom(random, random.pick(others)) : drawClaim(random, people, depth - 1),
    };
  }
  return drawBinary(random, kind, people, depth);
}

function drawClaim(random: Random, people: number, depth: number): Claim {
  const kind = depth === 0 ? 'atom' : random.pick(kinds);
  if (kind === 'atom') return drawAtom(random, random.below(people));
  if (kind === 'not') return { kind, claim: drawClaim(random, people, depth - 1) };
  return drawBinary(random, kind, people, depth);
}

function drawBinary(random: Random, kind: BinaryKind, people: number, depth: number): Claim {
  if (depth > 1) {
    return { kind, left: drawClaim(random, people, depth - 1), right: drawClaim(random, people, depth - 1) };
  }
  const left = random.below(people);
  const right = (left + 1 + random.below(people - 1)) % people;
  return { kind, left: drawAtom(random, left), right: drawAtom(random, right) };
}

function drawAtom(random: Random, person: number): Claim {
  return { kind: random.chance(0.5) ? 'knight' : 'knave', person };
}

function requireInteger(name: string, value: number, least: number, greatest: number): void {
  if (!Number.isInteger(value) || value < least || value > greatest) {
    throw new MerfError(
      'INVALID_ARGUMENT',
      `Expected an integer from ${least} to ${greatest} for ${name} but received ${String(value)}`,
    );
  }
}
