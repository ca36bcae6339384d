import { mkdirSync, rmSync } from 'node:fs';
import { Draw } from './draw.js';
import type { Input, Target } from './target.js';

/** What is wrong with how a target took an input. */
export interface Fault {
  readonly message: string;
  readonly stack: string;
}

export type Outcome = 'value' | 'refused' | Fault;

export function inputOf(target: Target, seed: number, iteration: number): Promise<Input> {
  return Promise.resolve(target.make(new Draw(target.name, seed, iteration)));
}

/** Has a target read the input of an iteration in a folder of its own, which is gone afterwards. */
export async function attempt(
  target: Target,
  seed: number,
  iteration: number,
  folder: string,
): Promise<Outcome> {
  rmSync(folder, { recursive: true, force: true });
  mkdirSync(folder, { recursive: true });
  try {
    await target.run(await inputOf(target, seed, iteration), folder);
    return 'value';
  } catch (error) {
    return judged(error);
  } finally {
    rmSync(folder, { recursive: true, force: true });
  }
}

/** Refused by a MerfError, or at fault by any other error. */
export function judged(error: unknown): 'refused' | Fault {
  // By its name: a test's modules have a class of their own.
  if (error instanceof Error && error.name === 'MerfError') {
    const { code } = error as { code?: unknown };
    if (code !== 'INTERNAL') return 'refused';
  }
  const { name, message, stack } = Object(error) as Partial<Error>;
  return {
    message: `${name ?? typeof error}: ${message ?? String(error)}`.slice(0, 2000),
    stack: String(stack ?? '').slice(0, 4000),
  };
}
