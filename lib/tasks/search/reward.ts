import { RewardSpec } from '../../reward/spec.js';
import { isExactMatch } from './normalize.js';

/** What the reward needs to know of a question. */
export interface GoldenAnswers {
  /** Every answer that counts as right. */
  readonly answers: readonly string[];
}

const tag = /<(\/?)(think|search|information|answer)>/g;

/**
 * Whether a response is made of rounds of thinking and a query, as many as one likes, and at last thinking and an answer,
 * with nothing but white space outside of the tags and none of them within another or empty but for `<think>`.
 *
 * @param text what the model wrote, its turns joined, without what the environment put between them
 */
export function hasSearchFormat(text: string): boolean {
  let previous: string | undefined;
  let position = 0;
  const tags = [...text.matchAll(tag)];
  for (let i = 0; i < tags.length; i += 2) {
    const [open, close] = [tags[i], tags[i + 1]] as [RegExpMatchArray, RegExpMatchArray | undefined];
    const name = open[2];
    if (open[1] !== '' || close?.[1] !== '/' || close[2] !== name) return false;
    if (text.slice(position, open.index).trim() !== '') return false;
    const from = (open.index as number) + open[0].length;
    const content = text.slice(from, close.index).trim();
    if (name === 'information' || (name !== 'think' && content === '')) return false;
    // Thinking comes first and after every search, and what it leads to is a search or the answer.
    if ((name === 'think') === (previous === 'think') || previous === 'answer') return false;
    previous = name;
    position = (close.index as number) + close[0].length;
  }
  return previous === 'answer' && text.slice(position).trim() === '';
}

/**
 * The reward of a search agent in the form of Search-R1 (Jin et al., arXiv 2503.09516 for the exact match, 2505.15117 for
 * the share of the format, which is 0.2 there as here): 1 for a right answer in the demanded format, 0.8 for a right one
 * in another, 0.2 for the format alone, 0 otherwise. What the environment wrote is no part of the response.
 */
export const searchReward: RewardSpec<GoldenAnswers> = new RewardSpec<GoldenAnswers>({
  name: 'search',
  components: [
    {
      name: 'format',
      cases: [
        {
          name: 'demanded',
          score: 0.2,
          sentence:
            'if you write nothing but <think>reasoning</think> followed by <search>query</search>, as often as needed, ' +
            'and at last <think>reasoning</think> followed by <answer>answer</answer>',
        },
        { name: 'broken', score: 0, sentence: 'otherwise' },
      ],
      verify: (completion) => (hasSearchFormat(completion.text) ? 'demanded' : 'broken'),
    },
    {
      name: 'correctness',
      cases: [
        {
          name: 'right',
          score: 0.8,
          sentence:
            'if the last answer is right; case, punctuation and articles do not matter, every other word does',
        },
        { name: 'wrong', score: 0, sentence: 'if it is not' },
        { name: 'missing', score: 0, sentence: 'if there is no answer between <answer> and </answer>' },
      ],
      verify: ({ answer }, { answers }) => {
        if (answer === undefined || answer === '') return 'missing';
        return isExactMatch(answer, answers) ? 'right' : 'wrong';
      },
    },
  ],
});
