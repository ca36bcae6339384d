/** A SHA-256 that is worked out piece by piece. */
export interface Sha256 {
  update(text: string): void;
  digest(): Uint8Array;
}

/** A row of a file before it is read: what `fields` throws is the row's problem. */
export interface UnreadRow {
  /** The file and the line or row, as in "a.jsonl, line 3". */
  readonly where: string;
  fields(): Readonly<Record<string, unknown>>;
}

/**
 * What a platform can do beyond JavaScript. Specifications, motivations, tasks and advantages run in browsers and edge
 * runtimes, so they import nothing of Node's and ask here. Node's modules put themselves in as they are imported, and
 * `merf` imports them all: `node-host.ts`, `reward/guard.ts` and `tasks/dataset.ts`.
 */
export interface Host {
  /** Ends work that outlasts its time, even in a loop that never yields; without it, such a loop goes on. */
  runWithin<T>(work: () => T | Promise<T>, seconds: number, signal?: AbortSignal): Promise<T>;
  /** A hash quicker than JavaScript's. */
  sha256(): Sha256;
  /** The text of a file. */
  readText(path: string): string;
  /** The rows of a data file, some at a time. */
  readRows(file: string): AsyncIterable<readonly UnreadRow[]>;
}

/** What this process has of it. */
export const host: Partial<Host> = {};

/** Puts in what the platform can do. */
export function provide(parts: Partial<Host>): void {
  Object.assign(host, parts);
}
