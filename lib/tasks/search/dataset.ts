import { describeValue } from '../../errors.js';
import { type Fields, textField } from '../dataset.js';
import { normalizeAnswer } from './normalize.js';
import type { SearchRow } from './world.js';

const columns = ['answers', 'golden_answers', 'answer'] as const;

/**
 * A row with the column `question` and the golden answers in `answers`, `golden_answers` (as in the question sets that
 * Search-R1 is trained on) or `answer`: a text, a number, or a list of them.
 *
 * @throws Error that names the column at fault
 */
export function parseQuestion(fields: Fields): SearchRow {
  const question = textField(fields, 'question').trim();
  if (question === '') throw new Error('Expected a question in column question but found an empty one');
  const column = columns.find((name) => fields[name] !== undefined && fields[name] !== null);
  if (column === undefined) {
    throw new Error(`Expected golden answers in one of the columns ${columns.join(', ')} but found none`);
  }
  const value = fields[column];
  const answers = (Array.isArray(value) ? value : [value]).map((item: unknown) => {
    if (typeof item === 'string') return item.trim();
    if (typeof item === 'number') return String(item);
    throw new Error(`Expected texts or numbers in column ${column} but found ${describeValue(item)}`);
  });
  if (!answers.some((answer) => normalizeAnswer(answer) !== '')) {
    throw new Error(`Expected an answer in column ${column} that is more than punctuation and articles`);
  }
  return { question, answers };
}
