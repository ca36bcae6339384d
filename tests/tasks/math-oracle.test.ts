import { expect, test } from '@jest/globals';
import { areEquivalent } from 'merf';
import { readJson } from '../support/fixtures.js';

type Pair = readonly [kind: string, answer: string, reference: string, isEqual: boolean, oracle: boolean];

interface Fixture {
  readonly versions: Readonly<Record<string, string>>;
  readonly pairs: readonly Pair[];
}

/** Kinds of which pairs that math-verify calls unequal are called equal, with the reason. */
const reasons: Readonly<Record<string, string>> = {
  scientific: '4.1 \\cdot 10^{5} is 410000; math-verify finds its float unequal to the integer.',
  two_variables: '-3n + 6 - 2m is -2m - 3n + 6; math-verify drops an m at the end as metres.',
  trigonometry: 'The sine of 30° is 1/2; math-verify drops the degree sign and takes 30 for radians.',
  complex_number:
    'The products and quotients are equal by i^2 = -1; math-verify takes i for a variable here.',
  words: 'A bare word is the word in \\text{}; math-verify reads the one as text and the other as a symbol.',
  repeating:
    'The digits under the line repeat, so the decimal is the fraction; math-verify does not read the line.',
  inequality_for_interval:
    'a < x < b and (a, b) are one set; math-verify only turns a relation of the reference into one.',
};

/** Kinds of which pairs that math-verify calls equal are called unequal, with the reason. */
const stricter: Readonly<Record<string, string>> = {
  rounded:
    'A rounded decimal is not the fraction, unless a tolerance is given; math-verify rounds to six places.',
  other_unit: 'Feet are not minutes; math-verify drops units.',
  other_brackets:
    'A set is no pair, and a closed interval no open one; math-verify compares the two numbers alone.',
};

test('agrees with math-verify, and calls nothing equal that it calls unequal without a reason', async () => {
  const { pairs, versions } = readJson<Fixture>('math_pairs.json');
  expect(pairs.length).toBeGreaterThanOrEqual(2000);
  const verdicts: boolean[] = [];
  const start = performance.now();
  for (const [, answer, reference] of pairs) verdicts.push(await areEquivalent(answer, reference));
  const milliseconds = (performance.now() - start) / pairs.length;

  const agreed = pairs.filter(([, , , , oracle], i) => verdicts[i] === oracle).length;
  const right = pairs.filter(([, , , isEqual], i) => verdicts[i] === isEqual).length;
  const oracleRight = pairs.filter(([, , , isEqual, oracle]) => oracle === isEqual).length;
  const equalToOracle = pairs.filter((pair) => pair[4]).length;
  const percent = (count: number) => `${((100 * count) / pairs.length).toFixed(2)}%`;
  console.log(
    [
      `measured: ${pairs.length} pairs, ${equalToOracle} equal to math-verify ${versions['math-verify']}`,
      `measured: agreement with math-verify ${percent(agreed)}`,
      `measured: agreement with how they were made ${percent(right)}; math-verify's ${percent(oracleRight)}`,
      `measured: ${milliseconds.toFixed(2)} ms a pair, the parser's start included`,
    ].join('\n'),
  );
  expect(agreed / pairs.length).toBeGreaterThanOrEqual(0.98);

  // None of the pairs made unequal is called equal, whatever math-verify says.
  expect(pairs.filter(([, , , isEqual], i) => verdicts[i] && !isEqual)).toEqual([]);
  const moreThanOracle = pairs.filter(([, , , , oracle], i) => verdicts[i] && !oracle);
  expect(moreThanOracle.filter(([kind]) => !Object.hasOwn(reasons, kind))).toEqual([]);
  const lessThanOracle = pairs.filter(([, , , , oracle], i) => !verdicts[i] && oracle);
  expect(lessThanOracle.filter(([kind]) => !Object.hasOwn(stricter, kind))).toEqual([]);
  // No reason outlives its pairs.
  const kindsOf = (some: readonly Pair[]) => [...new Set(some.map(([kind]) => kind))].sort();
  expect(Object.keys(reasons).sort()).toEqual(kindsOf(moreThanOracle));
  expect(Object.keys(stricter).sort()).toEqual(kindsOf(lessThanOracle));
}, 120_000);
