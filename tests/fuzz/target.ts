import { mkdirSync, writeFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import type { Draw } from './draw.js';

/** The files, or texts, that a target is given, by name. */
export type Input = Readonly<Record<string, string | Uint8Array>>;

/** A reader of something from outside. */
export interface Target {
  readonly name: string;
  /** What it may take of a processor for one input, in seconds (default 5). */
  readonly seconds?: number;
  /** An input that nothing but `draw` decides. */
  make(draw: Draw): Input | Promise<Input>;
  /**
   * Reads the input. A value is right, and so is a MerfError; whatever else is thrown is a finding.
   * @param folder an empty folder
   */
  run(input: Input, folder: string): unknown;
}

export const defaultSeconds = 5;

export function writeInput(folder: string, input: Input): void {
  for (const [name, content] of Object.entries(input)) {
    const path = join(folder, name);
    mkdirSync(dirname(path), { recursive: true });
    writeFileSync(path, content);
  }
}

/** A part of an input as text. */
export function textOf(input: Input, name: string): string {
  const content = input[name] ?? '';
  return typeof content === 'string' ? content : Buffer.from(content).toString('utf8');
}
