import { describe, expect, test } from '@jest/globals';
import { type Branch, countTokens, type Forest, forestOf } from '../../lib/policy/index.js';
import { random } from './helpers.js';

const codes = (text: string) => [...text].map((c) => c.charCodeAt(0));
const textOf = (tokens: ArrayLike<number>) => String.fromCharCode(...Array.from(tokens));

/** Segments as nested texts: what stands below one follows it. */
type Shown = string | [string, ...Shown[]];
const show = (forest: Forest): Shown[] =>
  forest.map(({ tokens, children }) => {
    const below = show(children ?? []);
    return below.length > 0 ? [textOf(tokens), ...below] : textOf(tokens);
  });

const branch = (prompt: string, ...completions: string[]): Branch => ({
  promptTokens: codes(prompt),
  completions: completions.map((text) => ({ tokens: codes(text), train: {} })),
});

/** The paths to the targets, in depth-first order. */
function pathsOf(forest: Forest, before = ''): string[] {
  return forest.flatMap(({ tokens, train, children }) => [
    ...(train ? [`${before}|${textOf(tokens)}`] : []),
    ...pathsOf(children ?? [], before + textOf(tokens)),
  ]);
}

const system = 'You answer questions. ';
const rules = 'A right answer is worth two points. ';

describe('forestOf', () => {
  test('one branch is one segment above its completions', () => {
    expect(show(forestOf([branch('Who?', 'Zoey', 'Noah')]))).toEqual([['Who?', 'Zoey', 'Noah']]);
    expect(forestOf([])).toEqual([]);
  });

  test('what all begin with is the root, however short', () => {
    expect(show(forestOf([branch('aXY', '1'), branch('aZ', '2')]))).toEqual([['a', ['XY', '1'], ['Z', '2']]]);
    expect(show(forestOf([branch('XY', '1'), branch('Z', '2')]))).toEqual([
      ['XY', '1'],
      ['Z', '2'],
    ]);
  });

  test('what neighbours share beyond that is a segment below it', () => {
    const forest = forestOf([
      branch(`${system}${rules}Who?`, '1', '2'),
      branch(`${system}${rules}When?`, '3'),
      branch(`${system}Who?`, '4'),
      branch(`${system}Now?`, '5', '6'),
    ]);
    expect(show(forest)).toEqual([
      [system, [`${rules}Wh`, ['o?', '1', '2'], ['en?', '3']], ['Who?', '4'], ['Now?', '5', '6']],
    ]);
  });

  test('down to any depth', () => {
    const word = (letter: string) => letter.repeat(16);
    const [a, b, c, d] = ['a', 'b', 'c', 'd'].map(word) as [string, string, string, string];
    const forest = forestOf([
      branch(`${a}${b}${c}1`, 'x'),
      branch(`${a}${b}${c}2`, 'y'),
      branch(`${a}${b}${d}`, 'z'),
      branch(`${a}${d}`, 'w'),
    ]);
    expect(show(forest)).toEqual([[a, [b, [c, ['1', 'x'], ['2', 'y']], [d, 'z']], [d, 'w']]]);
  });

  test('but not for fewer than 16 tokens, which cost less than a segment', () => {
    const shared = (count: number) =>
      forestOf([
        branch(`?${'s'.repeat(count)}A`, '1'),
        branch(`?${'s'.repeat(count)}B`, '2'),
        branch('?!', '3'),
      ]);
    expect(show(shared(16))).toEqual([['?', ['s'.repeat(16), ['A', '1'], ['B', '2']], ['!', '3']]]);
    expect(show(shared(15))).toEqual([
      ['?', [`${'s'.repeat(15)}A`, '1'], [`${'s'.repeat(15)}B`, '2'], ['!', '3']],
    ]);
  });

  test('equal prompts, and one that another begins with, keep a last token of their own', () => {
    const long = 'x'.repeat(20);
    expect(show(forestOf([branch(long, '1'), branch(long, '2')]))).toEqual([
      ['x'.repeat(19), ['x', '1'], ['x', '2']],
    ]);
    expect(show(forestOf([branch(`${long}yz`, '1'), branch(long, '2')]))).toEqual([
      ['x'.repeat(19), ['xyz', '1'], ['x', '2']],
    ]);
  });

  test('an empty prompt shares nothing, and its completions stand below an empty segment', () => {
    expect(show(forestOf([branch('', '1'), branch('ab', '2'), branch('ac', '3'), branch('', '4')]))).toEqual([
      ['', '1'],
      ['a', ['b', '2'], ['c', '3']],
      ['', '4'],
    ]);
  });

  test('keeps the order of branches and completions, every path, and no segment without tokens', () => {
    const draw = random(5);
    for (let round = 0; round < 200; round++) {
      // Prompts of few letters and long stretches of them, so that many begin alike.
      const prompts = Array.from({ length: 1 + Math.floor(draw() * 7) }, () =>
        Array.from({ length: 1 + Math.floor(draw() * 4) }, () =>
          'ab'[Math.floor(draw() * 2)]?.repeat(1 + Math.floor(draw() * 2) * 19),
        ).join(''),
      );
      const branches = prompts.map((prompt, i) => branch(prompt, `${i}.0`, `${i}.1`));
      const forest = forestOf(branches);
      expect(pathsOf(forest)).toEqual(
        prompts.flatMap((prompt, i) => [`${prompt}|${i}.0`, `${prompt}|${i}.1`]),
      );
      const segments = (all: Forest): Forest => all.flatMap((one) => [one, ...segments(one.children ?? [])]);
      expect(segments(forest).filter(({ tokens }) => tokens.length === 0)).toEqual([]);
      const unshared = branches.reduce((sum, one) => sum + one.promptTokens.length + 6, 0);
      expect(countTokens(forest)).toBeLessThanOrEqual(unshared);
    }
  });
});
