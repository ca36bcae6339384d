import { describe, expect, test } from '@jest/globals';
import { MerfError } from '../../lib/errors.js';
import { canonicalForm, maxTablePeople } from '../../lib/tasks/knights-and-knaves/canonical.js';
import {
  type Claim,
  depthOf,
  evaluateClaim,
  evaluatePartially,
  renderClaim,
  renderSpeech,
  speechFormCount,
} from '../../lib/tasks/knights-and-knaves/claim.js';
import { generatePuzzle } from '../../lib/tasks/knights-and-knaves/generator.js';
import { knightsAndKnaves } from '../../lib/tasks/knights-and-knaves/index.js';
import { answerLines, reasoning, workedSolution } from '../../lib/tasks/knights-and-knaves/reasoning.js';
import { maxPersons, solve } from '../../lib/tasks/knights-and-knaves/solver.js';
import { Random } from '../../lib/tasks/random.js';

/** Truth by plain Boolean recursion over whole assignments, independent of the library's three-valued code. */
function truth(claim: Claim, isKnight: readonly boolean[]): boolean {
  if (claim.kind === 'knight') return isKnight[claim.person] as boolean;
  if (claim.kind === 'knave') return !isKnight[claim.person];
  if (claim.kind === 'not') return !truth(claim.claim, isKnight);
  const l = truth(claim.left, isKnight);
  const r = truth(claim.right, isKnight);
  return { and: l && r, or: l || r, if: !l || r, iff: l === r }[claim.kind];
}

function assignments(count: number): boolean[][] {
  return Array.from({ length: 2 ** count }, (_, bits) =>
    Array.from({ length: count }, (_, i) => !((bits >> (count - 1 - i)) & 1)),
  );
}

function bruteForce(statements: readonly Claim[]): boolean[][] {
  return assignments(statements.length).filter((isKnight) =>
    statements.every((claim, speaker) => truth(claim, isKnight) === isKnight[speaker]),
  );
}

function randomClaim(random: Random, people: number, depth: number): Claim {
  if (depth === 0 || random.chance(0.2)) {
    return { kind: random.pick(['knight', 'knave'] as const), person: random.below(people) };
  }
  const kind = random.pick(['not', 'and', 'or', 'if', 'iff'] as const);
  if (kind === 'not') return { kind, claim: randomClaim(random, people, depth - 1) };
  return {
    kind,
    left: randomClaim(random, people, depth - 1),
    right: randomClaim(random, people, depth - 1),
  };
}

/** Reads a rendered claim back: one connective a level, operands atoms or in parentheses. */
function parse(text: string, names: readonly string[]): Claim {
  let rest = text;
  const take = (pattern: RegExp): RegExpMatchArray | null => {
    const match = rest.match(pattern);
    if (match) rest = rest.slice(match[0].length);
    return match;
  };
  const operand = (): Claim => {
    if (take(/^\(/)) {
      const inner = sentence();
      if (!take(/^\)/)) throw new Error(`no closing parenthesis before ${rest}`);
      return inner;
    }
    const match = take(/^(\w+) is (not )?a (knight|knave)/);
    if (!match) throw new Error(`no claim at ${rest}`);
    const atom: Claim = { kind: match[3] as 'knight' | 'knave', person: names.indexOf(match[1] as string) };
    return match[2] ? { kind: 'not', claim: atom } : atom;
  };
  const sentence = (): Claim => {
    if (take(/^it is not the case that /)) return { kind: 'not', claim: operand() };
    if (take(/^if /)) {
      const left = operand();
      if (!take(/^ then /)) throw new Error(`no "then" before ${rest}`);
      return { kind: 'if', left, right: operand() };
    }
    const left = operand();
    const match = take(/^ (if and only if|and|or) /);
    if (!match) return left;
    const kind = match[1] === 'if and only if' ? 'iff' : (match[1] as 'and' | 'or');
    return { kind, left, right: operand() };
  };
  const claim = sentence();
  if (rest !== '') throw new Error(`left over: ${rest}`);
  return claim;
}

function thrown(run: () => unknown): MerfError {
  try {
    run();
  } catch (error) {
    if (error instanceof MerfError) return error;
    throw error;
  }
  throw new Error('nothing was thrown');
}

