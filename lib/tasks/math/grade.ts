import type { ParsedCompletion } from '../../reward/completion.js';
import { areEquivalent } from './equivalence.js';
import { extractAnswer } from './extract.js';

/**
 * The verifier of correctness, which runs in a worker thread: `right` where the answer after the reasoning
 * says the same as the known one, `unreadable` where there is none.
 */
export async function verify(
  completion: ParsedCompletion,
  row: { readonly answer: string },
): Promise<string> {
  const { text } = completion;
  const answer = extractAnswer(text.slice(text.lastIndexOf('</think>') + 1));
  if (answer === undefined) return 'unreadable';
  return (await areEquivalent(answer, row.answer)) ? 'right' : 'wrong';
}
