import { describe, expect, test } from '@jest/globals';
import { openDevice, policyLoss } from '../../lib/kernels/index.js';
import { planForest } from '../../lib/policy/forest.js';
import {
  lossStats,
  nativeLoss,
  type PolicyLossType,
  resolveLoss,
  sequenceWeights,
} from '../../lib/policy/loss.js';
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
  /** Gradients of the log-probabilities by completion and token. */
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
      const plan = planForest(forest, { vocabSize: 1, contextLength: 100, maxTokens: 1000 });
      const [batch] = plan.batches;
      if (batch === undefined || plan.batches.length > 1) throw new Error('expected one batch');
      const rows = nativeLoss(
        loss,
        plan,
        batch,
        sequenceWeights(loss, plan.sequenceLengths),
        fixture.oldLogprobs,
      );
      const device = openDevice('cpu');
      const { loss: value, coefficients } = await policyLoss({
        ...rows,
        weights: device.tensor(rows.weights),
        advantages: rows.advantages && device.tensor(rows.advantages),
        oldLogprobs: rows.oldLogprobs && device.tensor(rows.oldLogprobs),
        referenceLogprobs: rows.referenceLogprobs && device.tensor(rows.referenceLogprobs),
        logprobs: device.tensor(Float32Array.from(fixture.logprobs.flat())),
      });
      const gap = largestGap(await coefficients.read(), expected.gradient.flat());
      worst = Math.max(worst, gap, Math.abs(value - expected.loss));
      expect(Math.abs(value - expected.loss)).toBeLessThan(1e-6);
      expect(gap).toBeLessThan(1e-6);

      const logprobs = fixture.logprobs.map((row) => Float32Array.from(row));
      const entropies = logprobs.map(({ length }) => new Float32Array(length));
      const stats = lossStats(loss, plan, fixture.oldLogprobs, { loss: value, logprobs, entropies });
      if (expected.klMean !== undefined) expect(stats.kl).toBeCloseTo(expected.klMean, 6);
      // TRL counts gspo's clipping by completion, merf by token.
      if (expected.clipFraction !== undefined && type !== 'gspo') {
        expect(stats.clipFraction).toBeCloseTo(expected.clipFraction, 6);
      }
    },
  );

  test('all variants were there', () => {
    report('losses against TRL, largest gap in value or gradient', worst);
    expect(new Set(fixture.cases.map(({ type }) => type)).size).toBe(6);
    expect(fixture.cases).toHaveLength(24);
  });
});
