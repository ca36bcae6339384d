import { mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, describe, expect, test } from '@jest/globals';
import { verifyDataset } from '../../lib/evaluate/index.js';
import { parseCompletion } from '../../lib/reward/completion.js';
import {
  type Expression,
  formatExpression,
  maxLength,
  readExpression,
} from '../../lib/tasks/countdown/expression.js';
import { drawPuzzle } from '../../lib/tasks/countdown/generator.js';
import { type CountdownOptions, countdown, instructionFor } from '../../lib/tasks/countdown/index.js';
import { formatRational, type Operation, type Rational } from '../../lib/tasks/countdown/rational.js';
import { workedSolution } from '../../lib/tasks/countdown/reasoning.js';
import { countdownReward, judgeAnswer } from '../../lib/tasks/countdown/reward.js';
import {
  allOperations,
  type Puzzle,
  problemOf,
  type Rules,
  solve,
  type Use,
} from '../../lib/tasks/countdown/solver.js';
import { Random } from '../../lib/tasks/random.js';
import { readRules, sorted, totalsInText } from '../reward/totals-in-text.js';
import { fixturePath } from '../support/fixtures.js';

const exactly: Rules = { use: 'exactly-once', operations: allOperations };
const atMost: Rules = { use: 'at-most-once', operations: allOperations };

/** A fraction that is never reduced, apart from the library's own. */
type Fraction = readonly [numerator: bigint, denominator: bigint];

function combine(operation: Operation, [a, b]: Fraction, [c, d]: Fraction): Fraction | undefined {
  switch (operation) {
    case '+':
      return [a * d + b * c, b * d];
    case '-':
      return [a * d - b * c, b * d];
    case '*':
      return [a * c, b * d];
    case '/':
      return c === 0n ? undefined : [a * d, b * c];
  }
}

/** Every value that all the numbers make, by joining two after two in every way, as a text in lowest terms. */
function reachable(numbers: readonly number[], operations: readonly Operation[]): Set<string> {
  const found = new Set<string>();
  const visit = (values: readonly Fraction[]): void => {
    if (values.length === 1) {
      const [n, d] = values[0] as Fraction;
      found.add(n % d === 0n ? `${n / d}` : 'a fraction');
    }
    for (let i = 0; i < values.length; i++) {
      for (let j = 0; j < values.length; j++) {
        if (i === j) continue;
        const rest = values.filter((_, k) => k !== i && k !== j);
        for (const operation of operations) {
          const joined = combine(operation, values[i] as Fraction, values[j] as Fraction);
          if (joined) visit([...rest, joined]);
        }
      }
    }
  };
  visit(numbers.map((number): Fraction => [BigInt(number), 1n]));
  return found;
}

function choices(numbers: readonly number[]): number[][] {
  return Array.from({ length: 2 ** numbers.length - 1 }, (_, bits) =>
    numbers.filter((_number, i) => ((bits + 1) >> i) & 1),
  );
}

function numbersOf(expression: Expression): number[] {
  if (expression.kind === 'number') return [expression.value];
  return [...numbersOf(expression.left), ...numbersOf(expression.right)];
}

