import { existsSync, mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from '@jest/globals';
import { formatMotivation, type MotivationMix, type MotivationView } from '../../lib/prompt/motivation.js';
import { RewardSpec } from '../../lib/reward/index.js';
import type { Episode, EpisodeGroup } from '../../lib/rollout/index.js';
import { Random } from '../../lib/tasks/random.js';
import {
  AdaptiveMotivation,
  type AdaptiveRecord,
  type AdaptiveSettings,
  type ComponentRecord,
} from '../../lib/train/adaptive.js';
import { listCheckpoints } from '../../lib/train/checkpoint.js';
import type { CompletionRecord } from '../../lib/train/completions.js';
import type { TrainingEvent } from '../../lib/train/loop.js';
import { readMetrics } from '../../lib/train/metrics.js';
import { type GrpoMetrics, Trainer, type TrainerOptions } from '../../lib/train/trainer.js';
import { FakePolicy } from './fake-policy.js';
import { type FakeRow, fakeTask } from './fake-task.js';

const defaults: AdaptiveSettings = {
  groupSize: 8,
  adaptiveWindow: 10,
  adaptiveFloor: 0.125,
  adaptiveLift: 0.05,
};

/** Components with the scores 0 and 2, so that shares of the range are halves of points. */
function specOf(names: readonly string[]) {
  return new RewardSpec({
    name: 'simulated',
    components: names.map((name) => ({
      name,
      cases: [
        { name: 'good', score: 2, sentence: `if ${name} is good` },
        { name: 'bad', score: 0, sentence: 'otherwise' },
      ],
      verify: () => 'bad',
    })),
  });
}

function adaptive(names: readonly string[], settings: Partial<AdaptiveSettings> = {}) {
  return new AdaptiveMotivation(specOf(names), { ...defaults, ...settings });
}

function shows(view: MotivationView, name: string): boolean {
  return view === 'full' || (typeof view === 'object' && 'partial' in view && view.partial.includes(name));
}

function group(
  views: MotivationMix,
  score: (name: string, view: MotivationView) => number,
  names: readonly string[],
) {
  const episodes = views.map((view) => {
    const parts = Object.fromEntries(names.map((name) => [name, { case: 'x', score: score(name, view) }]));
    const total = Object.values(parts).reduce((sum, part) => sum + part.score, 0);
    return { prompt: { view }, reward: { total, parts } } as unknown as Episode;
  });
  return { row: {}, episodes } as EpisodeGroup;
}

/** Chances that a component is good, by whether its completion sees which words. */
type Chance = (name: string, sees: (name: string) => boolean, step: number) => number;

interface Run {
  records: AdaptiveRecord[];
  mixes: MotivationMix[];
  /** Steps after which something was said that had not been, or no longer. */
  changes: { step: number; name: string; decision: string }[];
}

function simulate(
  names: readonly string[],
  steps: number,
  chance: Chance,
  { seed = 0, groups = 8, motivation = adaptive(names), from = 1 } = {},
): Run {
  const run: Run = { records: [], mixes: [], changes: [] };
  for (let step = from; step <= steps; step++) {
    const random = new Random(seed, step);
    const mix = motivation.mix(step);
    const drawn = Array.from({ length: groups }, () =>
      group(
        mix,
        (name, view) => (random.uniform() < chance(name, (other) => shows(view, other), step) ? 2 : 0),
        names,
      ),
    );
    const record = motivation.learn(step, drawn);
    run.mixes.push(mix);
    run.records.push(record);
    for (const [name, { decision }] of Object.entries(record.components)) {
      if (decision !== 'stays') run.changes.push({ step, name, decision });
    }
  }
  return run;
}

function components(record: AdaptiveRecord | undefined, name: string): ComponentRecord {
  return record?.components[name] as ComponentRecord;
}

describe('the mix of a step', () => {
  const words = (mix: MotivationMix) => mix.map((view) => formatMotivation(view)).join(' ');

  test('most see what is said, the rest without a part of it, all of it or nothing', () => {
    expect(words(adaptive(['a']).mix(1))).toBe('full full full full full full full none');
    const two = adaptive(['a', 'b']);
    expect(words(two.mix(1))).toBe('full full full full full full partial:b none');
    expect(words(two.mix(2))).toBe('full full full full full full partial:a none');
    two.load({ said: ['b'], evidence: {} });
    expect(words(two.mix(3))).toBe('full partial:b partial:b partial:b partial:b partial:b partial:b none');
    two.load({ said: [], evidence: {} });
    expect(words(two.mix(3))).toBe('full none none none none none none partial:a');
    const three = adaptive(['a', 'b', 'c'], { groupSize: 16, adaptiveFloor: 0.2 });
    three.load({ said: ['a', 'c'], evidence: {} });
    const some = (view: string, count: number) => new Array<string>(count).fill(view);
    for (const [step, probe] of [
      [1, 'partial:c'],
      [2, 'partial:a'],
      [3, 'partial:c'],
    ] as const) {
      const expected = [...some('full', 3), ...some('partial:a+c', 7), ...some(probe, 3), ...some('none', 3)];
      expect(words(three.mix(step))).toBe(expected.join(' '));
    }
  });

  test('whatever is said: a view for each completion, the floors hold, and each component is probed in turn', () => {
    const names = ['a', 'b', 'c', 'd'];
    for (let count = 1; count <= 4; count++) {
      const present = names.slice(0, count);
      for (let subset = 0; subset < 2 ** count; subset++) {
        const said = present.filter((_, i) => subset & (1 << i));
        for (const groupSize of [Math.min(count + 1, 4), 8, 13, 32]) {
          for (const adaptiveFloor of [0.01, 0.125, 0.25]) {
            const motivation = adaptive(present, { groupSize, adaptiveFloor });
            motivation.load({ said, evidence: {} });
            const few = Math.max(1, Math.floor(adaptiveFloor * groupSize));
            const measured = new Set<string>();
            for (let step = 1; step <= count; step++) {
              const mix = motivation.mix(step);
              const texts = mix.map((view) => formatMotivation(view));
              expect(mix).toEqual(motivation.mix(step));
              expect(mix).toHaveLength(groupSize);
              expect(texts.filter((text) => text === 'full').length).toBeGreaterThanOrEqual(few);
              expect(texts.filter((text) => text === 'none').length).toBeGreaterThanOrEqual(few);
              // Completions that see the same share a prompt, which they do by the identity of the view.
              expect(new Set(mix).size).toBe(new Set(texts).size);
              for (const name of present) {
                const toggled = present.filter((other) => said.includes(other) !== (other === name));
                const view =
                  toggled.length === count
                    ? 'full'
                    : toggled.length
                      ? `partial:${toggled.join('+')}`
                      : 'none';
                if (texts.includes(view)) measured.add(name);
              }
            }
            expect([...measured].sort()).toEqual(present);
          }
        }
      }
    }
  });

  test('groups too small to compare within are refused', () => {
    expect(() => adaptive(['a', 'b'], { groupSize: 2 })).toThrow(
      /groupSize to be at least 3, .* adaptive motivation of 2 components compares, but it was 2/,
    );
    expect(() => adaptive(['a', 'b', 'c', 'd', 'e'], { groupSize: 3 })).toThrow(/at least 4/);
    expect(adaptive(['a'], { groupSize: 2 }).mix(1)).toEqual(['full', 'none']);
  });
});

describe('the lift', () => {
  test('is the difference within groups, with the error of a mean over groups', () => {
    const names = ['a', 'b'];
    const motivation = adaptive(names, { groupSize: 4 });
    // Step 2 leaves out b: two completions are full, one is partial:a, one none.
    const scores = [
      { full: [2, 0], left: 0 },
      { full: [2, 2], left: 0 },
      { full: [0, 0], left: 2 },
    ];
    const groups = scores.map(({ full, left }) => {
      const rest = [...full];
      const of = (view: MotivationView) => (view === 'full' ? (rest.shift() as number) : left);
      return group(motivation.mix(2), (name, view) => (name === 'b' ? of(view) : 1), names);
    });
    const record = motivation.learn(2, groups);
    expect(record.mix).toBe('full/full/partial:a/none');
    // Differences as shares of the range of 2.
    const differences = [0.5, 1, -1];
    const lift = differences.reduce((sum, d) => sum + d, 0) / 3;
    const deviations = differences.reduce((sum, d) => sum + (d - lift) ** 2, 0);
    const margin = 1.645 * Math.sqrt((deviations + 1) / 2 / 3);
    expect(components(record, 'b')).toMatchObject({ said: true, share: 0.5, groups: 3, steps: 1 });
    expect(components(record, 'b').lift).toBeCloseTo(lift, 12);
    expect(components(record, 'b').interval?.[0]).toBeCloseTo(lift - margin, 12);
    expect(components(record, 'b').interval?.[1]).toBeCloseTo(lift + margin, 12);
    // The total's range is 4, and a's own score is always the same.
    expect(components(record, 'b').total.lift).toBeCloseTo(lift / 2, 12);
    expect(components(record, 'a')).toMatchObject({
      share: 0.75,
      lift: null,
      interval: null,
      groups: 0,
      decision: 'stays',
      why: '0 of the 10 steps that decide have measured it',
    });
  });

  test('is that of the window alone', () => {
    const motivation = adaptive(['a'], { adaptiveWindow: 3 });
    const run = simulate(['a'], 8, (_, sees, step) => (step <= 4 ? 1 : sees('a') ? 1 : 0), { motivation });
    expect(run.records.map((record) => components(record, 'a').groups)).toEqual([
      8, 16, 24, 24, 24, 24, 24, 24,
    ]);
    // By step 3 nothing differs, and a few groups that agree are no proof: 24 groups leave up to 0.07.
    expect(components(run.records[2], 'a').interval?.[1]).toBeCloseTo(1.645 / Math.sqrt(24 * 23), 12);
    expect(components(run.records[7], 'a').lift).toBe(1);
    expect(run.changes).toEqual([]);
  });

  test('comes from the episodes before a hint where a group was drawn again', () => {
    const names = ['a'];
    const motivation = adaptive(names);
    const failed = group(motivation.mix(1), () => 0, names);
    const hinted = group(['full', 'full'], () => 2, names);
    const helped = group(motivation.mix(1), (_, view) => (view === 'full' ? 2 : 0), names);
    const record = motivation.learn(1, [{ ...hinted, failed: failed.episodes }, helped]);
    expect(components(record, 'a')).toMatchObject({ groups: 2, lift: 0.5 });
  });
});

describe('what is said', () => {
  const names = ['format', 'answer'];
  /** Words of format help until step 100 and again from step 250 on; those of answer always do. */
  const decays: Chance = (name, sees, step) => {
    if (!sees(name)) return 0.4;
    return name === 'answer' || step < 100 || step >= 250 ? 0.8 : 0.4;
  };

  test.each([0, 1, 2])(
    'words are withdrawn once they stop helping, and come back once they help, seed %i',
    (seed) => {
      const { records, changes } = simulate(names, 400, decays, { seed, groups: 16 });
      expect(changes.map(({ name, decision }) => `${name} ${decision}`)).toEqual([
        'format withdrawn',
        'format said again',
      ]);
      const [away, back] = changes as [Run['changes'][0], Run['changes'][0]];
      // All said, every second step measures a component, so that a window is 20 steps; later every step does.
      expect(away.step).toBeGreaterThanOrEqual(100 + 10);
      expect(away.step).toBeLessThan(250);
      expect(back.step).toBeGreaterThanOrEqual(250 + 3);
      expect(back.step).toBeLessThan(250 + 30);
      expect(components(records[away.step - 2], 'format')).toMatchObject({
        said: true,
        share: expect.closeTo(7 / 8, 1),
      });
      expect(components(records[away.step - 1], 'format').why).toMatch(
        /^the upper end of its lift, -?0\.0\d+, is below 0\.05$/,
      );
      expect(components(records[away.step], 'format')).toMatchObject({ said: false, share: 1 / 8, steps: 1 });
      expect(components(records[back.step - 1], 'format').why).toMatch(
        /^the lower end, 0\.\d+, of the lift of format is above 0\.1$/,
      );
      expect(components(records[back.step], 'format')).toMatchObject({ said: true });
      for (const record of records) expect(components(record, 'answer').said).toBe(true);
    },
  );

  test('nothing is decided before the window is full, nor again before it is full once more', () => {
    for (let seed = 0; seed < 3; seed++) {
      const { records, changes } = simulate(['a', 'b', 'c'], 200, () => 0.5, { seed });
      let last = 0;
      for (const { step } of changes) {
        expect(step - last).toBeGreaterThanOrEqual(10);
        last = step;
      }
      for (const record of records) {
        for (const { decision, steps } of Object.values(record.components)) {
          if (decision !== 'stays') expect(steps).toBe(10);
        }
        const decided = Object.values(record.components).filter(({ decision }) => decision !== 'stays');
        expect(decided.length).toBeLessThanOrEqual(1);
      }
    }
  });

  test('noise alone does not make words come and go', () => {
    // The lift is 0, or what words are withdrawn below; either way each of two components may go, and then stay away.
    const runs = [0, 0.05].map((lift) =>
      Array.from({ length: 10 }, (_, seed) =>
        simulate(names, 300, (name, sees) => (sees(name) ? 0.5 + lift : 0.5), { seed }),
      ),
    );
    for (const some of runs) {
      const counts = some.map(({ changes }) => changes.length);
      const mean = counts.reduce((sum, count) => sum + count, 0) / counts.length;
      expect(mean).toBeGreaterThanOrEqual(1.5);
      expect(mean).toBeLessThanOrEqual(3);
      expect(Math.max(...counts)).toBeLessThanOrEqual(6);
    }
  });

  test('words that raise the total stay, whatever they do to their own score', () => {
    const chance: Chance = (name, sees) => (name === 'answer' && !sees('format') ? 0.2 : 0.7);
    const { records, changes } = simulate(names, 200, chance);
    expect(changes.filter(({ name }) => name === 'format')).toEqual([]);
    expect(records.map((record) => components(record, 'format').why).join('\n')).toMatch(
      /upper end of its lift, -?[\d.]+, is below 0\.05, but its words raise the total by 0\.\d+ of its range or more/,
    );
  });

  test('words that help only together come back together', () => {
    const motivation = adaptive(names);
    motivation.load({ said: [], evidence: {} });
    const { records, changes } = simulate(
      names,
      60,
      (_, sees) => (sees('format') && sees('answer') ? 0.9 : 0.3),
      { motivation },
    );
    expect(changes.map(({ name }) => name)).toEqual(names);
    expect(changes[0]?.step).toBe(changes[1]?.step);
    const record = records[(changes[0]?.step ?? 0) - 1];
    expect(record?.together?.interval?.[0]).toBeGreaterThan(0.1);
    expect(components(record, 'format').why).toMatch(/of the lift of format\+answer is above 0\.1$/);
    expect(motivation.said).toEqual(names);
  });

  test('few groups decide nothing, however alike they are', () => {
    const motivation = adaptive(['a'], { adaptiveWindow: 5 });
    const { records, changes } = simulate(['a'], 50, () => 1, { motivation, groups: 1 });
    expect(changes).toEqual([]);
    expect(components(records[49], 'a')).toMatchObject({ lift: 0, groups: 5 });
    expect(components(records[49], 'a').interval?.[1]).toBeGreaterThan(0.3);
  });

  test('a score that cannot change needs no words', () => {
    const spec = new RewardSpec({
      name: 'constant',
      components: [{ name: 'a', cases: [{ name: 'x', score: 2, sentence: 'always' }], verify: () => 'x' }],
    });
    const motivation = new AdaptiveMotivation(spec, defaults);
    const { changes } = simulate(['a'], 20, () => 1, { motivation });
    expect(changes).toEqual([{ step: 10, name: 'a', decision: 'withdrawn' }]);
  });

  test('goes on from what was saved as if it had not been', () => {
    const unbroken = simulate(names, 200, decays);
    const first = adaptive(names);
    simulate(names, 123, decays, { motivation: first });
    const second = adaptive(names);
    second.load(JSON.parse(JSON.stringify(first.save())));
    const rest = simulate(names, 200, decays, { motivation: second, from: 124 });
    expect(rest.records).toEqual(unbroken.records.slice(123));
    expect(rest.mixes).toEqual(unbroken.mixes.slice(123));
  });
});

describe('a run', () => {
  let folder: string;

  beforeEach(() => {
    folder = mkdtempSync(join(tmpdir(), 'merf-adaptive-'));
  });
  afterEach(() => rmSync(folder, { recursive: true, force: true }));

  /** A policy that the words of the reward turn to "b". */
  function swayed(): FakePolicy {
    const policy = new FakePolicy();
    policy.sway = (prompt) => [0, prompt.includes('begins with b') ? 2 : 0, 0, 0];
    return policy;
  }

  async function trainer(policy: FakePolicy, options: Partial<TrainerOptions<FakeRow>> = {}) {
    return new Trainer<FakeRow>({
      policy: policy.asPolicy,
      task: await fakeTask({ rows: 400 }),
      out: join(folder, 'run'),
      steps: 12,
      promptsPerStep: 6,
      groupSize: 4,
      maxTokens: 3,
      learningRate: 6,
      motivation: 'adaptive',
      adaptiveWindow: 3,
      adaptiveLift: 0.2,
      saveEvery: 3,
      keepCheckpoints: 10,
      ...options,
    });
  }

  const linesOf = (run: string) =>
    readMetrics(join(folder, run, 'motivation.jsonl')) as unknown as AdaptiveRecord[];
  const metricsOf = (run: string) =>
    readMetrics(join(folder, run, 'metrics.jsonl')) as unknown as GrpoMetrics[];
  const completionsOf = (run: string, step: number) =>
    readFileSync(join(folder, run, 'completions', `step-${String(step).padStart(6, '0')}.jsonl`), 'utf8')
      .trim()
      .split('\n')
      .map((line) => JSON.parse(line) as CompletionRecord);
  const withoutTimes = (rows: readonly GrpoMetrics[]) =>
    rows.map((row) => Object.fromEntries(Object.entries(row).filter(([key]) => !/[sS]econds?$/.test(key))));

  test('withdraws the words that its model learns to do without, and says so line by line', async () => {
    const notices: string[] = [];
    const onEvent = (event: TrainingEvent) => {
      if (event.type === 'notice' && event.message.includes('words')) notices.push(event.message);
    };
    await (await trainer(swayed(), { onEvent })).run();
    const lines = linesOf('run');
    expect(lines.map(({ step }) => step)).toEqual(Array.from({ length: 12 }, (_, i) => i + 1));
    const metrics = metricsOf('run');
    expect(lines.map(({ mix }) => mix)).toEqual(metrics.map(({ motivation }) => motivation));
    // At first the words help; later the model does as well without.
    expect(components(lines[2], 'start').interval?.[0]).toBeGreaterThan(0.1);
    const withdrawn = lines.find((line) => components(line, 'start').decision === 'withdrawn');
    expect(withdrawn?.step).toBeGreaterThan(3);
    expect(notices).toEqual([
      `Step ${withdrawn?.step}: the words of start are withdrawn: ${components(withdrawn, 'start').why}`,
    ]);
    for (const line of lines) {
      const said = line.step <= (withdrawn?.step as number);
      expect(components(line, 'start')).toMatchObject({ said, share: said ? 3 / 4 : 1 / 4 });
    }
    // The figures are those of the completions that were kept.
    for (const last of [lines[1], withdrawn] as AdaptiveRecord[]) {
      const differences: number[] = [];
      for (let step = Math.max(1, last.step - 2); step <= last.step; step++) {
        const records = completionsOf('run', step);
        for (let prompt = 0; prompt < 6; prompt++) {
          const mean = (view: string) => {
            const some = records.filter((one) => one.promptIndex === prompt && one.view === view);
            return some.reduce((sum, { parts }) => sum + (parts.start?.score as number), 0) / some.length;
          };
          differences.push((mean('full') - mean('none')) / 2);
        }
      }
      const lift = differences.reduce((sum, one) => sum + one, 0) / differences.length;
      expect(components(last, 'start').lift).toBeCloseTo(lift, 10);
      expect(components(last, 'start').groups).toBe(differences.length);
    }
  }, 120_000);

  test('is the same to the last bit when it was broken off and resumed', async () => {
    const unbroken = swayed();
    await (await trainer(unbroken, { out: join(folder, 'unbroken') })).run();
    const lines = linesOf('unbroken');
    const decided = lines.findIndex((line) => components(line, 'start').decision !== 'stays') + 1;
    let policy = new FakePolicy();
    // The run goes on from a window that is not full, and then from after the decision.
    for (const [resume, stop] of [
      [false, 4],
      [true, decided + 3],
      [true, 12],
    ] as const) {
      policy = swayed();
      const done = resume ? listCheckpoints(join(folder, 'run', 'checkpoints')).at(-1)?.step : 0;
      policy.onSample = () => {
        if (policy.sampleCalls.length === stop - (done as number) + 1) throw new Error('pulled the plug');
      };
      const run = (await trainer(policy, { resume })).run();
      if (stop === 12) {
        await run;
        continue;
      }
      await expect(run).rejects.toThrow('plug');
      expect(linesOf('run')).toEqual(lines.slice(0, stop));
      // A process that is killed leaves lines behind that no checkpoint has.
      rmSync(listCheckpoints(join(folder, 'run', 'checkpoints')).at(-1)?.path as string, { recursive: true });
      const left = listCheckpoints(join(folder, 'run', 'checkpoints')).at(-1)?.step as number;
      expect(left).toBeLessThan(stop);
      expect(left >= decided).toBe(stop > decided);
    }
    expect(decided).toBeGreaterThan(4);
    expect(decided).toBeLessThan(9);
    expect(policy.logits).toEqual(unbroken.logits);
    expect(linesOf('run')).toEqual(lines);
    expect(withoutTimes(metricsOf('run'))).toEqual(withoutTimes(metricsOf('unbroken')));
  }, 120_000);

  test('what does not fit is refused by name, and no other motivation writes the file', async () => {
    await expect(trainer(new FakePolicy(), { adaptiveFloor: 0.3 })).rejects.toThrow(/adaptiveFloor/);
    await expect(trainer(new FakePolicy(), { motivation: 'full@0,adaptive@5' })).rejects.toThrow(
      /motivation/,
    );
    await expect(trainer(new FakePolicy(), { evaluateMotivations: ['adaptive'] })).rejects.toThrow(
      /motivation/,
    );
    await expect(trainer(new FakePolicy(), { hintFailed: 'partial:style' })).rejects.toThrow(/style/);
    await expect(trainer(new FakePolicy(), { hintFailed: 'full/none' })).rejects.toThrow(/one view/);
    await (await trainer(new FakePolicy(), { motivation: 'full', steps: 2 })).run();
    expect(existsSync(join(folder, 'run', 'motivation.jsonl'))).toBe(false);
    expect(metricsOf('run')[0]).not.toHaveProperty('hinted');
  });

  describe('with hints', () => {
    /** Prompts with an odd number are never right without the words, those with an even number nearly always. */
    function failing(): FakePolicy {
      const policy = new FakePolicy();
      policy.sway = (prompt) => {
        const odd = Number(/Number (\d+)/.exec(prompt)?.[1]) % 2 === 1;
        return [0, odd ? (prompt.includes('begins with b') ? 1 : -50) : 3, 0, 0];
      };
      return policy;
    }
    const hints = {
      motivation: 'none',
      hintFailed: 'full',
      steps: 2,
      promptsPerStep: 4,
      learningRate: 0.1,
      saveEvery: 1,
    } as const;

    test('rows that fail are drawn again under the hint, others are not', async () => {
      const policy = failing();
      await (await trainer(policy, hints)).run();
      const calls = policy.sampleCalls as { keys: number[]; n: number }[];
      let call = 0;
      for (const { step, hinted, uniformGroups, byView } of metricsOf('run')) {
        const records = completionsOf('run', step);
        const odd = new Set<number>();
        for (const record of records) {
          const number = Number(/Number (\d+)/.exec(record.prompt)?.[1]);
          if (number % 2 === 1) odd.add(record.promptIndex);
          expect(record.view).toBe(number % 2 === 1 ? 'full' : 'none');
          expect(record.prompt.includes('begins with b')).toBe(number % 2 === 1);
        }
        const groups = Array.from({ length: 4 }, (_, i) => records.filter((one) => one.promptIndex === i));
        expect(groups.every((group) => group.length === 4)).toBe(true);
        // Advantages compare the hinted with each other.
        for (const group of groups) {
          expect(group.reduce((sum, { advantage }) => sum + advantage, 0)).toBeCloseTo(0, 4);
        }
        const differs = groups.filter((group) => new Set(group.map(({ reward }) => reward)).size > 1);
        const withSignal = differs.filter(([one]) => odd.has(one?.promptIndex as number)).length;
        expect(hinted).toEqual({ groups: odd.size, withSignal });
        expect(uniformGroups).toBe(1 - differs.length / 4);
        expect(byView?.full?.completions).toBe(4 * odd.size);
        // Rows that are drawn again have random streams of their own.
        expect(calls[call++]).toMatchObject({ n: 4, keys: [0, 1, 2, 3] });
        expect(odd.size).toBeGreaterThan(0);
        expect(calls[call++]).toMatchObject({ n: 4, keys: Array.from(odd, (_, i) => 2 ** 31 + i) });
      }
      expect(calls).toHaveLength(call);
      const all = metricsOf('run').map(({ hinted }) => hinted?.withSignal as number);
      expect(Math.max(...all)).toBeGreaterThan(0);
    });

    test('where none fails nothing is drawn again', async () => {
      const policy = new FakePolicy();
      policy.sway = () => [0, 9, 0, 0];
      await (await trainer(policy, hints)).run();
      expect(policy.sampleCalls).toHaveLength(2);
      expect(metricsOf('run').map(({ hinted }) => hinted)).toEqual(
        new Array(2).fill({ groups: 0, withSignal: 0 }),
      );
    });

    test('hinted completions can be learned without the hint, by the importance ratio', async () => {
      const policy = failing();
      const guide = { ...hints, learnUnder: 'none', learnCorrection: 'importance', steps: 1 } as const;
      await (await trainer(policy, guide)).run();
      const texts: string[] = [];
      const visit = (segments: FakePolicy['forests'][0], before: string): void => {
        for (const { tokens, train, children } of segments) {
          if (train) texts.push(before);
          else visit(children ?? [], before + String.fromCharCode(...Array.from(tokens)));
        }
      };
      visit(policy.forests[0] ?? [], '');
      expect(texts.length).toBeGreaterThan(0);
      expect(texts.filter((text) => text.includes('begins with b'))).toEqual([]);
      expect(texts.some((text) => Number(/Number (\d+)/.exec(text)?.[1]) % 2 === 1)).toBe(true);
      expect(metricsOf('run')[0]?.promptGap?.tokens).toBeGreaterThan(0);
    });

    test('a resumed run is the same', async () => {
      const unbroken = failing();
      await (await trainer(unbroken, { ...hints, out: join(folder, 'unbroken') })).run();
      await (await trainer(failing(), { ...hints, steps: 1 })).run();
      const second = failing();
      await (await trainer(second, { ...hints, resume: true })).run();
      expect(second.logits).toEqual(unbroken.logits);
      expect(withoutTimes(metricsOf('run'))).toEqual(withoutTimes(metricsOf('unbroken')));
      for (let step = 1; step <= 2; step++) {
        expect(completionsOf('run', step)).toEqual(completionsOf('unbroken', step));
      }
    });
  });
});