describe('claims', () => {
  test('evaluation agrees with plain Boolean recursion, and what partial evaluation settles holds for every completion', () => {
    const random = new Random(1);
    for (let round = 0; round < 500; round++) {
      const claim = randomClaim(random, 4, 3);
      const known = Array.from({ length: 4 }, () => random.pick([true, false, undefined]));
      const partial = evaluatePartially(claim, known);
      for (const full of assignments(4)) {
        expect(evaluateClaim(claim, full)).toBe(truth(claim, full));
        if (partial !== undefined && known.every((value, i) => value === undefined || value === full[i])) {
          expect(truth(claim, full)).toBe(partial);
        }
      }
    }
  });

  test('the English of a claim can be read back in one way, at any depth', () => {
    const random = new Random(2);
    const names = ['Zoey', 'Ethan', 'Mia', 'Noah'];
    for (let round = 0; round < 500; round++) {
      const claim = randomClaim(random, 4, 4);
      expect(parse(renderClaim(claim, names), names)).toEqual(claim);
    }
  });

  test('speech is worded as in the published quizzes', () => {
    const claim: Claim = {
      kind: 'if',
      left: { kind: 'knight', person: 0 },
      right: { kind: 'knave', person: 1 },
    };
    const names = ['Zoey', 'Ethan'];
    const speeches = Array.from({ length: speechFormCount }, (_, form) =>
      renderSpeech(1, claim, names, form),
    );
    expect(new Set(speeches).size).toBe(speechFormCount);
    expect(speeches).toContain('"If Zoey is a knight then Ethan is a knave" - Ethan.');
    expect(speeches).toContain('Ethan said, "If Zoey is a knight then Ethan is a knave."');
    expect(speeches).toContain('Ethan told you that if Zoey is a knight then Ethan is a knave.');
    for (const speech of speeches) expect(speech).toMatch(/[iI]f Zoey is a knight then Ethan is a knave/);
    expect(() => renderSpeech(1, claim, names, speechFormCount)).toThrow(RangeError);
    expect(() => renderClaim(claim, ['Zoey'])).toThrow(RangeError);
    expect(() => evaluateClaim(claim, [])).toThrow(RangeError);
  });
});

describe('solver', () => {
  test('finds exactly what brute force finds, in the same order', () => {
    const random = new Random(3);
    const counts = new Map<number, number>();
    for (let round = 0; round < 400; round++) {
      const people = 1 + random.below(7);
      const statements = Array.from({ length: people }, () => randomClaim(random, people, 2));
      const expected = bruteForce(statements);
      expect(solve(statements)).toEqual(expected);
      expect(solve(statements, 1)).toEqual(expected.slice(0, 1));
      expect(solve(statements, 2)).toEqual(expected.slice(0, 2));
      counts.set(Math.min(expected.length, 2), (counts.get(Math.min(expected.length, 2)) ?? 0) + 1);
    }
    for (const solutions of [0, 1, 2]) expect(counts.get(solutions)).toBeGreaterThan(20);
  });

  test('eight people take no time', () => {
    const puzzles = Array.from({ length: 50 }, (_, index) =>
      generatePuzzle({ people: 8, depth: 2, seed: 4, index }),
    );
    const start = performance.now();
    for (const puzzle of puzzles) solve(puzzle.statements);
    expect((performance.now() - start) / puzzles.length).toBeLessThan(20);
  });

  test('refuses what it cannot search', () => {
    const knight = (person: number): Claim => ({ kind: 'knight', person });
    expect(thrown(() => solve([])).code).toBe('INVALID_ARGUMENT');
    expect(thrown(() => solve(Array.from({ length: maxPersons + 1 }, () => knight(0)))).message).toContain(
      '25',
    );
    expect(thrown(() => solve([knight(1)])).message).toContain('statement 0');
    expect(thrown(() => solve([knight(0.5), knight(0)])).message).toContain('0.5');
    expect(thrown(() => solve([knight(0)], 0)).message).toContain('limit');
  });
});