describe('reading an expression', () => {
  test.each<[string, string]>([
    ['1', '1'],
    ['(1 + 2) * 3', '9'],
    ['1 + 2 * 3', '7'],
    ['10 - 4 - 3', '3'],
    ['10 - (4 - 3)', '9'],
    ['100 / 5 / 2', '10'],
    ['100 / (5 / 2)', '40'],
    ['8 / (3 - 8 / 3)', '24'],
    ['1 / 3 + 1 / 3 + 1 / 3', '1'],
    ['2 / 3', '2/3'],
    ['-3 + 5', '2'],
    ['3 - -5', '8'],
    ['-(3 - 5) * +4', '8'],
    ['2 * -3', '-6'],
    ['0 * 5', '0'],
    ['((((7))))', '7'],
    ['3\n+\t4', '7'],
    ['12 \u00d7 3 \u00f7 4', '9'],
    ['12 \u00b7 3', '36'],
    ['12 \u22c5 3 \u2217 2', '72'],
    ['9 \u2212 4 \u2013 1', '4'],
    ['9 \u2215 3', '3'],
    ['2 \\times 3 \\cdot 4 \\div 6', '4'],
    ['\\frac{12}{3} + \\dfrac{1 + 1}{2}', '5'],
    ['\\left(1 + 2\\right) \\times 3', '9'],
    ['$(1+2) * 3$', '9'],
    ['$$4*5$$', '20'],
    ['\\(4*5\\)', '20'],
    ['\\[4*5\\]', '20'],
    ['99999999999999999999 - 99999999999999999998', '1'],
  ])('%j is %s', (text, value) => {
    const reading = readExpression(text);
    expect(reading && formatRational(reading.value)).toBe(value);
    expect(reading?.equationHolds).toBe(true);
  });

  test.each<[string]>([
    [''],
    [' '],
    ['()'],
    ['1 +'],
    ['+'],
    ['1 2'],
    ['(1 + 2'],
    ['1 + 2)'],
    ['2(3 + 4)'],
    ['(1 + 2)(3)'],
    ['2 ** 3'],
    ['7 // 2'],
    ['2 ^ 3'],
    ['7 % 2'],
    ['3!'],
    ['\\sqrt{9}'],
    ['2.5 * 2'],
    ['2. * 2'],
    ['1,000'],
    ['1_000'],
    ['1e3'],
    ['0x10'],
    ['007'],
    ['3 x 4'],
    ['\u0663 + 1'],
    ['five + 1'],
    ['1 + 2.'],
    ['44 + 19 is the answer'],
    ['1 / 0'],
    ['1 / (3 - 3)'],
    ['\\frac{1}{2 - 2}'],
    ['\\frac12'],
    ['\\frac{1}'],
    ['{1 + 2}'],
    ['[1 + 2]'],
    ['\\toString 1'],
    ['9 = 4 + 5'],
    ['1 = 1 = 1'],
    ['4 + 5 ='],
    ['4 + 5 = 3 * 3'],
    ['4 + 5 = 9.'],
    ['$4 + 5'],
    ['globalThis.process.exit()'],
  ])('%j is none', (text) => {
    expect(readExpression(text)).toBeUndefined();
  });

  test('tells the numbers, the operations, and whether an equation holds', () => {
    expect(readExpression('3 * (4 - 1) - 3')).toMatchObject({
      numbers: [3n, 4n, 1n, 3n],
      operations: new Set(['*', '-']),
    });
    expect(readExpression('4 + 5 = 9')).toMatchObject({ numbers: [4n, 5n], equationHolds: true });
    expect(readExpression('4 + 5 = 10')).toMatchObject({ numbers: [4n, 5n], equationHolds: false });
    expect(readExpression('4 - 5 = -1')).toMatchObject({ equationHolds: true });
    expect(readExpression('1 / 2 = 0')).toMatchObject({ equationHolds: false });
    expect(readExpression('-4')?.operations).toEqual(new Set(['-']));
  });

  test('agrees with exact arithmetic on the tree that was written down', () => {
    const random = new Random(3);
    const symbols: Record<Operation, readonly string[]> = {
      '+': ['+'],
      '-': ['-', '\u2212', '\u2013'],
      '*': ['*', '\u00d7', '\u00b7', '\\times '],
      '/': ['/', '\u00f7', '\\div '],
    };
    /** A text with every operation in parentheses, the tree, and its value. */
    const draw = (depth: number): { text: string; tree: Expression; value: Fraction | undefined } => {
      if (depth === 0 || random.chance(0.2)) {
        const value = random.below(30);
        return { text: `${value}`, tree: { kind: 'number', value }, value: [BigInt(value), 1n] };
      }
      const operation = random.pick(allOperations);
      const [left, right] = [draw(depth - 1), draw(depth - 1)];
      const value = left.value && right.value && combine(operation, left.value, right.value);
      const tree = { kind: 'operation', operation, left: left.tree, right: right.tree } as const;
      if (operation === '/' && random.chance(0.3)) {
        return { text: `\\frac{${left.text}}{${right.text}}`, tree, value };
      }
      return { text: `(${left.text} ${random.pick(symbols[operation])} ${right.text})`, tree, value };
    };
    let undefinedValues = 0;
    const off: string[] = [];
    for (let trial = 0; trial < 2000; trial++) {
      const { text, tree, value } = draw(1 + random.below(5));
      for (const written of [text, formatExpression(tree)]) {
        const reading = readExpression(written);
        if (!value) undefinedValues++;
        const [n, d] = value ?? [0n, 0n];
        const exact = reading?.value;
        const agrees = value
          ? exact !== undefined &&
            exact.numerator * d === n * exact.denominator &&
            exact.denominator > 0n &&
            `${reading?.numbers}` === `${numbersOf(tree)}`
          : reading === undefined;
        if (!agrees) off.push(written);
      }
    }
    expect(off).toEqual([]);
    expect(undefinedValues).toBeGreaterThan(20);
  });

  test.each<[string, string]>([
    ['10,000 parentheses', '('.repeat(10_000)],
    ['500 balanced parentheses', `${'('.repeat(499)}1${')'.repeat(499)}`],
    ['900 signs', `${'-'.repeat(900)}1`],
    ['a tower of powers', '9**9**9**9'],
    ['a million digits', '9'.repeat(1_000_000)],
    ['a million spaces', `1${' '.repeat(1_000_000)}`],
    ['nested fractions', '\\frac{'.repeat(140)],
    ['backslashes', '\\'.repeat(1000)],
  ])('ends in time on %s', (_, text) => {
    const start = performance.now();
    expect(readExpression(text)).toBeUndefined();
    expect(performance.now() - start).toBeLessThan(250);
  });

  test('the longest sums of fractions and products that are read end in time', () => {
    for (const term of ['1/983+', '977*']) {
      const text = term.repeat(Math.floor(maxLength / term.length) - 1);
      const varied = text.replace(/9[78]./g, (_, at: number) => String(900 + (at % 97)));
      const start = performance.now();
      expect(readExpression(`${varied}1`)).toBeDefined();
      expect(performance.now() - start).toBeLessThan(500);
    }
  });
});

