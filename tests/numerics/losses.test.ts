import { describe, expect, test } from '@jest/globals';
import { lossWeights, openDevice, policyLoss } from '../../lib/kernels/index.js';
import { packForest } from '../../lib/policy/forest.js';
import { nativeLoss, type PolicyLossType, resolveLoss } from '../../lib/policy/loss.js';
import { largestGap } from '../support/compare.js';
import { readJson } from '../support/fixtures.js';
import { report } from '../support/report.js';

interface LossCase {
  type: PolicyLossType;
  clipLow: number;
  clipHigh: number;
  kl: number;
  loss: number;
  klMean?: number;
  clipFraction?: number;
  /** By completion and token. */
  gradient: number[][];
}

const fixture = readJson<{
  maxTokens: number;
  advantages: number[];
  logprobs: number[][];
  oldLogprobs: number[][];
  referenceLogprobs: number[][];
  cases: LossCase[];
}>('losses.json');

const forest = [
  {
    tokens: [0],
    children: fixture.logprobs.map(({ length }, i) => ({
      tokens: new Int32Array(length),
      train: {
        advantage: fixture.advantages[i],
        logprobs: fixture.oldLogprobs[i],
        referenceLogprobs: fixture.referenceLogprobs[i],
      },
    })),
  },
];

describe('every loss agrees with TRL in value and gradient, within 1e-6', () => {
  let worst = 0;

  test.each(fixture.cases.map((c) => [c.type, c.clipLow, c.clipHigh, c.kl, c] as const))(
    '%s, clip %d and %d, KL coefficient %d',
    async (type, clipLow, clipHigh, kl, expected) => {
      const loss = resolveLoss({ type, clipLow, clipHigh, kl, maxTokens: fixture.maxTokens });
      const rows = nativeLoss(loss, packForest(forest, { vocabSize: 1, contextLength: 100 }));
      const device = openDevice('cpu');
      const {
        loss: value,
        coefficients,
        statistics,
      } = await policyLoss({
        ...rows,
        weights: device.tensor(lossWeights(rows)),
        advantages: rows.advantages && device.tensor(rows.advantages),
        oldLogprobs: rows.oldLogprobs && device.tensor(rows.oldLogprobs),
        referenceLogprobs: rows.referenceLogprobs && device.tensor(rows.referenceLogprobs),
        logprobs: device.tensor(Float32Array.from(fixture.logprobs.flat())),
        statistics: true,
      });
      const gap = largestGap(await coefficients.read(), expected.gradient.flat());
      worst = Math.max(worst, gap, Math.abs(value - expected.loss));
      expect(Math.abs(value - expected.loss)).toBeLessThan(1e-6);
      expect(gap).toBeLessThan(1e-6);

      if (expected.klMean !== undefined) expect(statistics?.kl).toBeCloseTo(expected.klMean, 6);
      // TRL counts gspo's clipping by completion, merf by token.
      if (expected.clipFraction !== undefined && type !== 'gspo') {
        expect(statistics?.clipFraction).toBeCloseTo(expected.clipFraction, 6);
      }
    },
  );

  test('all variants were there', () => {
    report('losses against TRL, largest gap in value or gradient', worst);
    expect(new Set(fixture.cases.map(({ type }) => type)).size).toBe(6);
    expect(fixture.cases).toHaveLength(24);
  });
});
