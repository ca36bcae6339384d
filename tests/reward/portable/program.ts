// Uses everything that `merf/reward` is for, and gives what it came to as text: the same in every runtime.
import {
  type CompletionInput,
  countdown,
  defineTask,
  groupAdvantages,
  knightsAndKnaves,
  MerfError,
  parseCompletion,
  parseMotivation,
  RewardSpec,
  stageAt,
  type Task,
  viewOf,
} from 'merf/reward';

const views = [
  'none',
  'full',
  'adverse',
  { partial: ['correctness'] },
  { template: 'Mind: {{rules}}' },
] as const;

/** Prompts, demonstrations and rewards of a task's first rows. */
async function rowsOf<Row>(task: Task<Row>) {
  const rows = { train: task.rows({ split: 'train', seed: 7 }), test: task.rows({ split: 'test', seed: 7 }) };
  const judge = (row: Row, input: CompletionInput) => task.spec.judge(parseCompletion(input), row);
  const seen = [];
  for (const source of Object.values(rows)) {
    for (const position of [0, 1, 11]) {
      const row = source.at(position);
      const right = task.reference?.(row) as string;
      seen.push({
        row,
        right: await judge(row, { raw: right }),
        shown: await judge(row, { raw: task.demonstrate?.(row) as string }),
        wrong: await judge(row, { raw: right.replace(/<answer>.*/s, '<answer>7</answer>') }),
        broken: await judge(row, { raw: 'I do not know', finishReason: 'length' }),
      });
    }
  }
  const messages = views.map((view) => task.messages(rows.train.at(0), view));
  // What generates rows is part of their fingerprint, as its source reads, which a bundler rewrites.
  const fingerprints = Object.values(rows).map(({ size, fingerprint }) => size === undefined || fingerprint);
  return { fingerprints, messages, seen };
}

const codeOf = async (run: () => unknown) => {
  try {
    return `nothing failed: ${JSON.stringify(await run())}`;
  } catch (error) {
    return error instanceof MerfError ? error.code : String(error);
  }
};

const components = (verify: () => string | Promise<string>) => [
  { name: 'correctness', cases: [{ name: 'yes', score: 1, sentence: 'if so' }], verify },
];

/** How verifiers fail: late ones, ones that are given up, and ones that throw. */
async function failures() {
  const judge = (verify: () => string | Promise<string>, signal?: AbortSignal) =>
    new RewardSpec({ name: 'failing', timeoutSeconds: 0.02, components: components(verify) }).judge(
      parseCompletion({ raw: '' }),
      {},
      signal && { signal },
    );
  const never = () => new Promise<string>(() => undefined);
  const given = new AbortController();
  setTimeout(() => given.abort(), 5);
  return {
    never: await codeOf(() => judge(never)),
    loop: await codeOf(() =>
      judge(() => {
        for (const end = Date.now() + 60; Date.now() < end; ) Math.random();
        return 'yes';
      }),
    ),
    late: await codeOf(() => judge(() => new Promise((resolve) => setTimeout(() => resolve('yes'), 90)))),
    given: await codeOf(() => judge(never, given.signal)),
    throws: await codeOf(() => judge(() => Promise.reject(new Error('no')))),
    unknown: await codeOf(() => judge(() => 'perhaps')),
    quick: await judge(async () => 'yes'),
  };
}

const ownRows = Array.from({ length: 40 }, (_, i) => ({ id: i, text: `row ${i}, größer als 𝕏` }));

export async function program(): Promise<string> {
  const own = await defineTask({
    name: 'own',
    spec: new RewardSpec<{ id: number; text: string }>({ name: 'own', components: components(() => 'yes') }),
    data: ownRows,
    messages: ({ text }) => [{ role: 'user', content: text }],
    reference: () => 'yes',
    demonstrate: () => 'yes',
  }).open();
  const motivation = parseMotivation('full/partial:format@0,none@10');
  return JSON.stringify({
    'knights-and-knaves': await rowsOf(await knightsAndKnaves.open({ people: '2-4' })),
    countdown: await rowsOf(await countdown.open({ numbers: 3 })),
    own: await rowsOf(own),
    motivation: [0, 9, 10].map((step) => viewOf(stageAt(motivation, step), 3, 4)),
    advantages: (['group', 'batch', 'leave_one_out'] as const).map((kind) =>
      groupAdvantages([[1, 0, 0.3, -2.5], [2, 2], [7], [1e-3, 2e-3, 0]], { kind }),
    ),
    unknownOption: await codeOf(() => countdown.open({ numbers: 99 })),
    failures: await failures(),
  });
}