describe('the solver', () => {
  test.each<[Use, number, number, readonly Operation[]]>([
    ['exactly-once', 3, 400, allOperations],
    ['at-most-once', 3, 200, allOperations],
    ['exactly-once', 3, 200, ['+', '-']],
    ['exactly-once', 3, 200, ['*', '/']],
    ['at-most-once', 3, 200, ['-', '/']],
    ['exactly-once', 4, 8, allOperations],
    ['at-most-once', 4, 4, allOperations],
    ['exactly-once', 4, 30, ['-', '*']],
  ])('%s of %i numbers: finds a solution exactly where there is one', (use, count, trials, operations) => {
    const random = new Random(count * trials);
    let solvable = 0;
    const off: Puzzle[] = [];
    for (let trial = 0; trial < trials; trial++) {
      const numbers = Array.from({ length: count }, () => 1 + random.below(12));
      const sets = use === 'exactly-once' ? [numbers] : choices(numbers);
      const values = new Set(sets.flatMap((set) => [...reachable(set, operations)]));
      for (let draw = 0; draw < 10; draw++) {
        const puzzle = { numbers, target: 1 + random.below(60) };
        const found = solve(puzzle, { use, operations });
        const verdict = found && judgeAnswer(formatExpression(found), puzzle, { use, operations });
        if (verdict !== (values.has(`${puzzle.target}`) ? 'right' : undefined)) off.push(puzzle);
        if (found) solvable++;
      }
    }
    expect(off).toEqual([]);
    expect(solvable).toBeGreaterThan(trials / 10);
    expect(solvable).toBeLessThan(10 * trials);
  });

  test.each<[number[], number, string | undefined]>([
    [[3, 3, 8, 8], 24, '8 / (3 - 8 / 3)'],
    [[1, 5, 5, 5], 24, '(5 - 1 / 5) * 5'],
    [[5, 5, 5, 1, 7, 7], 24, undefined],
    [[5], 5, '5'],
    [[25, 50, 75, 100, 3, 6], 952, undefined],
  ])('%j makes %i, by fractions where it must', (numbers, target, expected) => {
    const found = solve({ numbers, target }, exactly) as Expression;
    const text = formatExpression(found);
    expect(judgeAnswer(text, { numbers, target }, exactly)).toBe('right');
    if (expected !== undefined && numbers.length < 4) expect(text).toBe(expected);
  });

  test('prefers few numbers where it may leave some out, and none twice', () => {
    const puzzle = { numbers: [7, 2, 2, 9, 100, 3], target: 9 };
    expect(formatExpression(solve(puzzle, atMost) as Expression)).toBe('9');
    const two = solve({ numbers: [7, 2, 8, 100, 3], target: 9 }, atMost) as Expression;
    expect(numbersOf(two).sort()).toEqual([2, 7]);
    expect(solve({ numbers: [2, 3], target: 7 }, atMost)).toBeUndefined();
  });

  test('is quick with six numbers, solvable or not', () => {
    const random = new Random(2);
    const trials = 60;
    let total = 0;
    let without = 0;
    for (let trial = 0; trial < trials; trial++) {
      const numbers = Array.from({ length: 6 }, () => 1 + random.below(100));
      const puzzle = { numbers, target: 1 + random.below(999) };
      const start = performance.now();
      if (!solve(puzzle, exactly)) without++;
      total += performance.now() - start;
    }
    expect(total / trials).toBeLessThan(150);
    expect(without).toBeGreaterThan(0);
  });

  test.each<[number[], number, string]>([
    [[], 5, '1 to 6 numbers but found 0'],
    [[1, 2, 3, 4, 5, 6, 7], 5, '1 to 6 numbers but found 7'],
    [[1, 0], 5, 'positive whole numbers and target but found 0'],
    [[1, 2.5], 5, 'found 2.5'],
    [[1, -2], 5, 'found -2'],
    [[1, 2], 0, 'found 0'],
    [[1, 2], Number.NaN, 'found NaN'],
    [[999_999, 999_999, 999_999], 5, 'at most 2^53'],
  ])('refuses %j and %d', (numbers, target, message) => {
    expect(problemOf({ numbers, target })).toContain(message);
    expect(() => solve({ numbers, target }, exactly)).toThrow(message);
  });
});

