import { expect, test } from '@jest/globals';
import { defaultModel, forestOf, Policy } from '../../lib/policy/index.js';
import { branchesOf, collect, type EpisodeGroup } from '../../lib/rollout/index.js';
import { getTask } from '../../lib/tasks/index.js';
import { Lessons } from '../../lib/train/lessons.js';
import { relativeError } from '../support/compare.js';
import { report } from '../support/report.js';
import { plainLessons } from '../train/lesson-settings.js';

/** Advantages by group and episode, 0 in the groups of `silent`. */
const advantagesOf = (groups: readonly EpisodeGroup<unknown>[], silent: readonly number[]) =>
  groups.map(({ episodes }, g) =>
    episodes.map((_, e) => (silent.includes(g) ? 0 : ([1, -0.5, 0.25][(e + g) % 3] as number))),
  );

type Kind = 'value' | 'gradient';

async function readAll(policy: Policy, kind: Kind): Promise<Map<string, Float32Array>> {
  const all = new Map<string, Float32Array>();
  for (const { name } of policy.parameters()) all.set(name, await policy.readParameter(name, kind));
  return all;
}

/** The names of parameters that are not the same to the last bit. */
function differing(actual: Map<string, Float32Array>, expected: Map<string, Float32Array>): string[] {
  const isSame = (a: Float32Array, b: Float32Array) => Buffer.from(a.buffer).equals(Buffer.from(b.buffer));
  return [...expected.keys()].filter(
    (name) => !isSame(actual.get(name) as Float32Array, expected.get(name) as Float32Array),
  );
}

// The gradient of a row without a signal is exactly 0, and sums over rows are taken row after row. Only where what is left
// is cut into other micro-batches are there other sums, which are equal to rounding.
test.each(['f32', 'bf16'] as const)(
  'groups without signal change no bit of an update by being left out: %s',
  async (dtype) => {
    const task = await getTask('knights-and-knaves', { people: 2 });
    const source = task.rows({ split: 'train', seed: 0 });
    const rows = [0, 1, 2, 3].map((i) => source.at(i));
    const load = () => Policy.load(defaultModel(), { device: 'cpu', dtype, threads: 1 });
    const policy = await load();
    const groups = await collect(policy, task, rows, { n: 3, motivation: 'full', maxTokens: 24, seed: 7 });

    /** Adds the gradients where the groups of `silent` have no signal; the number of completions trained on. */
    const addGradients = async (
      to: Policy,
      silent: readonly number[],
      leaveOut: boolean,
      maxTokens?: number,
    ) => {
      const advantages = advantagesOf(groups, silent);
      const lessons = await Lessons.prepare(groups, advantages, {
        policy: to,
        task: task as never,
        settings: plainLessons,
        learnUnder: ['same'],
        anchorUnder: 'full',
        anchorTo: 'none',
      });
      const lesson = lessons.slice(0, groups.length);
      const all = () =>
        forestOf(
          branchesOf(groups, ({ group, episode }) => ({ advantage: advantages[group]?.[episode] as number })),
        );
      const loss = { type: 'grpo', normalizer: lesson.normalizer } as const;
      const stats = await to.forwardBackward(leaveOut ? lesson.forest : all(), loss, { maxTokens });
      return stats.logprobs.length;
    };
    const gradients = async (
      ...given: [silent: readonly number[], leaveOut: boolean, maxTokens?: number]
    ) => {
      const completions = await addGradients(policy, ...given);
      const found = await readAll(policy, 'gradient');
      await policy.zeroGradients();
      return { completions, found };
    };
    const weights = async (leaveOut: boolean) => {
      const own = await load();
      await addGradients(own, [0, 2], leaveOut);
      await own.optimStep({ learningRate: 1e-3, maxGradNorm: 1, weightDecay: 0.1 });
      return readAll(own, 'value').finally(() => own.dispose());
    };

    try {
      for (const silent of [[0], [1, 2]]) {
        const all = await gradients(silent, false);
        const without = await gradients(silent, true);
        expect([all.completions, without.completions]).toEqual([12, 12 - 3 * silent.length]);
        expect({ silent, differing: differing(without.found, all.found) }).toEqual({ silent, differing: [] });
      }
      expect(differing(await weights(true), await weights(false))).toEqual([]);

      const all = await gradients([0], false, 300);
      const without = await gradients([0], true, 300);
      const errors = [...all.found].map(([name, gradient]) =>
        relativeError(without.found.get(name) as Float32Array, gradient),
      );
      const worst = Math.max(...errors);
      report(`leaving out groups without signal where micro-batches are others, gradient, ${dtype}`, worst);
      expect(worst).toBeLessThan(dtype === 'f32' ? 1e-5 : 1e-2);
    } finally {
      policy.dispose();
    }
  },
);
