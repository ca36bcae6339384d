import { RewardSpec } from '../../lib/reward/index.js';
import { defineTask, type Task } from '../../lib/tasks/index.js';

export interface FakeRow {
  id: number;
}

/** Wants completions that begin with "b", of any length. */
export async function fakeTask(
  options: {
    rows?: number;
    verify?: (text: string, row: FakeRow) => string | Promise<string>;
    timeoutSeconds?: number;
  } = {},
): Promise<Task<FakeRow>> {
  const verify = options.verify ?? ((text) => (text.startsWith('b') ? 'right' : 'wrong'));
  return defineTask<FakeRow>({
    name: 'begin-with-b',
    spec: new RewardSpec<FakeRow>({
      name: 'begin-with-b',
      ...(options.timeoutSeconds !== undefined && { timeoutSeconds: options.timeoutSeconds }),
      components: [
        {
          name: 'start',
          cases: [
            { name: 'right', score: 1, sentence: 'if it begins with b' },
            { name: 'wrong', score: -1, sentence: 'otherwise' },
          ],
          verify: (completion, row) => verify(completion.text, row),
        },
      ],
    }),
    data: Array.from({ length: options.rows ?? 40 }, (_, id) => ({ id })),
    messages: (row) => [
      { role: 'system', content: 'Write letters.' },
      { role: 'user', content: `Number ${row.id}` },
    ],
    reference: () => 'b',
    demonstrate: () => 'bb',
  }).open();
}