const settings = { counts: [3, 4], largestNumber: 100, largestTarget: 100, operations: allOperations };

describe('generated puzzles', () => {
  test('have a solution of positive whole steps, and numbers and a target in their bounds', () => {
    const lengths = new Map<number, number>();
    const off: unknown[] = [];
    const resultsOf = (node: Expression): string[] => {
      if (node.kind === 'number') return [];
      const reading = readExpression(formatExpression(node));
      return [formatRational(reading?.value as Rational), ...resultsOf(node.left), ...resultsOf(node.right)];
    };
    for (let seed = 0; seed < 3000; seed++) {
      const puzzle = drawPuzzle(new Random(seed), settings);
      const { numbers, target } = puzzle;
      lengths.set(numbers.length, (lengths.get(numbers.length) ?? 0) + 1);
      const solution = solve(puzzle, exactly);
      const sound =
        problemOf(puzzle) === undefined &&
        Math.max(...numbers, target) <= 100 &&
        !numbers.includes(target) &&
        solution !== undefined &&
        judgeAnswer(formatExpression(solution), puzzle, exactly) === 'right' &&
        resultsOf(solution).every((result) => /^[1-9]\d*$/.test(result));
      if (!sound) off.push(puzzle);
    }
    expect(off).toEqual([]);
    expect([...lengths.keys()].sort()).toEqual([3, 4]);
    expect(Math.min(...lengths.values())).toBeGreaterThan(1300);
  });

  test.each<[string, Partial<typeof settings>]>([
    ['six numbers', { counts: [6], largestTarget: 999 }],
    ['sums alone', { operations: ['+'] }],
    ['divisions alone', { counts: [2], operations: ['/'] }],
    ['two numbers', { counts: [2], largestNumber: 9 }],
  ])('of %s come up too', (_, changed) => {
    const options = { ...settings, ...changed };
    for (let seed = 0; seed < 100; seed++) {
      const puzzle = drawPuzzle(new Random(seed), options);
      expect(drawPuzzle(new Random(seed), options)).toEqual(puzzle);
      const rules: Rules = { use: 'exactly-once', operations: options.operations };
      expect(solve(puzzle, rules)).toBeDefined();
    }
  });

  test('are refused where the options leave none', () => {
    const impossible = { ...settings, counts: [2], largestNumber: 1, operations: ['*'] as const };
    expect(() => drawPuzzle(new Random(1), impossible)).toThrow(
      'Found no puzzle of 2 numbers up to 1 with * and a target up to 100',
    );
  });
});

