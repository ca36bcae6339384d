import { RewardSpec } from '../../lib/reward/index.js';
import { defineTask } from '../../lib/tasks/index.js';

/** Wants as many letters as possible; short enough for a tiny model, and a random one gets different rewards. */
export const task = defineTask<{ word: string }>({
  name: 'letters',
  spec: new RewardSpec({
    name: 'letters',
    components: [
      {
        name: 'letters',
        range: [0, 1],
        sentence: 'the share of letters',
        verify: ({ text }) => (text === '' ? 0 : (text.match(/[a-z]/g)?.length ?? 0) / text.length),
      },
    ],
  }),
  data: 'amber birch cedar delta ember fjord grove heron ivory jolly karst lemon'
    .split(' ')
    .map((word) => ({ word })),
  messages: ({ word }) => [{ role: 'user', content: word }],
  reference: () => 'letters',
});
