// Python's string.punctuation, which the script goes by: ASCII alone.
const punctuation = /[!-/:-@[-`{-~]/g;
// Word boundaries count letters of every script, as Python's do, so the "a" in "aéro" is no article.
const articles = /(?<![\p{L}\p{N}_])(?:a|an|the)(?![\p{L}\p{N}_])/gu;
// What Python's str.split() divides at; JavaScript's \s has another set.
// biome-ignore lint/suspicious/noControlCharactersInRegex: four separators among them count as white space there
const whiteSpace = /[\p{White_Space}\u001c-\u001f]+/u;

/**
 * An answer as SQuAD's evaluation script compares it (Rajpurkar et al., arXiv 1606.05250), which open-domain Natural
 * Questions is scored with: lower case, no ASCII punctuation, no articles, single spaces; in this order.
 */
export function normalizeAnswer(answer: string): string {
  return answer
    .toLowerCase()
    .replace(punctuation, '')
    .replace(articles, ' ')
    .split(whiteSpace)
    .filter((word) => word !== '')
    .join(' ');
}

/** Whether an answer equals one of the golden ones after normalisation. */
export function isExactMatch(answer: string, golden: readonly string[]): boolean {
  const normalized = normalizeAnswer(answer);
  return golden.some((one) => normalizeAnswer(one) === normalized);
}
