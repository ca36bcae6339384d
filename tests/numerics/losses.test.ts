import { describe, expect, test } from '@jest/globals';
import { fusedPolicyLoss, lossWeights, openDevice, policyLoss } from '../../lib/kernels/index.js';
import { packForest, type TrainTarget } from '../../lib/policy/forest.js';
import { type LossNormalizer, nativeLoss, type PolicyLossType, resolveLoss } from '../../lib/policy/loss.js';
import { largestGap } from '../support/compare.js';
import { readJson } from '../support/fixtures.js';
import { report } from '../support/report.js';

interface LossCase {
  type: PolicyLossType;
  clipLow: number;
  clipHigh: number;
  kl: number;
  klRatio?: boolean;
  entropy?: number;
  /** `anchored`: 0 for completions with a penalty of their own. */
  advantages?: 'byToken' | 'anchored';
  /** KL coefficients by completion. */
  targetKl?: number[];
  /** Which completions the call has. */
  part?: number[];
  normalizer?: { completions?: number; tokens?: number | null };
  loss: number;
  klMean?: number;
  clipFraction?: number;
  /** Gradients of the log-probabilities by completion and token. */
  gradient: number[][];
}

const fixture = readJson<{
  maxTokens: number;
  advantages: number[];
  tokenAdvantages: number[][];
  entropies: number[][];
  logprobs: number[][];
  oldLogprobs: number[][];
  referenceLogprobs: number[][];
  cases: LossCase[];
}>('losses.json');
const device = openDevice('cpu');

/** A call's rows as `Policy.forwardBackward` lays them out, for the kernels. */
function lossRows(targets: (TrainTarget & { length: number })[], of: Parameters<typeof resolveLoss>[0]) {
  const children = targets.map(({ length, ...train }) => ({ tokens: new Int32Array(length), train }));
  const packed = packForest([{ tokens: [0], children }], { vocabSize: 1, contextLength: 100 });
  const rows = nativeLoss(resolveLoss(of), packed);
  const weights = lossWeights(rows);
  const times = (by: Float32Array, factors: Float32Array | undefined) =>
    device.tensor(by.map((weight, r) => weight * (factors?.[r] ?? 1)));
  const own = rows.klCoefficients !== undefined;
  return {
    ...rows,
    klCoefficient: own ? 1 : rows.klCoefficient,
    weights: device.tensor(weights),
    klWeights: times(weights, rows.klCoefficients),
    entropyWeights: times(lossWeights({ ...rows, aggregation: 'token_mean' }), rows.entropyCoefficients),
    advantages: rows.advantages && device.tensor(rows.advantages),
    oldLogprobs: rows.oldLogprobs && device.tensor(rows.oldLogprobs),
    referenceLogprobs: rows.referenceLogprobs && device.tensor(rows.referenceLogprobs),
  };
}

/** What sets a case apart from the plain ones. */
function kindOf({ klRatio, entropy, advantages, targetKl, part, normalizer }: LossCase): string {
  if (klRatio) return 'KL times the ratio';
  if (entropy) return 'entropy bonus';
  if (targetKl) return 'penalties by completion';
  if (advantages) return 'advantages by token';
  if (part) return `completions ${part} of ${normalizer?.completions ? 'two micro-batches' : 'two updates'}`;
  return 'plain';
}

