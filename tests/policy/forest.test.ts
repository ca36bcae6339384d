import { describe, expect, test } from '@jest/globals';
import {
  type Forest,
  type PackedForest,
  type PackedTokens,
  packForest,
  packPrompts,
  type Segment,
} from '../../lib/policy/forest.js';
import { expectFailure, random } from './helpers.js';

const vocabSize = 100;
const contextLength = 64;
const options = { vocabSize, contextLength };

/** A random forest; about half of the segments are trained, some are empty, some targets are masked. */
function randomForest(draw: () => number): Forest {
  const tokens = (least: number) =>
    Array.from({ length: least + Math.floor(draw() * 5) }, () => Math.floor(draw() * vocabSize));
  const segment = (depth: number): Segment => {
    const own = tokens(depth === 0 ? 1 : 0);
    const children =
      depth < 4 && draw() < 0.7
        ? Array.from({ length: 1 + Math.floor(draw() * 3) }, () => segment(depth + 1))
        : [];
    const trained = draw() < 0.5 || children.length === 0;
    const mask = draw() < 0.3 ? own.map(() => (draw() < 0.5 ? 0 : 1)) : undefined;
    return {
      tokens: own,
      children,
      ...(trained && { train: { advantage: draw() - 0.5, ...(mask && { mask }) } }),
    };
  };
  return Array.from({ length: 1 + Math.floor(draw() * 3) }, () => segment(0));
}

/** What each packed token sees, as the mask defines it: its context, its own token last. */
function contexts(packed: PackedTokens): number[][] {
  return Array.from(packed.tokens, (_, i) =>
    Array.from({ length: i + 1 }, (_, j) => j)
      .filter((j) => i < (packed.visibleUntil[j] as number))
      .map((j) => packed.tokens[j] as number),
  );
}

/** The rows, from the trees alone: every scored token with its path before it, in depth-first order. */
function bruteForce(forest: Forest): { context: number[]; target: number; segment: number; token: number }[] {
  const rows: { context: number[]; target: number; segment: number; token: number }[] = [];
  let trained = 0;
  const visit = (segment: Segment, before: number[]) => {
    const index = segment.train ? trained++ : -1;
    const path = [...before];
    Array.from(segment.tokens).forEach((token, t) => {
      const masked = segment.train?.mask?.[t] === 0;
      if (segment.train && !masked && path.length > 0)
        rows.push({ context: [...path], target: token, segment: index, token: t });
      path.push(token);
    });
    for (const child of segment.children ?? []) visit(child, path);
  };
  for (const root of forest) visit(root, []);
  return rows;
}

const key = (row: { context: number[]; target: number; segment: number; token: number }) =>
  JSON.stringify([row.segment, row.token, row.target, row.context]);

function packedRows(packed: PackedForest) {
  const seen = contexts(packed);
  return Array.from(packed.predicted, (target, r) => ({
    context: seen[packed.sourceRows[r] as number] as number[],
    target,
    segment: packed.rowTarget[r] as number,
    token: packed.rowToken[r] as number,
  }));
}

/** How many rows each completion has that has any. */
function lengths({ sequences }: PackedForest): number[] {
  const counts: number[] = [];
  for (const sequence of sequences) counts[sequence] = (counts[sequence] ?? 0) + 1;
  return counts;
}

