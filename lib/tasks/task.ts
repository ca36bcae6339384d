import type { ChatMessage } from '../prompt/chat-template.js';
import type { MotivationView } from '../prompt/motivation.js';
import type { RewardSpec } from '../reward/spec.js';
import type { Environment } from './environment.js';
import type { Random } from './random.js';

/** Training rows, or the rows held out from them. */
export type Split = 'train' | 'test';

/**
 * Rows in a seeded random order. A position alone says which row stands there, so a run resumes at the position
 * where it stopped.
 */
export interface RowSource<Row = unknown> {
  /** How many different positions there are before rows come again; absent where rows are generated without end. */
  readonly size?: number;
  /** Equal for equal rows in equal order: a resumed run compares it with the one it stored. */
  readonly fingerprint: string;
  /** Works out `fingerprint` while the event loop goes on; without it, reading it may take a while. */
  prepare?(): Promise<void>;
  /**
   * The row at a position; a finite source goes on with a new order after `size` positions.
   *
   * @param position non-negative integer
   */
  at(position: number): Row;
}

/** A row of a file, or why it is none. `where` names the file and the line or row, as in "a.jsonl, line 3". */
export type LoadedRow<Row = unknown> =
  | { readonly number: number; readonly where: string; readonly row: Row }
  | { readonly number: number; readonly where: string; readonly problem: string };

export interface RowCheck<Row = unknown> {
  /** What is checked, as in "solver agrees". */
  readonly name: string;
  /** What is wrong with the row, undefined where nothing is. */
  find(row: Row): string | undefined | Promise<string | undefined>;
}

/** What a model is trained on: rows, the prompt that each becomes, and the reward of a completion. */
export interface Task<Row = unknown> {
  readonly name: string;
  /** The options that it was opened with, defaults included. */
  readonly options: Readonly<Record<string, unknown>>;
  readonly spec: RewardSpec<Row>;
  /** The conversation so far. The motivation is a paragraph of its own at the end of the system message. */
  messages(row: Row, motivation: MotivationView): ChatMessage[];
  /**
   * The task's own rows: generated, or read when the task was made. No row of one split occurs in the other,
   * by `identity`.
   */
  rows(options: { readonly split: Split; readonly seed: number | bigint }): RowSource<Row>;
  /** Every row of a .jsonl or .parquet file in its order, those that cannot be read with the reason. */
  read(file: string): Promise<LoadedRow<Row>[]>;
  /** Every row of a file. @throws MerfError MALFORMED_FILE that names the first line or row that cannot be read */
  load(file: string): Promise<Row[]>;
  /**
   * Equal for rows that the task takes for the same: no such rows stand on both sides of a split, and what is
   * measured on them is not independent.
   */
  identity(row: Row): string;
  /** A completion that gets the highest total. */
  reference?(row: Row): string;
  /**
   * A completion with worked reasoning that gets the highest total, for supervised warm starts; `random` draws one where
   * there are several.
   */
  demonstrate?(row: Row, random?: Random): string;
  /** What answers the model's turns, where an episode has several. */
  readonly environment?: Environment<Row>;
  /** What `merf verify` finds out about a row beyond the reference answer. */
  readonly check?: RowCheck<Row>;
}
