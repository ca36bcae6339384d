import { MerfError } from '../../errors.js';
import { type Claim, evaluatePartially, personsOf } from './claim.js';

/** More persons than this are refused: the search is exponential in the worst case. */
export const maxPersons = 24;

/**
 * Every assignment (true: knight) under which each knight's claim is true and each knave's is false, in the order
 * of counting with knights first. Stops at `limit` solutions. Assigns one person after the other and gives a branch
 * up as soon as a known speaker's claim is settled the wrong way.
 *
 * @param statements `statements[i]` is what person i says
 * @throws MerfError INVALID_ARGUMENT for no or too many persons, a person out of range, or a limit below 1
 */
export function solve(statements: readonly Claim[], limit = Number.POSITIVE_INFINITY): boolean[][] {
  const count = statements.length;
  if (count < 1 || count > maxPersons) {
    throw new MerfError('INVALID_ARGUMENT', `Expected 1 to ${maxPersons} statements but received ${count}`);
  }
  if (!(limit >= 1)) {
    throw new MerfError('INVALID_ARGUMENT', `Expected a positive number for limit but received ${limit}`);
  }
  statements.forEach((claim, speaker) => {
    for (const person of personsOf(claim)) {
      if (!Number.isInteger(person) || person < 0 || person >= count) {
        throw new MerfError(
          'INVALID_ARGUMENT',
          `Expected persons from 0 to ${count - 1} in statement ${speaker} but received ${person}`,
        );
      }
    }
  });

  const solutions: boolean[][] = [];
  const isKnight: (boolean | undefined)[] = new Array(count).fill(undefined);
  const search = (next: number): void => {
    if (next === count) {
      solutions.push(isKnight.map((value) => value === true));
      return;
    }
    for (const value of [true, false]) {
      isKnight[next] = value;
      if (consistent(statements, isKnight, next)) search(next + 1);
      if (solutions.length >= limit) break;
    }
    isKnight[next] = undefined;
  };
  search(0);
  return solutions;
}

function consistent(
  statements: readonly Claim[],
  isKnight: readonly (boolean | undefined)[],
  lastAssigned: number,
): boolean {
  for (let speaker = 0; speaker <= lastAssigned; speaker++) {
    const truth = evaluatePartially(statements[speaker] as Claim, isKnight);
    if (truth !== undefined && truth !== isKnight[speaker]) return false;
  }
  return true;
}
