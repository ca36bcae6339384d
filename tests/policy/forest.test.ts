import { describe, expect, test } from '@jest/globals';
import {
  type Forest,
  type PackedBatch,
  packPrompts,
  planForest,
  type Segment,
} from '../../lib/policy/forest.js';
import { expectFailure, random } from './helpers.js';

const vocabSize = 100;
const contextLength = 64;
const options = { vocabSize, contextLength, maxTokens: 1 << 20 };

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

/** What each row of a batch sees, as the mask defines it: its context, its own token last. */
function contexts(batch: Pick<PackedBatch, 'tokens' | 'visibleUntil'>): number[][] {
  return Array.from(batch.tokens, (_, i) =>
    Array.from({ length: i + 1 }, (_, j) => j)
      .filter((j) => i < (batch.visibleUntil[j] as number))
      .map((j) => batch.tokens[j] as number),
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

function packedRows(batch: PackedBatch) {
  const seen = contexts(batch);
  return Array.from(batch.targets, (target, r) => ({
    context: seen[batch.sourceRows[r] as number] as number[],
    target,
    segment: batch.rowTarget[r] as number,
    token: batch.rowToken[r] as number,
  }));
}

describe('planForest', () => {
  test.each([1 << 20, 40, 12, 1])(
    'predicts every token from exactly its path, in batches of %d tokens',
    (maxTokens) => {
      const draw = random(maxTokens);
      for (let round = 0; round < 200; ++round) {
        const forest = randomForest(draw);
        const expected = bruteForce(forest);
        if (!JSON.stringify(forest).includes('"train"')) continue;
        const plan = planForest(forest, { ...options, maxTokens });
        const rows = plan.batches.flatMap(packedRows);
        expect(rows.map(key).sort()).toEqual(expected.map(key).sort());
        for (const batch of plan.batches) {
          const seen = contexts(batch);
          expect(Array.from(batch.positions)).toEqual(seen.map((context) => context.length - 1));
        }
        const active = plan.targets.reduce((sum, target) => sum + target.active.length, 0);
        expect(plan.sequenceLengths.reduce((sum, n) => sum + n, 0)).toBe(active);
        expect(active).toBe(expected.length);
      }
    },
  );

  test('computes each token once where everything fits, and stays in its budget where it can', () => {
    const prompt = Array.from({ length: 10 }, (_, i) => i);
    const completion = () => ({ tokens: [1, 2, 3, 4, 5], train: { advantage: 1 } });
    const forest = [{ tokens: prompt, children: Array.from({ length: 12 }, completion) }];
    expect(planForest(forest, options).batches.map(({ tokens }) => tokens.length)).toEqual([70]);
    const lengths = (maxTokens: number) =>
      planForest(forest, { ...options, maxTokens }).batches.map(({ tokens }) => tokens.length);
    expect(lengths(25)).toEqual([25, 25, 25, 25]);
    expect(lengths(3)).toEqual(Array(12).fill(15));
  });

  test('leaves out segments without a target in or under them', () => {
    const forest = [
      { tokens: [1], children: [{ tokens: [2, 3] }, { tokens: [4], train: { advantage: 1 } }] },
      { tokens: [5, 6] },
    ];
    expect(Array.from(planForest(forest, options).batches[0]?.tokens ?? [])).toEqual([1, 4]);
  });

  test('never scores the first token of a root', () => {
    const plan = planForest([{ tokens: [7, 8, 9], train: {} }], options);
    expect(Array.from(plan.batches[0]?.targets ?? [])).toEqual([8, 9]);
    expect(Array.from(plan.targets[0]?.active ?? [])).toEqual([1, 2]);
  });

  test('keeps the turns of a completion in one batch with contiguous rows', () => {
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
    const plan = planForest(forest, { ...options, maxTokens: 4 });
    expect(plan.batches).toHaveLength(2);
    expect(Array.from(plan.batches[0]?.targets ?? [])).toEqual([3, 4, 6, 7, 20, 21]);
    expect(Array.from(plan.batches[0]?.sequences ?? [])).toEqual([0, 0, 0, 0, 1, 1]);
    expect(Array.from(plan.sequenceLengths)).toEqual([4, 2, 2]);
  });

  test('takes deep trees without recursion', () => {
    let segment: Segment = { tokens: [1], train: { advantage: 1 } };
    for (let i = 0; i < 5000; ++i) segment = { tokens: [], children: [segment] };
    const plan = planForest([{ tokens: [1], children: [segment] }], options);
    expect(Array.from(plan.batches[0]?.sourceRows ?? [])).toEqual([0]);
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
  ] as const)('refuses %s', async (_, forest, code, part) => {
    await expectFailure(() => planForest(forest as unknown as Forest, options), code, new RegExp(part));
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