describe('the worked solution', () => {
  test('computes every equation, uses what is left, and ends at the target', () => {
    for (const rules of [exactly, atMost]) {
      for (let seed = 0; seed < 150; seed++) {
        const counts = [2, 3, 4, 5, 6];
        const puzzle = drawPuzzle(new Random(seed), { ...settings, counts, largestTarget: 300 });
        const { lines, solution } = workedSolution(puzzle, rules, solve(puzzle, rules) as Expression);
        expect(judgeAnswer(formatExpression(solution), puzzle, rules)).toBe('right');
        expect(lines.length).toBeLessThanOrEqual(3);
        for (const [i, line] of lines.entries()) {
          const last = i === lines.length - 1;
          expect(line.endsWith(last ? ' That is the target.' : ` Not ${puzzle.target}.`)).toBe(true);
          let left = [...puzzle.numbers];
          let result: number | undefined;
          for (const [, equation, list] of line.matchAll(/(\d+ . \d+ = \d+)(?:, left ([\d ]+))?\./g)) {
            const [a, , b, , c] = (equation as string).split(' ');
            expect(readExpression(equation as string)?.equationHolds).toBe(true);
            result = Number(c);
            for (const used of [a, b]) {
              const at = left.indexOf(Number(used));
              expect(at).toBeGreaterThanOrEqual(0);
              left = left.filter((_, k) => k !== at);
            }
            left.push(result);
            if (list !== undefined) expect(sorted(list.split(' ').map(Number))).toEqual(sorted(left));
            else expect(left).toHaveLength(1);
          }
          if (result === undefined) expect(puzzle.numbers).toContain(puzzle.target);
          else expect(result === puzzle.target).toBe(last);
          if (rules === exactly) expect(left).toHaveLength(1);
        }
      }
    }
  });

  test('goes by fractions where there is no other way', () => {
    const puzzle = { numbers: [3, 3, 8, 8], target: 24 };
    const { lines } = workedSolution(puzzle, exactly, solve(puzzle, exactly) as Expression);
    expect(lines.at(-1)).toBe(
      'Try 8 / 3 = 8/3, left 3 8 8/3. 3 - (8/3) = 1/3, left 8 1/3. 8 / (1/3) = 24. That is the target.',
    );
  });
});