describe('packForest', () => {
  test.each([1, 2, 3, 4])('predicts every token from exactly its path, seed %d', (seed) => {
    const draw = random(seed);
    for (let round = 0; round < 200; ++round) {
      const forest = randomForest(draw);
      const expected = bruteForce(forest);
      if (!JSON.stringify(forest).includes('"train"')) continue;
      const packed = packForest(forest, options);
      expect(packedRows(packed).map(key).sort()).toEqual(expected.map(key).sort());
      const seen = contexts(packed);
      expect(Array.from(packed.positions)).toEqual(seen.map((context) => context.length - 1));
      const active = packed.targets.reduce((sum, target) => sum + target.active.length, 0);
      expect(lengths(packed).reduce((sum, n) => sum + n, 0)).toBe(active);
      expect(active).toBe(expected.length);
      expect(packed.completions).toBe(packed.targets.length);
    }
  });

  test('has each token once', () => {
    const prompt = Array.from({ length: 10 }, (_, i) => i);
    const completion = () => ({ tokens: [1, 2, 3, 4, 5], train: { advantage: 1 } });
    const forest = [{ tokens: prompt, children: Array.from({ length: 12 }, completion) }];
    expect(packForest(forest, options).tokens).toHaveLength(70);
  });

  test('leaves out segments without a target in or under them', () => {
    const forest = [
      { tokens: [1], children: [{ tokens: [2, 3] }, { tokens: [4], train: { advantage: 1 } }] },
      { tokens: [5, 6] },
    ];
    expect(Array.from(packForest(forest, options).tokens)).toEqual([1, 4]);
  });

  test('never scores the first token of a root', () => {
    const packed = packForest([{ tokens: [7, 8, 9], train: {} }], options);
    expect(Array.from(packed.predicted)).toEqual([8, 9]);
    expect(Array.from(packed.targets[0]?.active ?? [])).toEqual([1, 2]);
  });

  test('puts the rows of one completion beside each other, whatever branches off between its turns', () => {
    const turn = (tokens: number[], sequence: number, children: Segment[] = []): Segment => ({
      tokens,
      train: { advantage: 1, sequence },
      children,
    });
    const forest = [
      {
        tokens: [1, 2],
        children: [
          turn([3, 4], 1, [turn([20, 21], 2), { tokens: [5], children: [turn([6, 7], 1)] }]),
          turn([8, 9], 3),
        ],
      },
    ];
    const packed = packForest(forest, options);
    expect(Array.from(packed.predicted)).toEqual([3, 4, 6, 7, 20, 21, 8, 9]);
    expect(Array.from(packed.sequences)).toEqual([0, 0, 0, 0, 1, 1, 2, 2]);
    expect(lengths(packed)).toEqual([4, 2, 2]);
  });

  test('counts completions without an active token', () => {
    const masked = { tokens: [5, 6], train: { mask: [0, 0] } };
    const forest = [{ tokens: [1], children: [masked, { tokens: [2, 3], train: {} }, masked] }];
    const packed = packForest(forest, options);
    expect(packed.completions).toBe(3);
    expect(Array.from(packed.sequences)).toEqual([0, 0]);
  });

  test('takes deep trees without recursion', () => {
    let segment: Segment = { tokens: [1], train: { advantage: 1 } };
    for (let i = 0; i < 5000; ++i) segment = { tokens: [], children: [segment] };
    const packed = packForest([{ tokens: [1], children: [segment] }], options);
    expect(Array.from(packed.sourceRows)).toEqual([0]);
  });

  const cyclic: Segment = { tokens: [], children: [] };
  cyclic.children?.push(cyclic);
  const trained = (train: object, tokens: unknown = [1, 2]) => [
    { tokens: [3], children: [{ tokens, train }] },
  ];
  test.each([
    ['nothing', [], 'INVALID_ARGUMENT', 'forest'],
    ['no target', [{ tokens: [1] }], 'INVALID_ARGUMENT', 'train target'],
    ['no tokens', [{ train: {} }], 'INVALID_ARGUMENT', 'forest\\[0\\].tokens'],
    [
      'an id that is none',
      trained({}, [1, 100]),
      'INVALID_ARGUMENT',
      'children\\[0\\].tokens\\[1\\] but received 100',
    ],
    ['a fraction', trained({}, [1.5]), 'INVALID_ARGUMENT', '1.5'],
    ['NaN', trained({}, [Number.NaN]), 'INVALID_ARGUMENT', 'NaN'],
    [
      'old log-probabilities of another length',
      trained({ logprobs: [0] }),
      'INVALID_ARGUMENT',
      'train.logprobs',
    ],
    [
      'old log-probabilities that are NaN',
      trained({ logprobs: [0, Number.NaN] }),
      'INVALID_ARGUMENT',
      'logprobs\\[1\\]',
    ],
    ['a mask of other numbers', trained({ mask: [1, 2] }), 'INVALID_ARGUMENT', 'mask\\[1\\]'],
    ['an advantage a token too few', trained({ advantage: [1] }), 'INVALID_ARGUMENT', 'train.advantage'],
    [
      "a token's advantage that is no number",
      trained({ advantage: [0, Number.NaN] }),
      'INVALID_ARGUMENT',
      'advantage\\[1\\]',
    ],
    ['a negative KL coefficient', trained({ advantage: 1, kl: -0.1 }), 'INVALID_ARGUMENT', 'train.kl'],
    [
      'an infinite entropy coefficient',
      trained({ advantage: 1, entropy: Number.NEGATIVE_INFINITY }),
      'INVALID_ARGUMENT',
      'train.entropy',
    ],
    [
      'an infinite advantage',
      trained({ advantage: Number.POSITIVE_INFINITY }),
      'INVALID_ARGUMENT',
      'advantage',
    ],
    [
      'a path beyond the context',
      trained({}, new Array(64).fill(1)),
      'CONTEXT_EXCEEDED',
      '64 tokens on a path.*ends at 65',
    ],
    ['a cycle', [cyclic], 'INVALID_ARGUMENT', 'nested'],
    [
      'a sequence on two paths',
      [
        {
          tokens: [1],
          children: [
            { tokens: [1], train: { sequence: 5 } },
            { tokens: [1], train: { sequence: 5 } },
          ],
        },
      ],
      'INVALID_ARGUMENT',
      'sequence 5',
    ],
    [
      'a sequence on two paths under a trained segment',
      [
        {
          tokens: [1],
          train: {},
          children: [
            { tokens: [1], train: { sequence: 5 } },
            { tokens: [], children: [{ tokens: [1], train: { sequence: 5 } }] },
          ],
        },
      ],
      'INVALID_ARGUMENT',
      'sequence 5',
    ],
  ] as const)('refuses %s', async (_, forest, code, part) => {
    await expectFailure(() => packForest(forest as unknown as Forest, options), code, new RegExp(part));
  });
});

describe('packPrompts', () => {
  test('shares every common beginning and gives each prompt its whole context', () => {
    const draw = random(3);
    for (let round = 0; round < 300; ++round) {
      const prompts = Array.from({ length: 1 + Math.floor(draw() * 8) }, () =>
        Int32Array.from({ length: 1 + Math.floor(draw() * 8) }, () => Math.floor(draw() * 3)),
      );
      const packed = packPrompts(prompts);
      const seen = contexts(packed);
      prompts.forEach((prompt, p) => {
        expect(seen[packed.promptRows[p] as number]).toEqual(Array.from(prompt));
      });
      expect(Array.from(packed.positions)).toEqual(seen.map((context) => context.length - 1));
      const prefixes = new Set(
        prompts.flatMap((prompt) => Array.from(prompt, (_, i) => String(prompt.slice(0, i + 1)))),
      );
      expect(packed.tokens).toHaveLength(prefixes.size);
    }
  });

  test('gives equal prompts one row, and a prompt inside another its own', () => {
    const packed = packPrompts([Int32Array.of(1, 2, 3), Int32Array.of(1, 2), Int32Array.of(1, 2, 3)]);
    expect(Array.from(packed.tokens)).toEqual([1, 2, 3]);
    expect(Array.from(packed.promptRows)).toEqual([2, 1, 2]);
  });
});
