import { threadId } from 'node:worker_threads';
import type { ParsedCompletion, VerifierContext } from 'merf';

/** The verifiers that worker.test.ts runs in worker threads; a completion's text tells each what to do. */
export async function verify(
  completion: ParsedCompletion,
  row: { readonly milliseconds?: number },
  context: VerifierContext,
): Promise<unknown> {
  const { text } = completion;
  if (text === 'loop') for (;;);
  await Promise.resolve();
  if (text === 'loop after await') for (;;);
  if (text === 'throw') throw new RangeError('the row is odd');
  if (text === 'sleep') await new Promise((resolve) => setTimeout(resolve, row.milliseconds));
  if (text === 'thread') return threadId;
  if (text === 'cases') return context.cases.format;
  if (text === 'object') return { verdict: 'right' };
  if (text === 'function') return () => 'right';
  if (text === 'exit') process.exit(3);
  return 'right';
}

export const notAFunction = 3;