describe('the reward, rule by rule', () => {
  const row: Puzzle = { numbers: [44, 19, 35], target: 98 };
  const judge = async (raw: string, rules = exactly, puzzle = row) => {
    const { total, parts } = await countdownReward(rules).judge(parseCompletion({ raw }), puzzle);
    return [total, parts.format?.case, parts.correctness?.case];
  };
  const within = (answer: string) => `<think>hm</think><answer>${answer}</answer>`;
  const right = [3, 'demanded', 'right'];
  const wrongValue = [-0.5, 'demanded', 'wrong-value'];
  const wrongNumbers = [-0.5, 'demanded', 'wrong-numbers'];
  const unreadable = [-1, 'demanded', 'unreadable'];
  const broken = [-3, 'broken', 'unreadable'];

  test.each<[string, unknown[]]>([
    ['44 + 19 + 35', right],
    ['(35 + 19) + 44', right],
    ['44+19+35 = 98', right],
    ['$44 + 19 + 35 = 98$', right],
    ['35 - (-44) - (-19)', right],
    ['44 + 19 - 35', wrongValue],
    ['44 * 19 * 35', wrongValue],
    ['44 + 19 + 35 = 99', wrongValue],
    ['44 + 19 - 35 = 98', wrongValue],
    // The target reached by what is not allowed.
    ['98', wrongNumbers],
    ['98 + 44 - 44', wrongNumbers],
    ['44 + 54', wrongNumbers],
    ['44 + 19 + 35 + 0', wrongNumbers],
    ['44 + 19 + 35 * 1', wrongNumbers],
    ['(44 + 19 + 35) * 44 / 44', wrongNumbers],
    ['4 + 4 + 19 + 35 + 36', wrongNumbers],
    // Neither the numbers nor the value.
    ['44 + 19', wrongNumbers],
    ['1 + 1', wrongNumbers],
    ['', unreadable],
    ['44 + 19 + 35 is 98', unreadable],
    ['98 = 44 + 19 + 35', unreadable],
    ['44 + 19 + 35, 98', unreadable],
    ['44 + 19 + 35 / 0', unreadable],
    ['4.4 * 10 + 19 + 35', unreadable],
    ['44 ** 19 + 35', unreadable],
    ['44 + 19\n44 + 19 + 35', unreadable],
  ])('%j', async (answer, expected) => {
    expect(await judge(within(answer))).toEqual(expected);
  });

  const answer = '<answer>44 + 19 + 35</answer>';
  test.each<[string, unknown[]]>([
    [`before <think></think> between ${answer} after`, right],
    [`<think></think>${answer}${answer}`, broken],
    [answer, broken],
    [`${answer}<think></think>`, broken],
    ['<think></think><answer>44 + 19 + 35', broken],
    ['44 + 19 + 35', broken],
    ['', broken],
  ])('%j', async (raw, expected) => {
    expect(await judge(raw)).toEqual(expected);
  });

  test('numbers that may be left out may still not be used twice or made up', async () => {
    const puzzle = { numbers: [5, 5, 2], target: 10 };
    const at = (text: string) => judge(within(text), atMost, puzzle);
    expect(await at('5 + 5')).toEqual(right);
    expect(await at('5 * 2')).toEqual(right);
    expect(await at('5 + 5 * 2 - 5')).toEqual(wrongNumbers);
    expect(await at('2 * 2 + 5 + 1')).toEqual(wrongNumbers);
    expect(await at('10')).toEqual(wrongNumbers);
    expect(await at('5 + 2')).toEqual(wrongValue);
    expect(await judge(within('5 + 5'), exactly, puzzle)).toEqual(wrongNumbers);
    expect(await judge(within('5 + 5'), exactly, { numbers: [5, 5], target: 10 })).toEqual(right);
    expect(await judge(within('5 + 5'), exactly, { numbers: [5], target: 10 })).toEqual(wrongNumbers);
  });

  test('an operation that is not allowed cannot be read', async () => {
    const rules: Rules = { use: 'exactly-once', operations: ['+', '*'] };
    const puzzle = { numbers: [9, 4], target: 5 };
    expect(await judge(within('9 - 4'), rules, puzzle)).toEqual(unreadable);
    expect(await judge(within('-4 + 9'), rules, puzzle)).toEqual(unreadable);
    expect(await judge(within('9 * 4'), rules, puzzle)).toEqual(wrongValue);
  });

  test('the target is compared exactly', async () => {
    // In double precision 0.1 + 0.2 and the like come near; 10^17 and 10^17 + 1 are the same.
    const puzzle = { numbers: [3, 7, 21], target: 1 };
    expect(await judge(within('3 / 7 * 21'), exactly, puzzle)).toEqual(wrongValue);
    expect(await judge(within('21 / 3 / 7'), exactly, puzzle)).toEqual(right);
    const big = { numbers: [100_000_000, 1_000_000_000, 1], target: 100_000_000_000_000_000 };
    expect(judgeAnswer('100000000 * 1000000000 + 1', big, exactly)).toBe('wrong-value');
    expect(judgeAnswer('100000000 * 1000000000 * 1', big, exactly)).toBe('right');
  });
});

