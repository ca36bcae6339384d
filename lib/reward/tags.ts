/** The tags that a response of thinking and an answer is made of, in their order. */
export const thinkAndAnswer = ['<think>', '</think>', '<answer>', '</answer>'] as const;

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
