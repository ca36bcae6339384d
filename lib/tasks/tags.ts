import type { CaseComponent } from '../reward/index.js';

const thinkAndAnswer = ['<think>', '</think>', '<answer>', '</answer>'] as const;

/** Whether each of the tags occurs exactly once, in the order given, whatever stands around them. */
export function hasTagsOnce(text: string, tags: readonly string[]): boolean {
  let previous = -1;
  for (const tag of tags) {
    const position = text.indexOf(tag);
    if (position <= previous || text.indexOf(tag, position + tag.length) >= 0) return false;
    previous = position;
  }
  return true;
}

/** Whether a response is thinking and an answer, each in its tags. */
export function hasThinkAndAnswer(text: string): boolean {
  return hasTagsOnce(text, thinkAndAnswer);
}

/**
 * The component `format` of Logic-RL's reward, which the MeRF paper (arXiv 2506.18485) builds on: thinking and an answer,
 * each in its tags. A wrong format leaves the answer unread: it implies the case `unreadable` of `correctness`.
 */
export const thinkAndAnswerFormat: CaseComponent = {
  name: 'format',
  cases: [
    {
      name: 'demanded',
      score: 1,
      sentence:
        'if each of the tags <think>, </think>, <answer> and </answer> occurs exactly once, in this order',
    },
    { name: 'broken', score: -1, sentence: 'otherwise', implies: { correctness: 'unreadable' } },
  ],
  verify: ({ text }) => (hasThinkAndAnswer(text) ? 'demanded' : 'broken'),
};

/** A response in the demanded form. */
export function thinkAndAnswerText(thinking: string, answer: string): string {
  return `<think>\n${thinking}\n</think>\n<answer>\n${answer}\n</answer>`;
}
