import {
  type Claim,
  evaluateClaim,
  evaluatePartially,
  personsOf,
} from '../../lib/tasks/knights-and-knaves/claim.js';
import type { Statements, WorkedSolution } from '../../lib/tasks/knights-and-knaves/reasoning.js';

/** The last line of notes that came to an end. */
export const conclusion = 'All claims fit.';

type Known = readonly (boolean | undefined)[];

/**
 * Solves a puzzle in notes that a very small model can learn to take: nothing is decided or looked up that is not a
 * few tokens away. First every claim in short (`Noah -Grace or +Zoey`: Noah says that Grace is a knave or Zoey a
 * knight), then speaker after speaker, again and again, what a claim comes to while something is supposed:
 *
 *     Noah -Grace open or +Zoey false: Noah knight so knave Grace
 *
 * Behind the colon stands what the speaker is known to be. What follows is `fits`, `clash` (back to the last
 * supposition, which turns), `so` with what the claim forces, or `wait`. Claims that are settled are not asked again.
 *
 * @throws RangeError where the puzzle has no solution
 */
export function takeNotes({ names, statements }: Statements): WorkedSolution {
  const steps = statements.map((claim, speaker) => `${names[speaker]} ${shorthand(claim, names)}`);
  const suppositions: { readonly before: Known; readonly person: number; readonly isKnight: boolean }[] = [];
  let known: (boolean | undefined)[] = [];
  let unsettled: number[] = [];

  const suppose = (before: Known, person: number, isKnight: boolean): void => {
    suppositions.push({ before, person, isKnight });
    known = before.map((value, i) => (i === person ? isKnight : value));
    unsettled = statements.map((_, i) => i);
    steps.push(`Try ${known.map((value, i) => `${roleOf(value)} ${names[i]}`).join(' ')}`);
  };

  suppose(new Array(statements.length).fill(undefined), 0, true);
  for (let waiting = 0; unsettled.length > 0; ) {
    if (waiting === unsettled.length) {
      suppose(known, known.indexOf(undefined), true);
      waiting = 0;
      continue;
    }
    const speaker = unsettled.shift() as number;
    const claim = statements[speaker] as Claim;
    const name = names[speaker];
    const line = `${name} ${shorthand(claim, names, known)}: ${name} ${roleOf(known[speaker])}`;
    const forced = infer(speaker, claim, known);
    if (forced === undefined) {
      steps.push(`${line} clash`);
      let last = suppositions.pop();
      while (last?.isKnight === false) last = suppositions.pop();
      if (!last) throw new RangeError('Expected statements with a solution but received contradictory ones');
      suppose(last.before, last.person, false);
      waiting = 0;
      continue;
    }
    const persons = involved(speaker, claim);
    const settled = persons.every((i) => (known[i] ?? forced.get(i)) !== undefined);
    if (forced.size > 0) {
      for (const [person, isKnight] of forced) known[person] = isKnight;
      const facts = [...forced].map(([person, isKnight]) => `${roleOf(isKnight)} ${names[person]}`);
      steps.push(`${line} so ${facts.join(' ')}`);
    } else steps.push(`${line} ${settled ? 'fits' : 'wait'}`);
    waiting = forced.size > 0 ? 0 : waiting + (settled ? 0 : 1);
    if (!settled) unsettled.push(speaker);
  }
  steps.push(conclusion);
  return { steps, solution: known.map((value) => value === true) };
}

/** Everybody on whom it depends whether the claim may be made. */
function involved(speaker: number, claim: Claim): number[] {
  return [...new Set([...personsOf(claim), speaker])];
}

/** What the claim forces of whom; undefined where it fits nobody's role. */
function infer(speaker: number, claim: Claim, known: Known): Map<number, boolean> | undefined {
  const open = involved(speaker, claim).filter((i) => known[i] === undefined);
  const possible: boolean[][] = [];
  for (let code = 0; code < 2 ** open.length; code++) {
    const trial = known.map((value) => value === true);
    open.forEach((person, bit) => {
      trial[person] = (code & (1 << bit)) !== 0;
    });
    if (evaluateClaim(claim, trial) === trial[speaker]) possible.push(trial);
  }
  const [first] = possible;
  if (!first) return undefined;
  return new Map(
    open
      .filter((person) => possible.every((trial) => trial[person] === first[person]))
      .map((person) => [person, first[person] as boolean]),
  );
}

/** The claim in short, with the truth of each of its parts where `known` is given. */
function shorthand(claim: Claim, names: readonly string[], known?: Known): string {
  const truth = (atom: Claim) => {
    const value = known && evaluatePartially(atom, known);
    return known ? ` ${value ?? 'open'}` : '';
  };
  switch (claim.kind) {
    case 'knight':
      return `+${names[claim.person]}${truth(claim)}`;
    case 'knave':
      return `-${names[claim.person]}${truth(claim)}`;
    case 'not': {
      const inner = claim.claim;
      if (inner.kind !== 'knight' && inner.kind !== 'knave') {
        throw new RangeError('Expected claims of depth 1 at most');
      }
      return shorthand(
        { kind: inner.kind === 'knight' ? 'knave' : 'knight', person: inner.person },
        names,
        known,
      );
    }
    default: {
      const word = claim.kind === 'if' ? 'then' : claim.kind;
      return `${shorthand(claim.left, names, known)} ${word} ${shorthand(claim.right, names, known)}`;
    }
  }
}

function roleOf(isKnight: boolean | undefined): string {
  return isKnight === undefined ? 'open' : isKnight ? 'knight' : 'knave';
}
