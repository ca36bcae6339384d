import { afterAll, beforeAll, describe, expect, test } from '@jest/globals';
import { native } from '../../lib/native.js';
import { type Forest, Policy, type PolicyLossType } from '../../lib/policy/index.js';
import type { LearnView, MotivationView } from '../../lib/prompt/motivation.js';
import { parseCompletion } from '../../lib/reward/index.js';
import type { Episode, EpisodeGroup, RolloutTask } from '../../lib/rollout/index.js';
import { type LearnCorrection, type LessonSettings, Lessons } from '../../lib/train/lessons.js';
import { temporaryDirectory } from '../policy/helpers.js';
import { fixturePath, readJson } from '../support/fixtures.js';
import { report } from '../support/report.js';

type View = 'A' | 'B';

interface Update {
  loss: number;
  /** Of the whole gradient, and its products with vectors of 1 and -1. */
  norm: number;
  projections: number[];
}

interface Case {
  sampled: 'A' | 'mix';
  learned: 'same' | 'B' | 'both';
  correction: LearnCorrection;
  loss: Exclude<PolicyLossType, 'cispo' | 'bnpo'>;
  anchor: number;
  kl: number;
  entropy: number;
  temperature: number;
  /** The first update and the one after it. */
  updates: Update[];
}

const fixture = readJson<{
  clip: number;
  gspoClip: [number, number];
  cap: number;
  maxTokens: number;
  step: { learningRate: number; epsilon: number };
  prompts: Record<View, number[]>[];
  completions: number[][][];
  advantages: number[][];
  masked: [number, number][];
  drawn: Record<View, number[][][]>;
  reference: Record<View, number[][][]>;
  cases: Case[];
}>('views.json');

const motivations: Record<View, MotivationView> = { A: 'full', B: 'none' };
const viewOf = (motivation: MotivationView): View => (motivation === 'full' ? 'A' : 'B');
const learnUnder: Record<Case['learned'], LearnView[]> = {
  same: ['same'],
  B: ['none'],
  both: ['same', 'none'],
};

// Rows are numbers, and their prompts the fixture's tokens.
const task: RolloutTask<number> = {
  messages: (row, motivation) => JSON.stringify([row, viewOf(motivation)]),
};
const tokenizer = {
  encodePrompt: (text: string) => {
    const [row, view] = JSON.parse(text) as [number, View];
    return fixture.prompts[row]?.[view] as number[];
  },
} as Policy['tokenizer'];

function groupsOf({ sampled }: Case): EpisodeGroup<number>[] {
  return fixture.completions.map((completions, row) => ({
    row,
    episodes: completions.map((tokens, i): Episode => {
      const view = sampled === 'A' || i < completions.length / 2 ? 'A' : 'B';
      const end = fixture.masked.some((key) => key[0] === row && key[1] === i) ? 'length' : 'stop';
      return {
        prompt: {
          messages: undefined,
          text: '',
          tokens: fixture.prompts[row]?.[view] as number[],
          view: motivations[view],
        },
        turns: [
          {
            role: 'model',
            text: '',
            tokens: Int32Array.from(tokens),
            logprobs: Float32Array.from(fixture.drawn[view][row]?.[i] as number[]),
            entropies: new Float32Array(tokens.length),
            finishReason: end,
          },
        ],
        end,
        completion: parseCompletion({ raw: '', prompt: '', finishReason: end, tokenCount: tokens.length }),
        reward: { total: 0, parts: {} },
      };
    }),
  }));
}

/** Says of each completion under each prompt what the fixture says. */
const reference = {
  async score(forest: Forest) {
    const logprobs: Float32Array[] = [];
    const visit = (segments: Forest, before: number[]) => {
      for (const { tokens, train, children } of segments) {
        if (train) {
          const row = fixture.completions.findIndex((group) =>
            group.some((own) => String(own) === String(tokens)),
          );
          const i = fixture.completions[row]?.findIndex((own) => String(own) === String(tokens)) as number;
          const view = (['A', 'B'] as const).find(
            (one) => String(fixture.prompts[row]?.[one]) === String(before),
          );
          logprobs.push(Float32Array.from(fixture.reference[view as View][row]?.[i] as number[]));
        }
        visit(children ?? [], [...before, ...Array.from(tokens)]);
      }
    };
    visit(forest, []);
    return { logprobs, entropies: logprobs };
  },
};

/** Vectors of 1 and -1, one behind the other: bit k of a hash of i (lowbias32), as in views.py. */
function signsOf(count: number, vectors: number): Float64Array {
  const signs = new Float64Array(count * vectors);
  for (let i = 0; i < count; i++) {
    let x = (i + 1) | 0;
    x = Math.imul(x ^ (x >>> 16), 0x7feb352d);
    x = Math.imul(x ^ (x >>> 15), 0x846ca68b);
    x ^= x >>> 16;
    for (let k = 0; k < vectors; k++) signs[k * count + i] = 1 - 2 * ((x >>> k) & 1);
  }
  return signs;
}

let signs: Float64Array | undefined;

