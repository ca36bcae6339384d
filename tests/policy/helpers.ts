import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { expect } from '@jest/globals';
import { MerfError, type MerfErrorCode } from '../../lib/errors.js';

export * from './tiny-model.js';

const root = join(dirname(fileURLToPath(import.meta.url)), '..', '..');

/** A real model that tests use where it is, and skip where it is not. */
export const smollm = join(root, '..', 'shared', 'models', 'SmolLM2-135M-Instruct.Q4_1.gguf');

export function temporaryDirectory(): { path: string; remove: () => void } {
  const path = mkdtempSync(join(tmpdir(), 'merf-policy-'));
  return { path, remove: () => rmSync(path, { recursive: true, force: true }) };
}

/** The MerfError that `run` fails with; any other outcome fails the test. */
export async function failure(run: () => unknown): Promise<MerfError> {
  let outcome: unknown;
  try {
    outcome = await run();
  } catch (error) {
    expect(error).toBeInstanceOf(MerfError);
    return error as MerfError;
  }
  throw new Error(`expected a failure but got ${JSON.stringify(outcome)?.slice(0, 200)}`);
}

export async function expectFailure(
  run: () => unknown,
  code: MerfErrorCode,
  ...parts: (string | RegExp)[]
): Promise<void> {
  const error = await failure(run);
  expect(`${error.code}: ${error.message}`).toMatch(new RegExp(`^${code}: `));
  for (const part of parts) expect(error.message).toMatch(part);
}