describe('the motivation', () => {
  test('states every score in every view, and every total follows from it and occurs', () => {
    const spec = countdownReward(exactly);
    expect(spec.totals()).toEqual([3, -0.5, -1, -3]);
    for (const [view, expected] of [
      ['full', [-3, -1, -0.5, 3]],
      ['adverse', [-3, 0.5, 1, 3]],
      [{ partial: ['correctness'] }, [-2, -1.5, 2]],
    ] as const) {
      expect(totalsInText(readRules(spec.describe(view)))).toEqual(expected);
    }
    expect(spec.describe('full')).toMatch(/\+2 points if .*every given number exactly once.*the target/);
    expect(spec.describe({ partial: ['correctness'] })).not.toMatch(/format|tag|think/i);
  });

  test('says which numbers and operations are allowed', () => {
    const rules: Rules = { use: 'at-most-once', operations: ['+', '-', '*'] };
    const text = countdownReward(rules).describe('full');
    expect(text).toContain('given numbers only, each at most once');
    expect(text).toContain('parentheses and +, - and *');
    expect(text).not.toContain('exactly once and');
  });
});

describe('the task', () => {
  test('draws the same rows for the same seed, and none of a split in the other', async () => {
    const task = await countdown.open({ numbers: '2-3,5' });
    const rows = task.rows({ split: 'train', seed: 5 });
    const again = task.rows({ split: 'train', seed: 5 });
    expect(again.at(7)).toEqual(rows.at(7));
    expect(again.fingerprint).toBe(rows.fingerprint);
    const other = task.rows({ split: 'train', seed: 6 });
    expect(other.at(7)).not.toEqual(rows.at(7));
    expect(other.fingerprint).not.toBe(rows.fingerprint);
    const seen = (split: 'train' | 'test') => {
      const source = task.rows({ split, seed: 5 });
      return Array.from({ length: 300 }, (_, i) => source.at(i));
    };
    const key = ({ numbers, target }: Puzzle) => `${[...numbers].sort()} ${target}`;
    const train = new Set(seen('train').map(key));
    const held = seen('test');
    expect(held.filter((row) => train.has(key(row)))).toEqual([]);
    expect([...new Set(held.map(({ numbers }) => numbers.length))].sort()).toEqual([2, 3, 5]);
  });

  test.each<[CountdownOptions]>([
    [{}],
    [{ use: 'at-most-once', numbers: '3-6', largestTarget: 999 }],
    [{ operations: '+-', numbers: 4 }],
    [{ operations: ['*', '/'], numbers: [2, 3], largestNumber: 20 }],
  ])('its references and demonstrations get the highest total, with %j', async (options) => {
    const task = await countdown.open(options);
    const rows = task.rows({ split: 'train', seed: 3 });
    for (let i = 0; i < 150; i++) {
      const row = rows.at(i);
      for (const write of [task.reference, task.demonstrate]) {
        const { total } = await task.spec.judge(parseCompletion({ raw: write?.(row) as string }), row);
        expect(total).toBe(3);
      }
      expect(task.check?.find(row)).toBeUndefined();
    }
  });

  test('its prompt says the rules in a system message, and the motivation adds the points', async () => {
    const task = await countdown.open({ use: 'at-most-once', operations: '-+' });
    const row = { numbers: [7, 2, 9], target: 5 };
    const [system, user] = task.messages(row, 'none');
    expect(user).toEqual({ role: 'user', content: 'Numbers: 7, 2, 9\nTarget: 5' });
    expect(system?.content).toContain(
      'use given numbers only, each at most once, with + and - and parentheses',
    );
    expect(system?.content).toContain('<answer>\n(8 + 4) - 2\n</answer>');
    expect(system?.content).not.toMatch(/point|score/);
    const rules: Rules = { use: 'at-most-once', operations: ['+', '-'] };
    expect(task.messages(row, 'full')[0]?.content).toBe(
      `${instructionFor(rules)}\n\n${task.spec.describe('full')}`,
    );
    expect(task.spec.describe('full')).toContain('+2 points');
  });

  test.each<[CountdownOptions, string]>([
    [{ numbers: 1 }, 'numbers: expected numbers from 2 to 6'],
    [{ numbers: 7 }, 'numbers: expected'],
    [{ numbers: '4-3' }, 'numbers: expected'],
    [{ numbers: '2-99999999' }, 'numbers: expected'],
    [{ numbers: [] }, 'numbers: expected'],
    [{ operations: '' }, 'operations: expected some of + - * /'],
    [{ operations: '+^' }, 'operations: expected some of + - * /'],
    [{ use: 'twice' as 'exactly-once' }, 'use: '],
    [{ largestNumber: 0 }, 'largestNumber: '],
    [{ largestTarget: 2.5 }, 'largestTarget: '],
    [{ numbers: 6, largestNumber: 1000 }, '6 numbers up to 1000 with a target up to 100 are too much'],
  ])('refuses %j', async (options, message) => {
    await expect(countdown.open(options)).rejects.toMatchObject({
      code: 'INVALID_ARGUMENT',
      message: expect.stringContaining(message),
    });
  });
});