describe('generator', () => {
  test.each([2, 3, 4, 5, 6, 7, 8])(
    '%i people: one solution, by brute force, and claims within the depth',
    (people) => {
      for (let index = 0; index < 30; index++) {
        const depth = 1 + (index % 3);
        const puzzle = generatePuzzle({ people, depth, seed: 5, index });
        expect(puzzle.names).toHaveLength(people);
        expect(new Set(puzzle.names).size).toBe(people);
        expect(bruteForce(puzzle.statements)).toEqual([puzzle.solution]);
        for (const claim of puzzle.statements) expect(depthOf(claim)).toBeLessThanOrEqual(depth);
        for (const name of puzzle.names) expect(puzzle.quiz).toContain(name);
        expect(puzzle.quiz).toContain(`You meet ${people} inhabitants: `);
        for (const claim of puzzle.statements) {
          expect(puzzle.quiz.toLowerCase()).toContain(renderClaim(claim, puzzle.names).toLowerCase());
        }
      }
    },
  );

  test('the same seed and index give the same puzzle, others other ones', () => {
    const make = (seed: number | bigint, index: number) =>
      generatePuzzle({ people: 3, depth: 1, seed, index });
    expect(make(7, 3)).toEqual(make(7, 3));
    expect(make(7n, 3)).toEqual(make(7, 3));
    const quizzes = new Set<string>();
    for (let seed = 0; seed < 20; seed++)
      for (let index = 0; index < 20; index++) quizzes.add(make(seed, index).quiz);
    expect(quizzes.size).toBeGreaterThan(398);
    expect(make(2 ** 40, 0).quiz).not.toBe(make(0, 0).quiz);
  });

  test('a fixed seed keeps giving the puzzle it gave before', () => {
    const { quiz, solution } = generatePuzzle({ people: 2, seed: 42 });
    expect({ quiz, solution }).toMatchInlineSnapshot(`
{
  "quiz": "A very special island is inhabited only by knights and knaves. Knights always tell the truth, and knaves always lie. You meet 2 inhabitants: Abigail and Benjamin. According to Abigail, "Benjamin is not a knave". Benjamin stated, "Benjamin is a knave if and only if Abigail is a knight". So who is a knight and who is a knave?",
  "solution": [
    false,
    false,
  ],
}
`);
  });

  test('uses every connective and both kinds of islanders about evenly', () => {
    const kinds = new Map<string, number>();
    let knights = 0;
    for (let index = 0; index < 300; index++) {
      const { statements, solution } = generatePuzzle({ people: 2, seed: 8, index });
      for (const { kind } of statements) kinds.set(kind, (kinds.get(kind) ?? 0) + 1);
      knights += solution.filter(Boolean).length;
    }
    for (const kind of ['knight', 'knave', 'not', 'and', 'or', 'if', 'iff'])
      expect(kinds.get(kind)).toBeGreaterThan(20);
    expect(knights / 600).toBeGreaterThan(0.35);
    expect(knights / 600).toBeLessThan(0.75);
  });

  test('takes names of the caller and refuses bad options', () => {
    const { names } = generatePuzzle({ people: 2, seed: 1, names: ['Ada', 'Bob'] });
    expect([...names].sort()).toEqual(['Ada', 'Bob']);
    expect(thrown(() => generatePuzzle({ people: 1, seed: 1 })).message).toMatch(/2 to 8 for people.*1$/);
    expect(thrown(() => generatePuzzle({ people: 9, seed: 1 })).code).toBe('INVALID_ARGUMENT');
    expect(thrown(() => generatePuzzle({ people: 2, depth: 0, seed: 1 })).message).toContain(
      '1 to 4 for depth',
    );
    expect(thrown(() => generatePuzzle({ people: 2, depth: 5, seed: 1 })).message).toContain('depth');
    expect(thrown(() => generatePuzzle({ people: 2, seed: 0.5 })).message).toContain('seed');
    expect(thrown(() => generatePuzzle({ people: 2, seed: 1, index: -1 })).message).toContain('index');
    expect(thrown(() => generatePuzzle({ people: 3, seed: 1, names: ['Ada', 'Bob'] })).message).toContain(
      'names',
    );
    expect(thrown(() => generatePuzzle({ people: 2, seed: 1, names: ['Ada', 'Ada'] })).message).toContain(
      'twice',
    );
  });
});