/** The norm of the gradients and their products with the vectors of signs. */
async function gradientOf(policy: Policy) {
  const vectors = fixture.cases[0]?.updates[0]?.projections.length as number;
  const count = policy.parameterCount;
  signs ??= signsOf(count, vectors);
  const all = new Float64Array(count);
  let start = 0;
  const names = policy.parameters().map(({ name }) => name);
  for (const name of names.sort()) {
    const gradient = await policy.readParameter(name, 'gradient');
    all.set(gradient, start);
    start += gradient.length;
  }
  expect(start).toBe(count);
  const dot = (a: Float64Array, b: Float64Array) => {
    let sum = 0;
    for (let i = 0; i < a.length; i++) sum += (a[i] as number) * (b[i] as number);
    return sum;
  };
  return {
    norm: Math.sqrt(dot(all, all)),
    projections: Array.from({ length: vectors }, (_, k) =>
      dot(all, (signs as Float64Array).subarray(k * count, (k + 1) * count)),
    ),
  };
}

/** ||actual - expected|| / ||expected|| of a gradient, as its products with random signs estimate it. */
function relativeError(actual: Awaited<ReturnType<typeof gradientOf>>, expected: Update): number {
  const squares = actual.projections.map((value, k) => (value - (expected.projections[k] as number)) ** 2);
  const mean = squares.reduce((sum, square) => sum + square, 0) / squares.length;
  return Math.max(Math.sqrt(mean), Math.abs(actual.norm - expected.norm)) / expected.norm;
}

/** Relative errors of losses and gradients, of two updates. */
async function run(policy: Policy, one: Case): Promise<{ loss: number; gradient: number }[]> {
  const groups = groupsOf(one);
  const settings: LessonSettings = {
    loss: one.loss,
    kl: one.kl,
    entropy: one.entropy,
    temperature: one.temperature,
    maskTruncated: true,
    miniBatches: 1,
    updatesPerRollout: 2,
    learnCorrection: one.correction,
    learnCap: fixture.cap,
    anchor: one.anchor,
  };
  const lessons = await Lessons.prepare(groups, fixture.advantages, {
    policy: {
      score: (forest, options) => policy.score(forest, options),
      contextLength: policy.contextLength,
      tokenizer,
    },
    reference,
    task,
    settings,
    learnUnder: learnUnder[one.learned],
    anchorUnder: motivations.A,
    anchorTo: motivations.B,
  });
  const [clipLow, clipHigh] = one.loss === 'gspo' ? fixture.gspoClip : [fixture.clip, fixture.clip];
  const { loss: type, kl, entropy, temperature } = one;
  const errors = [];
  for (const expected of one.updates) {
    const { forest, normalizer } = lessons.slice(0, groups.length);
    const maxTokens = fixture.maxTokens;
    const { loss } = await policy.forwardBackward(forest, {
      type,
      clipLow,
      clipHigh,
      kl,
      entropy,
      temperature,
      maxTokens,
      normalizer,
    });
    const gradient = relativeError(await gradientOf(policy), expected);
    errors.push({ loss: Math.abs(loss - expected.loss), gradient });
    await policy.optimStep({ ...fixture.step, maxGradNorm: 0, weightDecay: 0 });
  }
  return errors;
}

const load = (device: 'cpu' | 'cuda-emulated') =>
  Policy.load(fixturePath('llama'), { device, dtype: 'f32', threads: 1 });
const nameOf = ({ sampled, learned, correction }: Case) =>
  `drawn under ${sampled}, learned under ${learned}, ${correction}`;

describe('what is learned under which prompt has the gradient of the rows written out', () => {
  let worst = { loss: 0, gradient: 0 };
  let directory: ReturnType<typeof temporaryDirectory>;
  let policy: Policy;

  beforeAll(async () => {
    directory = temporaryDirectory();
    policy = await load('cpu');
    await policy.saveState(directory.path);
  });
  afterAll(() => {
    policy.dispose();
    directory.remove();
  });

  test.each([...new Set(fixture.cases.map(nameOf))])('%s', async (name) => {
    for (const one of fixture.cases.filter((other) => nameOf(other) === name)) {
      await policy.loadState(directory.path);
      const errors = await run(policy, one);
      const loss = Math.max(...errors.map((error) => error.loss));
      const gradient = Math.max(...errors.map((error) => error.gradient));
      worst = { loss: Math.max(worst.loss, loss), gradient: Math.max(worst.gradient, gradient) };
      const { updates: _, ...which } = one;
      expect({ which, near: loss < 1e-5 && gradient < 1e-4 }).toEqual({ which, near: true });
    }
  });

  test('all combinations were there', () => {
    report('what is learned under which prompt, loss against PyTorch', worst.loss);
    report('what is learned under which prompt, gradient against PyTorch, relative', worst.gradient);
    expect(fixture.cases).toHaveLength(280);
    const count = (key: keyof Case) => new Set(fixture.cases.map((one) => one[key])).size;
    expect(
      (['sampled', 'learned', 'correction', 'loss', 'anchor', 'kl', 'entropy', 'temperature'] as const).map(
        count,
      ),
    ).toEqual([2, 3, 3, 4, 2, 2, 2, 2]);
  });

  test('on cuda-emulated too', async () => {
    if (!native().describeDevice('cuda-emulated').available) return;
    const one = fixture.cases.find(
      ({ sampled, learned, correction, loss, anchor, kl }) =>
        `${sampled} ${learned} ${correction} ${loss}` === 'mix both truncated dapo' && anchor > 0 && kl > 0,
    ) as Case;
    const emulated = await load('cuda-emulated');
    const errors = await run(emulated, one).finally(() => emulated.dispose());
    for (const { loss, gradient } of errors) {
      report(
        'what is learned under which prompt on cuda-emulated, gradient against PyTorch, relative',
        gradient,
      );
      expect({ loss: loss < 1e-5, gradient: gradient < 1e-4 }).toEqual({ loss: true, gradient: true });
    }
  });
});
