// A task of one's own: rows, a prompt, and a reward whose rules the prompt states. `merf prompt --task` prints it, and
//   npx merf train --task examples/own-task.ts --largest 20 --steps 5 --out runs/sums
import { defineTask, RewardSpec, z } from 'merf';

const spec = new RewardSpec<{ a: number; b: number }>({
  name: 'sums',
  components: [
    {
      name: 'correctness',
      cases: [
        { name: 'right', score: 2, sentence: 'if the number between <answer> and </answer> is the sum' },
        { name: 'wrong', score: 0, sentence: 'otherwise' },
      ],
      verify: ({ answer }, { a, b }) => (answer === String(a + b) ? 'right' : 'wrong'),
    },
  ],
});

export const task = defineTask({
  name: 'sums',
  options: { largest: z.int().min(1).default(50).meta({ description: 'largest number to add' }) },
  create: ({ largest }) => ({
    spec,
    data: (random) => ({ a: random.below(largest + 1), b: random.below(largest + 1) }),
    messages: ({ a, b }) => [{ role: 'user', content: `What is ${a} + ${b}?` }],
    reference: ({ a, b }) => `<answer>${a + b}</answer>`,
  }),
});