describe('every loss agrees with TRL in value and gradient, within 1e-6', () => {
  let worst = 0;

  test.each(fixture.cases.map((c) => [c.type, c.clipLow, c.clipHigh, c.kl, kindOf(c), c] as const))(
    '%s, clip %d and %d, KL coefficient %d, %s',
    async (type, clipLow, clipHigh, kl, _, expected) => {
      const { part = [0, 1, 2, 3, 4, 5], targetKl, klRatio, entropy } = expected;
      const { completions, tokens } = expected.normalizer ?? {};
      const normalizer: LossNormalizer = { completions, tokens: tokens ?? undefined };
      const targets = part.map((c) => ({
        length: fixture.logprobs[c]?.length as number,
        advantage:
          expected.advantages === 'byToken'
            ? fixture.tokenAdvantages[c]
            : expected.advantages === 'anchored' && (targetKl?.[c] as number) > 0.1
              ? 0
              : fixture.advantages[c],
        logprobs: fixture.oldLogprobs[c],
        referenceLogprobs: fixture.referenceLogprobs[c],
        ...(targetKl && { kl: targetKl[c] }),
      }));
      const { maxTokens } = fixture;
      const all = { type, clipLow, clipHigh, kl, klRatio, entropy, maxTokens, normalizer };
      const logprobs = part.flatMap((c) => fixture.logprobs[c] as number[]);
      const entropies = part.flatMap((c) => fixture.entropies[c] as number[]);
      const {
        loss: value,
        coefficients,
        statistics,
      } = await policyLoss({
        ...lossRows(targets, all),
        logprobs: device.tensor(Float32Array.from(logprobs)),
        entropies: device.tensor(Float32Array.from(entropies)),
        statistics: true,
      });
      const gap = largestGap(await coefficients.read(), expected.gradient.flat());
      worst = Math.max(worst, gap, Math.abs(value - expected.loss));
      expect(Math.abs(value - expected.loss)).toBeLessThan(1e-6);
      expect(gap).toBeLessThan(1e-6);

      if (expected.klMean !== undefined) expect(statistics?.kl).toBeCloseTo(expected.klMean, 6);
      if (expected.clipFraction !== undefined) {
        expect(statistics?.clipFraction).toBeCloseTo(expected.clipFraction, 6);
      }
    },
  );

  test('all variants were there', () => {
    report('losses against TRL, largest gap in value or gradient', worst);
    const kinds = new Map<string, Set<PolicyLossType>>();
    for (const each of fixture.cases) {
      const kind = kindOf(each);
      kinds.set(kind, (kinds.get(kind) ?? new Set()).add(each.type));
    }
    expect(kinds.size).toBe(9);
    for (const types of kinds.values()) expect(types.size).toBe(6);
    expect(fixture.cases).toHaveLength(72);
  });
});

interface TemperatureCase {
  type: PolicyLossType;
  temperature: number;
  clipLow: number;
  clipHigh: number;
  kl: number;
  klRatio: boolean;
  entropy: number;
  loss: number;
  oldLogprobs: number[][];
  referenceLogprobs: number[][];
  logprobs: number[][];
  entropies: number[][];
  /** Gradients by completion and token, and of the head. */
  dhidden: number[][][];
  dweight: number[][];
}

describe('a loss on logits over a temperature agrees with TRL, down to both gradients', () => {
  const { hidden, weight, targets, advantages, maxTokens, cases } = readJson<{
    hidden: number[][][];
    weight: number[][];
    targets: number[][];
    advantages: number[];
    maxTokens: number;
    cases: TemperatureCase[];
  }>('temperature.json');
  const float32 = (values: number[]) => Float32Array.from(values);
  let worst = 0;

  test.each(cases.map((c) => [c.type, c.temperature, c] as const))(
    '%s at %d',
    async (type, temperature, c) => {
      const { clipLow, clipHigh, kl, klRatio, entropy } = c;
      const completions = targets.map((row, i) => ({
        length: row.length,
        advantage: advantages[i],
        logprobs: c.oldLogprobs[i],
        referenceLogprobs: c.referenceLogprobs[i],
      }));
      const count = targets.flat().length;
      const result = await fusedPolicyLoss({
        ...lossRows(completions, {
          type,
          temperature,
          clipLow,
          clipHigh,
          kl,
          klRatio,
          entropy,
          maxTokens,
        }),
        hidden: device.tensor(float32(hidden.flat(2)), { shape: [count, 6] }),
        weight: device.tensor(float32(weight.flat()), { shape: [13, 6] }),
        rows: Int32Array.from({ length: count }, (_, r) => r),
        targets: Int32Array.from(targets.flat()),
      });
      const gaps = [
        Math.abs(result.loss - c.loss),
        largestGap(await result.logprobs.read(), c.logprobs.flat()),
        largestGap(await result.entropies.read(), c.entropies.flat()),
        largestGap(await result.dhidden.read(), c.dhidden.flat(2)),
        largestGap(await result.dweight.read(), c.dweight.flat()),
      ];
      worst = Math.max(worst, ...gaps);
      for (const gap of gaps) expect(gap).toBeLessThan(2e-6);
    },
  );

  test('all variants were there', () => {
    report('losses at a temperature against TRL, largest gap', worst);
    expect(cases).toHaveLength(18);
    expect(new Set(cases.map(({ type }) => type)).size).toBe(6);
    expect(new Set(cases.map(({ temperature }) => temperature))).toEqual(new Set([0.7, 1, 1.4]));
  });
});
