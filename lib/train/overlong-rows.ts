import { MerfError, throwIfAborted } from '../errors.js';
import { Slices } from '../slices.js';
import { placeOf } from '../tasks/dataset.js';
import type { TrainingEvent } from './loop.js';

export interface OverlongOptions<Item> {
  /** What is measured, as in "prompts". */
  readonly what: string;
  readonly count: number;
  /** Tokens of an item that is too long; undefined of one that is not. */
  readonly measure: (item: Item) => number | undefined;
  readonly contextLength: number;
  /** Whether items that are too long are left out, and the setting that says so. */
  readonly filter: boolean;
  readonly setting: string;
  readonly onEvent?: ((event: TrainingEvent) => void) | undefined;
  readonly signal?: AbortSignal | undefined;
}

const secondsToFirstNotice = 2;
const secondsBetweenNotices = 10;
const placesNamed = 3;

/**
 * The items that are too long for the context, found while the event loop goes on: before a run begins, not in the
 * night.
 *
 * @throws MerfError CONTEXT_EXCEEDED that names where they stand, unless they are left out; EMPTY_DATASET where none is
 *   left; ABORTED
 */
export async function findOverlong<Item>(
  items: Iterable<Item>,
  options: OverlongOptions<Item>,
): Promise<Set<Item>> {
  const { what, count, measure, contextLength, filter, setting, onEvent, signal } = options;
  const found = new Map<Item, number>();
  const slices = new Slices();
  let measured = 0;
  let next = performance.now() + secondsToFirstNotice * 1000;
  for (const item of items) {
    const tokens = measure(item);
    if (tokens !== undefined) found.set(item, tokens);
    measured += 1;
    if (!slices.isOver()) continue;
    await slices.next();
    throwIfAborted(signal, `measuring ${what}`);
    if (performance.now() < next) continue;
    next = performance.now() + secondsBetweenNotices * 1000;
    onEvent?.({ type: 'notice', message: `Measured ${measured} of ${count} ${what}` });
  }
  if (found.size === 0) return new Set();
  const where = [...found].map(([item, tokens]) => `${nameOf(item)} has ${tokens} tokens`);
  where.sort((a, b) => a.localeCompare(b, 'en', { numeric: true }));
  const others = where.length > placesNamed ? ` and ${where.length - placesNamed} others` : '';
  const places = `${where.slice(0, placesNamed).join(', ')}${others}`;
  const all = `Expected ${what} that fit into the model's context of ${contextLength} tokens but ${places}`;
  if (!filter) throw new MerfError('CONTEXT_EXCEEDED', `${all}: ${setting} leaves such rows out`);
  if (measured === found.size) throw new MerfError('EMPTY_DATASET', `${all}, which leaves no row`);
  onEvent?.({
    type: 'notice',
    message: `Left out ${found.size} of ${count} ${what}, too long for a context of ${contextLength} tokens: ${places}`,
  });
  return new Set(found.keys());
}

/** Where a row stands in its file, or else how it begins. */
function nameOf(item: unknown): string {
  return placeOf(item) ?? `the one of ${(JSON.stringify(item) ?? String(item)).slice(0, 80)}`;
}
