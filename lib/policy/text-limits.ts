import vm from 'node:vm';
import { malformed, unsupported } from './files.js';
import { SplitPreTokenizer } from './huggingface-tokenizers.js';

const maxPatternLength = 10_000;
/** What a pattern may take on the probes, and on a text before its length is counted. */
const probeMilliseconds = 2_000;
const baseMilliseconds = 5_000;
const millisecondsACharacter = 0.05;

/** Texts on which patterns that try every way of dividing a run of one character take for ever. */
const probes = ['a', 'A', '0', ' ', '\n', '.', '_', 'é', '中'].map((letter) => `${letter.repeat(64)}\u0001`);

/** Patterns that are known to take time in proportion to the text. */
const wellKnown: ReadonlySet<string> = new Set([
  "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+",
  ...['\\p{N}{1,3}', '\\p{N}'].flatMap((numbers) =>
    ["(?i:'s|'t|'re|'ve|'m|'ll|'d)", "(?i)'s|'t|'re|'ve|'m|'ll|'d"].map(
      (contractions) =>
        `${contractions}|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|${numbers}` +
        '| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+',
    ),
  ),
  '\\p{N}',
  '\\p{N}{1,3}',
  ' ',
]);

/** A regular expression of a tokenizer file, and whether it needs a watch over its time. */
export interface Pattern {
  readonly expression: RegExp;
  readonly watched: boolean;
}

/**
 * The JavaScript form of a pattern of a tokenizer file, which is in Oniguruma's syntax.
 * @throws MerfError UNSUPPORTED where JavaScript cannot say it, MALFORMED_FILE where it never ends
 */
export function compilePattern(source: string, path: string): Pattern {
  const shown = JSON.stringify(source.slice(0, 80));
  if (source.length > maxPatternLength) {
    throw malformed(path, `the pattern ${shown}… is longer than ${maxPatternLength} characters`);
  }
  let expression: RegExp | null;
  try {
    const split = { type: 'Split', pattern: { Regex: source }, behavior: 'Isolated', invert: false };
    expression = new SplitPreTokenizer(split).pattern;
  } catch (error) {
    throw unsupported(path, `the pattern ${shown} cannot be read: ${(error as Error).message}`);
  }
  if (expression === null) throw malformed(path, `expected a pattern but found ${shown}`);
  const compiled = expression;
  const watched = !wellKnown.has(source);
  if (watched) {
    try {
      within(probeMilliseconds, () => {
        for (const probe of probes) for (const _ of probe.matchAll(compiled)) void _;
      });
    } catch (error) {
      const reason =
        error instanceof TookTooLong ? 'it takes for ever on some texts' : (error as Error).message;
      throw malformed(path, `the pattern ${shown} cannot be used: ${reason}`, error);
    }
  }
  return { expression: compiled, watched };
}

/** Milliseconds that patterns may take on a text. */
export function patternMilliseconds(textLength: number): number {
  return Math.ceil(baseMilliseconds + millisecondsACharacter * textLength);
}

export class TookTooLong extends Error {}

const sandbox = vm.createContext({ work: undefined });
const script = new vm.Script('work()');

/** A run that got less than this share of a processor says more about the machine than about the work. */
const shareOfProcessor = 0.5;
const maxRuns = 8;

/**
 * Runs `work`, which the engine ends after `milliseconds`, in the middle of a regular expression if need be. Work that
 * was ended while the machine gave its time to others is run anew, so it must not leave anything behind.
 * @throws TookTooLong
 */
export function within<T>(milliseconds: number, work: () => T): T {
  const start = process.cpuUsage();
  for (let run = 1; ; ++run) {
    sandbox.work = work;
    const before = process.cpuUsage();
    try {
      return script.runInContext(sandbox, { timeout: milliseconds }) as T;
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== 'ERR_SCRIPT_EXECUTION_TIMEOUT') throw error;
      const isBusy = millisecondsSince(before) > shareOfProcessor * milliseconds;
      if (run === maxRuns || isBusy || millisecondsSince(start) > milliseconds) {
        throw new TookTooLong(`it took longer than ${milliseconds} ms`);
      }
    } finally {
      sandbox.work = undefined;
    }
  }
}

function millisecondsSince(earlier: NodeJS.CpuUsage): number {
  const { user, system } = process.cpuUsage(earlier);
  return (user + system) / 1000;
}
