import { describeValue } from '../errors.js';
import type { ParsedCompletion } from './completion.js';
import type { VerifierContext } from './spec.js';

/** What is sent to a worker thread for one verification. */
export interface Job {
  readonly module: string;
  readonly exportName: string;
  readonly completion: ParsedCompletion;
  readonly row: unknown;
  readonly cases: Readonly<Record<string, string>>;
}

type Verifier = (completion: ParsedCompletion, row: unknown, context: VerifierContext) => unknown;

/** Runs in the worker thread: imports the verifier's module, which is cached, and asks the verifier. */
export async function runJob(job: Job): Promise<string | number> {
  const module = (await import(job.module)) as Record<string, unknown>;
  const verifier = module[job.exportName];
  if (typeof verifier !== 'function') {
    const names = Object.keys(module).join(', ') || 'nothing';
    throw new Error(`Expected ${job.module} to export a function ${job.exportName} but it exports ${names}`);
  }
  // The thread itself is ended when the time is up, so this signal never fires; a verifier may still hand it
  // on.
  const { signal } = new AbortController();
  const verdict = await (verifier as Verifier)(job.completion, job.row, { cases: job.cases, signal });
  if (typeof verdict === 'string' || typeof verdict === 'number') return verdict;
  const where = `${job.exportName} of ${job.module}`;
  throw new Error(`Expected text or a number from ${where} but received ${describeValue(verdict)}`);
}
