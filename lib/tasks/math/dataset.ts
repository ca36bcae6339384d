import { describeValue } from '../../errors.js';
import type { Fields } from '../dataset.js';
import { extractAnswer, lastBoxed } from './extract.js';

export interface MathRow {
  readonly problem: string;
  /** The known answer, as LaTeX or plain text. */
  readonly answer: string;
  /** A worked solution, where the data has one. */
  readonly reasoning?: string;
}

export interface Columns {
  /** Column of the problem (default: the first of `prompt`, `problem` and `question` that holds text). */
  readonly problemColumn?: string | undefined;
  /** Column of the answer (default: `answer`, or `solution` where there is none). */
  readonly answerColumn?: string | undefined;
}

const problemColumns = ['prompt', 'problem', 'question'];
const answerColumns = ['answer', 'solution'];

/**
 * A row of published data: a problem and its answer, which may stand at the end of a worked solution, in the
 * last `\boxed{}` as in MATH or after `####` as in GSM8K.
 *
 * @throws Error that names the column
 */
export function parseMathRow(fields: Fields, columns: Columns = {}): MathRow {
  const problem = textIn(fields, columns.problemColumn ?? problemColumns);
  const column = columns.answerColumn ?? answerColumns.find((name) => fields[name] != null) ?? 'answer';
  const value = fields[column];
  if (typeof value === 'number' && Number.isFinite(value))
    return withSolution(fields, column, problem, String(value));
  if (typeof value !== 'string' || value.trim() === '') {
    throw new Error(
      `Expected an answer, text or a number, in column ${column} but found ${describeValue(value)}`,
    );
  }
  const answer = finalAnswer(value);
  if (answer === undefined) {
    throw new Error(
      `Expected a worked solution with \\boxed{} or #### in column ${column} but found neither`,
    );
  }
  const worked = value.split('####', 1)[0] as string;
  if (worked !== value && worked.trim() !== '') return { problem, answer, reasoning: cleaned(worked) };
  return answer === value.trim()
    ? withSolution(fields, column, problem, answer)
    : { problem, answer, reasoning: cleaned(value) };
}

function textIn(fields: Fields, columns: string | readonly string[]): string {
  const names = typeof columns === 'string' ? [columns] : columns;
  const column = names.find((name) => typeof fields[name] === 'string');
  const text = column === undefined ? undefined : (fields[column] as string).trim();
  if (text) return text;
  const found = describeValue(fields[column ?? (names[0] as string)]);
  const place = names.length === 1 ? `column ${names[0]}` : `one of the columns ${names.join(', ')}`;
  throw new Error(`Expected the text of a problem in ${place} but found ${found}`);
}

/** A worked solution stands in a column of its own where the answer is given apart, as in MATH. */
function withSolution(fields: Fields, column: string, problem: string, answer: string): MathRow {
  const { solution } = fields;
  if (column === 'solution' || typeof solution !== 'string') return { problem, answer };
  // Text without a box may be anything; one that ends in an answer has worked towards it.
  return lastBoxed(solution) === answer
    ? { problem, answer, reasoning: cleaned(solution) }
    : { problem, answer };
}

/** The text itself where it is an answer; undefined for several lines that name none. */
function finalAnswer(text: string): string | undefined {
  return extractAnswer(text) ?? (text.trim().includes('\n\n') || text.length > 500 ? undefined : text.trim());
}

/** A worked solution as a model may write it: without the marks of a calculator that GSM8K has. */
function cleaned(text: string): string {
  return text.replace(/<<[^<>]*>>/g, '').trim();
}