describe('reasoning', () => {
  test('arrives at the solution, and concludes so of everybody in the end', () => {
    for (let people = 2; people <= 8; people++) {
      for (let index = 0; index < 40; index++) {
        const puzzle = generatePuzzle({ people, depth: 1 + (index % 2), seed: 9, index });
        const { steps, solution } = workedSolution(puzzle);
        expect(solution).toEqual(puzzle.solution);
        expect(steps[steps.length - 1]).toBe('All claims fit.');
        puzzle.names.forEach((name, i) => {
          const conclusions = steps.flatMap((step) => step.match(/(\w+ is a \w+)\.$/)?.[1] ?? []);
          const last = conclusions.filter((conclusion) => conclusion.startsWith(`${name} `)).at(-1);
          expect(last).toBe(`${name} is a ${puzzle.solution[i] ? 'knight' : 'knave'}`);
        });
      }
    }
  });

  test('every inference about a claim follows from what was said before it', () => {
    for (let index = 0; index < 200; index++) {
      const puzzle = generatePuzzle({ people: 2 + (index % 3), seed: 10, index });
      const { names, statements } = puzzle;
      const stack: (boolean | undefined)[][] = [new Array(names.length).fill(undefined)];
      for (const step of workedSolution(puzzle).steps) {
        const known = stack[stack.length - 1] as (boolean | undefined)[];
        const stated = step.match(/(\w+) is a (knight|knave)\.$/);
        const person = stated ? names.indexOf(stated[1] as string) : -1;
        const isKnight = stated?.[2] === 'knight';
        const possible = assignments(names.length).filter((full) =>
          known.every((v, i) => v === undefined || v === full[i]),
        );
        const reason = step.match(/^The (knight|knave) (\w+) says that (.*), so /);
        const says = step.match(/^(\w+) says that (.*), which is (true|false), so /);
        const check = step.match(/^The (knight|knave) (\w+) says that (.*), which is (true|false)\.$/);
        if (step.startsWith('Suppose')) {
          stack.push(known.map((v, i) => (i === person ? isKnight : v)));
        } else if (step.endsWith(': a contradiction.')) {
          const [, role, name, claim, value] = step.match(
            /^The (knight|knave) (\w+) says that (.*), which is (true|false): a contradiction\.$/,
          ) as RegExpMatchArray;
          const speaker = names.indexOf(name as string);
          expect(parse(claim as string, names)).toEqual(statements[speaker]);
          expect(known[speaker]).toBe(role === 'knight');
          expect(value).toBe(String(role === 'knave'));
          for (const full of possible)
            expect(truth(statements[speaker] as Claim, full)).toBe(role === 'knave');
          stack.pop();
        } else if (reason) {
          const speaker = names.indexOf(reason[2] as string);
          expect(parse(reason[3] as string, names)).toEqual(statements[speaker]);
          expect(known[speaker]).toBe(reason[1] === 'knight');
          for (const full of possible) {
            if (full[person] !== isKnight)
              expect(truth(statements[speaker] as Claim, full)).toBe(!known[speaker]);
          }
          known[person] = isKnight;
        } else if (check) {
          const speaker = names.indexOf(check[2] as string);
          expect(parse(check[3] as string, names)).toEqual(statements[speaker]);
          expect(known[speaker]).toBe(check[1] === 'knight');
          for (const full of possible)
            expect(truth(statements[speaker] as Claim, full)).toBe(check[4] === 'true');
          expect(known[speaker]).toBe(check[4] === 'true');
        } else if (says) {
          const speaker = names.indexOf(says[1] as string);
          expect(person).toBe(speaker);
          expect(isKnight).toBe(says[3] === 'true');
          expect(parse(says[2] as string, names)).toEqual(statements[speaker]);
          for (const full of possible) expect(truth(statements[speaker] as Claim, full)).toBe(isKnight);
          known[person] = isKnight;
        } else if (step.startsWith('So ')) {
          known[person] = isKnight;
        } else {
          expect(step).toBe('All claims fit.');
          expect(known).toEqual(puzzle.solution);
        }
      }
    }
  });

  test('is short for two people', () => {
    for (let index = 0; index < 100; index++) {
      expect(reasoning(generatePuzzle({ people: 2, seed: 11, index })).split(' ').length).toBeLessThanOrEqual(
        120,
      );
    }
  });

  test('answer lines', () => {
    expect(answerLines(['Zoey', 'Ethan'], [true, false])).toBe('(1) Zoey is a knight\n(2) Ethan is a knave');
  });

  test('says when there is nothing to find', () => {
    const paradox: Claim = { kind: 'knave', person: 0 };
    expect(thrown(() => workedSolution({ names: ['Ada'], statements: [paradox] })).code).toBe(
      'INVALID_ARGUMENT',
    );
    expect(thrown(() => workedSolution({ names: [], statements: [paradox] })).message).toContain('names');
  });
});

