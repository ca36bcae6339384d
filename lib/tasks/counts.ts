import * as z from 'zod';

/**
 * An option of counts: a number, several, or words such as "3", "3-7" or "2,4"; its value are the counts in ascending
 * order.
 * @param expected what the message about any other value says
 */
export function countsOption(least: number, most: number, expected: string) {
  return z.union([z.int(), z.string(), z.array(z.int())], expected).transform((given, context) => {
    const counts = typeof given === 'string' ? countsIn(given, most) : [given].flat();
    if (counts.length > 0 && counts.every((n) => Number.isInteger(n) && n >= least && n <= most)) {
      return [...new Set(counts)].sort((a, b) => a - b);
    }
    context.addIssue({ code: 'custom', message: expected });
    return z.NEVER;
  });
}

/** The counts that a text names, NaN where it names none or more than `most`. */
function countsIn(text: string, most: number): number[] {
  return text.split(',').flatMap((part) => {
    const match = /^\s*(\d+)\s*(?:-\s*(\d+)\s*)?$/.exec(part);
    const first = Number(match?.[1]);
    const last = Number(match?.[2] ?? match?.[1]);
    if (!(last <= most && first <= last)) return [Number.NaN];
    return Array.from({ length: last - first + 1 }, (_, i) => first + i);
  });
}
