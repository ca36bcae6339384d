// A task of one's own: generated rows, a prompt, and a reward whose rules the prompt states.
//
//   npx merf prompt --task examples/own-task.ts
//   npx merf train --task examples/own-task.ts --steps 5 --out runs/sums
//
// With rows in a file, `data: 'sums.jsonl'` replaces the generator, and `merf verify` checks the file.
import { defineTask, RewardSpec } from 'merf';

interface Sum {
  a: number;
  b: number;
}

const spec = new RewardSpec<Sum>({
  name: 'sums',
  components: [
    {
      name: 'correctness',
      cases: [
        { name: 'right', score: 2, sentence: 'if the number between <answer> and </answer> is the sum' },
        { name: 'wrong', score: 0, sentence: 'if it is another number' },
        { name: 'missing', score: -1, sentence: 'if there is no number' },
      ],
      verify({ answer }, { a, b }) {
        if (!answer || !/^\d+$/.test(answer)) return 'missing';
        return Number(answer) === a + b ? 'right' : 'wrong';
      },
    },
    {
      name: 'brevity',
      range: [0, 1],
      sentence: 'the shorter the response, the more; 0 from 200 characters on',
      verify: ({ text }) => Math.max(0, 1 - text.length / 200),
    },
  ],
});

export const task = defineTask<Sum>({
  name: 'sums',
  spec,
  data: (random) => ({ a: random.below(50), b: random.below(50) }),
  messages: ({ a, b }) => [
    { role: 'system', content: 'Answer between <answer> and </answer>, as in <answer>7</answer>.' },
    { role: 'user', content: `What is ${a} + ${b}?` },
  ],
  demonstrate: ({ a, b }) => `<answer>${a + b}</answer>`,
});
