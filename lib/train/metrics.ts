import { appendFileSync, existsSync, readFileSync } from 'node:fs';
import { whileReading, whileWriting, writeFileAtomically } from '../atomic-files.js';
import { MerfError } from '../errors.js';

/** One line of metrics.jsonl: a step and its numbers. Values that are not finite are written as null. */
export interface MetricsRow {
  step: number;
  [key: string]: unknown;
}

/** Appends to a metrics.jsonl or a motivation.jsonl, one JSON object a line, one line a step. */
export class MetricsLog {
  readonly path: string;

  constructor(path: string) {
    this.path = path;
  }

  append(row: MetricsRow): void {
    whileWriting(this.path, () => appendFileSync(this.path, `${JSON.stringify(row)}\n`));
  }

  /** Drops the rows after `step`, and a last line that a killed process left unfinished. */
  truncate(step: number): void {
    if (!existsSync(this.path)) return;
    const kept = whileReading(this.path, () => readFileSync(this.path, 'utf8'))
      .split('\n')
      .filter((line) => {
        const row = parseRow(line);
        return row !== undefined && row.step <= step;
      });
    writeFileAtomically(this.path, kept.map((line) => `${line}\n`).join(''));
  }
}

/** The rows of a metrics.jsonl. Throws FILE_NOT_FOUND, or MALFORMED_FILE with the number of the line. */
export function readMetrics(path: string): MetricsRow[] {
  if (!existsSync(path)) throw new MerfError('FILE_NOT_FOUND', `No metrics file at ${path}`);
  const rows: MetricsRow[] = [];
  const lines = whileReading(path, () => readFileSync(path, 'utf8')).split('\n');
  for (const [index, line] of lines.entries()) {
    if (line === '') continue;
    const row = parseRow(line);
    if (row === undefined)
      throw new MerfError('MALFORMED_FILE', `${path}: line ${index + 1} is not a row of metrics`);
    rows.push(row);
  }
  return rows;
}

function parseRow(line: string): MetricsRow | undefined {
  try {
    const row: unknown = JSON.parse(line);
    if (typeof row === 'object' && row !== null && typeof (row as MetricsRow).step === 'number')
      return row as MetricsRow;
  } catch {
    // A process killed in mid-write leaves half a line.
  }
  return undefined;
}