describe('when two puzzles are the same', () => {
  function permutations(count: number): number[][] {
    if (count === 0) return [[]];
    return permutations(count - 1).flatMap((rest) =>
      Array.from({ length: count }, (_, at) => [...rest.slice(0, at), count - 1, ...rest.slice(at)]),
    );
  }

  const renamed = (claim: Claim, to: readonly number[]): Claim => {
    if (claim.kind === 'knight' || claim.kind === 'knave') {
      return { kind: claim.kind, person: to[claim.person] as number };
    }
    if (claim.kind === 'not') return { kind: 'not', claim: renamed(claim.claim, to) };
    return { kind: claim.kind, left: renamed(claim.left, to), right: renamed(claim.right, to) };
  };

  /** The puzzle where person i becomes person `to[i]`. */
  function permuted(statements: readonly Claim[], to: readonly number[]): Claim[] {
    const result = new Array<Claim>(statements.length);
    statements.forEach((claim, i) => {
      result[to[i] as number] = renamed(claim, to);
    });
    return result;
  }

  /** The least truth tables among those of every order of the people, each of them tried. */
  const tablesByOrder = new Map(
    [2, 3, 4, 5].map((people) => [people, { orders: permutations(people), all: assignments(people) }]),
  );
  function leastTables(statements: readonly Claim[]): string {
    const { orders, all } = tablesByOrder.get(statements.length) as {
      orders: number[][];
      all: boolean[][];
    };
    const values = new Map(
      all.map((isKnight) => [
        isKnight.map(Number).join(''),
        statements.map((claim) => Number(truth(claim, isKnight))),
      ]),
    );
    return orders
      .map((order) =>
        all
          .map((isKnight) => {
            const before = order.map((place) => Number(isKnight[place])).join('');
            const said = values.get(before) as number[];
            return said.map((_, place) => said[order.indexOf(place)]).join('');
          })
          .join(' '),
      )
      .sort()[0] as string;
  }

  const knave = (person: number): Claim => ({ kind: 'knave', person });
  const iff = (left: Claim, right: Claim): Claim => ({ kind: 'iff', left, right });
  const ring = (people: number) => Array.from({ length: people }, (_, i) => knave((i + 1) % people));
  const pairs = (people: number) => Array.from({ length: people }, (_, i) => knave(i ^ 1));
  const alike = (people: number) =>
    Array.from({ length: people }, () => Array.from({ length: people }, (_, i) => knave(i)).reduce(iff));
  const twoRings = [...ring(4), ...ring(4).map((claim) => renamed(claim, [4, 5, 6, 7]))];

  test.each([2, 3, 4, 5])('%d people: agrees with every permutation tried', (people) => {
    const random = new Random(31, people);
    const short = (): Claim =>
      random.chance(0.5)
        ? knave(random.below(people))
        : iff(knave(random.below(people)), knave(random.below(people)));
    const puzzles: Claim[][] = [ring(people), alike(people)];
    const rounds = people === 5 ? 60 : 250;
    for (let round = 0; round < rounds; round++) {
      const statements = Array.from({ length: people }, () =>
        round % 2 === 0 ? short() : randomClaim(random, people, 1 + (round % 3)),
      );
      puzzles.push(statements, permuted(statements, random.shuffle([...statements.keys()])));
      // Nearly the same: what one person says is turned around.
      const liar = random.below(people);
      puzzles.push(statements.map((claim, i) => (i === liar ? { kind: 'not', claim } : claim)));
    }
    const formOf = new Map<string, string>();
    const forms = new Set<string>();
    let repeats = 0;
    for (const statements of puzzles) {
      const least = leastTables(statements);
      const form = canonicalForm(statements);
      const before = formOf.get(least);
      if (before === undefined) expect(forms.has(form)).toBe(false);
      else {
        repeats++;
        expect(form).toBe(before);
      }
      formOf.set(least, form);
      forms.add(form);
    }
    expect(repeats).toBeGreaterThanOrEqual(rounds);
    expect(forms.size).toBeGreaterThan(25);
  });

  test('people may change places and names, and the wording may change, at any size', async () => {
    const task = await knightsAndKnaves.open();
    const random = new Random(32);
    for (let people = 2; people <= 8; people++) {
      for (let index = 0; index < 30; index++) {
        const puzzle = generatePuzzle({ people, depth: 1 + (index % 2), seed: 33, index });
        const to = random.shuffle([...puzzle.names.keys()]);
        const other = {
          quiz: 'Who is what?',
          names: puzzle.names.map((name) => `Sir ${name}`),
          statements: permuted(puzzle.statements, to),
          solution: to.map((_, place) => puzzle.solution[to.indexOf(place)] as boolean),
        };
        expect(solve(other.statements)).toEqual([other.solution]);
        expect(task.identity(other)).toBe(task.identity(puzzle));
      }
    }
    const symmetric = [ring(8), pairs(8), alike(8), twoRings];
    for (const statements of symmetric) {
      for (let round = 0; round < 5; round++) {
        const other = permuted(statements, random.shuffle([...statements.keys()]));
        expect(canonicalForm(other)).toBe(canonicalForm(statements));
      }
    }
    expect(new Set(symmetric.map(canonicalForm)).size).toBe(symmetric.length);
  });

  test('the shape of a formula does not count, what it says does', () => {
    const a = knave(0);
    const b = knave(1);
    const second: Claim = { kind: 'knight', person: 0 };
    const form = (first: Claim) => canonicalForm([first, second]);
    const and = form({ kind: 'and', left: a, right: b });
    expect(form({ kind: 'and', left: b, right: a })).toBe(and);
    const knights: Claim = {
      kind: 'or',
      left: { kind: 'knight', person: 0 },
      right: { kind: 'not', claim: b },
    };
    expect(form({ kind: 'not', claim: knights })).toBe(and);
    expect(form({ kind: 'or', left: a, right: b })).not.toBe(and);
    expect(canonicalForm([second, { kind: 'and', left: a, right: b }])).not.toBe(and);
    expect(canonicalForm([a, b, a])).not.toBe(canonicalForm([a, b]));
  });

  test('two people make no more puzzles than there are pairs of tables with one solution, up to their order', () => {
    const all = assignments(2);
    const classes = new Set<string>();
    for (let one = 0; one < 16; one++) {
      for (let other = 0; other < 16; other++) {
        const says = (table: number, [x, y]: boolean[]) => ((table >> (2 * Number(x) + Number(y))) & 1) === 1;
        const fits = all.filter(([x, y]) => says(one, [!!x, !!y]) === x && says(other, [!!x, !!y]) === y);
        if (fits.length !== 1) continue;
        // With the two in the other order, the assignments 01 and 10 change places in both tables.
        const turned = (table: number) => (table & 9) | ((table & 2) << 1) | ((table & 4) >> 1);
        classes.add([`${one} ${other}`, `${turned(other)} ${turned(one)}`].sort()[0] as string);
      }
    }
    const forms = (depth: number, count: number) =>
      new Set(
        Array.from({ length: count }, (_, index) =>
          canonicalForm(generatePuzzle({ people: 2, depth, seed: 34, index }).statements),
        ),
      ).size;
    expect(forms(2, 5000)).toBe(classes.size);
    expect(forms(1, 5000)).toBe(38);
  });

  test('for more people than there are truth tables for, the claims as they stand decide', async () => {
    const task = await knightsAndKnaves.open();
    const identity = (statements: readonly Claim[]) =>
      task.identity({ quiz: '', names: [], solution: [], statements });
    const large = ring(maxTablePeople + 1);
    expect(identity(large)).toBe(identity(structuredClone(large)));
    expect(identity(large)).not.toBe(identity([...large.slice(1), large[0] as Claim]));
  });
});
