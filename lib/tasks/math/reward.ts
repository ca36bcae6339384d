import { MerfError } from '../../errors.js';
import { RewardSpec } from '../../reward/spec.js';
import { inWorker } from '../../reward/worker.js';
import { hasTagsOnce } from '../tags.js';
import type { MathRow } from './dataset.js';
import { lastBoxed } from './extract.js';

/**
 * Whether `<think>` and `</think>` occur exactly once, in this order, and a box with something in it follows,
 * whatever stands around them.
 */
export function hasDemandedFormat(text: string): boolean {
  if (!hasTagsOnce(text, ['<think>', '</think>'])) return false;
  return lastBoxed(text.slice(text.indexOf('</think>'))) !== undefined;
}

/** Seconds that one comparison may take; each is limited in its work, so this is a second line of defence. */
const secondsPerAnswer = 10;

const grade = inWorker<MathRow>(new URL('./grade.js', import.meta.url), 'verify', {
  timeoutSeconds: secondsPerAnswer,
});

/**
 * Format and correctness with the points of knights and knaves (arXiv 2506.18485): a wrong format leaves the
 * answer unread. Answers are compared in worker threads.
 */
export const mathReward: RewardSpec<MathRow> = new RewardSpec({
  name: 'math',
  // Answers wait for a thread that is free, so that this is far more than one takes.
  timeoutSeconds: 600,
  components: [
    {
      name: 'format',
      cases: [
        {
          name: 'demanded',
          score: 1,
          sentence:
            'if <think> and </think> occur exactly once, in this order, and the answer follows in \\boxed{}',
        },
        { name: 'broken', score: -1, sentence: 'otherwise', implies: { correctness: 'unreadable' } },
      ],
      verify: (completion) => (hasDemandedFormat(completion.text) ? 'demanded' : 'broken'),
    },
    {
      name: 'correctness',
      cases: [
        {
          name: 'right',
          score: 2,
          sentence: 'if the last \\boxed{} after </think> holds the right answer, in whatever notation',
        },
        { name: 'wrong', score: -1.5, sentence: 'if it holds anything else' },
        { name: 'unreadable', score: -2, sentence: 'if there is no answer in \\boxed{}' },
      ],
      verify: async (completion, row, context) => {
        try {
          return await grade(completion, row, context);
        } catch (error) {
          // No answer that a person would give takes this long to compare.
          if (error instanceof MerfError && error.code === 'VERIFIER_TIMEOUT') return 'wrong';
          throw error;
        }
      },
    },
  ],
});