describe('rows of a file', () => {
  const folders: string[] = [];
  const write = async (lines: readonly string[]) => {
    const folder = await mkdtemp(join(tmpdir(), 'merf-countdown-'));
    folders.push(folder);
    await writeFile(join(folder, 'rows.jsonl'), lines.join('\n'));
    return join(folder, 'rows.jsonl');
  };
  afterAll(async () => {
    for (const folder of folders) await rm(folder, { recursive: true });
  });

  test('in the public layout are read, and verified', async () => {
    const file = fixturePath('countdown/puzzles.parquet');
    const task = await countdown.open({ data: file });
    const rows = await task.load(file);
    expect(rows).toHaveLength(24);
    const train = task.rows({ split: 'train', seed: 1 });
    expect((train.size ?? 0) + (task.rows({ split: 'test', seed: 1 }).size ?? 0)).toBe(24);
    const report = await verifyDataset(await countdown.open(), file);
    expect(report.problems).toEqual([]);
    expect(report.references).toMatchObject({ highest: 3, atHighest: 24 });
    expect(report.check).toEqual({ name: 'solver finds one', passed: 24 });
  });

  test.each([
    ['{"nums": [1, "2"], "target": 3}', 'Expected numbers in column nums but found "2"'],
    ['{"numbers": [1, 2], "target": "3"}', 'Expected numbers in column target but found "3"'],
    ['{"target": 3}', 'Expected a list of numbers in column nums or numbers but found undefined'],
    ['{"nums": [1, 2]}', 'Expected numbers in column target but found undefined'],
    ['{"nums": [], "target": 3}', 'Expected 1 to 6 numbers but found 0'],
    ['{"nums": [1.5, 2], "target": 3}', 'Expected positive whole numbers and target but found 1.5'],
    ['{"nums": [1, 2], "target": 4}', 'the numbers 1, 2 do not reach 4, every given number exactly once'],
    ['{"nums": [9, 9], "target": 9}', 'the numbers 9, 9 do not reach 9, every given number exactly once'],
  ])('%s is off', async (line, reason) => {
    const file = await write(['{"numbers": [1, 2], "target": 3}', line]);
    const { problems } = await verifyDataset(await countdown.open(), file);
    expect(problems).toEqual([{ row: 2, where: `${file}, line 2`, reason: expect.stringContaining(reason) }]);
  });

  test('are solvable by the rule that is chosen', async () => {
    const file = await write(['{"nums": [9, 9], "target": 9}', '{"nums": [5], "target": 5}']);
    expect((await verifyDataset(await countdown.open({ use: 'at-most-once' }), file)).problems).toEqual([]);
  });
});
