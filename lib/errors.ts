import { withControlsShown } from './control-characters.js';

/** What went wrong, stable across versions: branch on it instead of on the message. */
export type MerfErrorCode =
  | 'INVALID_ARGUMENT'
  | 'INVALID_CONFIG'
  | 'FILE_NOT_FOUND'
  /** A file or folder that is there cannot be read, or one cannot be written for want of a disk with room for it. */
  | 'FILE_FAILED'
  | 'MALFORMED_FILE'
  | 'UNSUPPORTED'
  | 'CONTEXT_EXCEEDED'
  | 'DISPOSED'
  | 'ABORTED'
  | 'NON_FINITE'
  | 'VERIFIER_FAILED'
  | 'VERIFIER_TIMEOUT'
  /** A task's environment threw, or gave what is no reply, and the run ends on that by its settings. */
  | 'ENVIRONMENT_FAILED'
  | 'ENVIRONMENT_TIMEOUT'
  | 'EMPTY_DATASET'
  /** The device cannot be used here; the message says what it lacks. */
  | 'DEVICE_UNAVAILABLE'
  /** A GPU refused a call or failed at it; others go on. */
  | 'DEVICE_FAILED'
  /**
   * A GPU failed for good (an illegal address, an uncorrectable memory error, ...). The message names the first
   * failure, however many calls have failed since. What the GPU held is lost, and this process cannot use it again.
   */
  | 'DEVICE_LOST'
  /** The device lacks memory. What the call took was given back, and the message says what would have fitted. */
  | 'OUT_OF_MEMORY'
  | 'RESUME_MISMATCH'
  | 'BUSY'
  | 'NATIVE_MISSING'
  | 'INTERNAL';

const codes: ReadonlySet<string> = new Set<MerfErrorCode>([
  'INVALID_ARGUMENT',
  'INVALID_CONFIG',
  'FILE_NOT_FOUND',
  'FILE_FAILED',
  'MALFORMED_FILE',
  'UNSUPPORTED',
  'CONTEXT_EXCEEDED',
  'DISPOSED',
  'ABORTED',
  'NON_FINITE',
  'VERIFIER_FAILED',
  'VERIFIER_TIMEOUT',
  'ENVIRONMENT_FAILED',
  'ENVIRONMENT_TIMEOUT',
  'EMPTY_DATASET',
  'DEVICE_UNAVAILABLE',
  'DEVICE_FAILED',
  'DEVICE_LOST',
  'OUT_OF_MEMORY',
  'RESUME_MISMATCH',
  'BUSY',
  'NATIVE_MISSING',
  'INTERNAL',
]);

export function isMerfErrorCode(code: unknown): code is MerfErrorCode {
  return typeof code === 'string' && codes.has(code);
}

/**
 * Every failure that merf reports itself. The message names the argument, file or key, what was there and what was expected;
 * control characters in it, as a file's name may hold, are written out.
 */
export class MerfError extends Error {
  override readonly name = 'MerfError';
  readonly code: MerfErrorCode;

  constructor(code: MerfErrorCode, message: string, options?: { cause?: unknown }) {
    super(withControlsShown(message), options);
    this.code = code;
  }

  /** Errors of another copy of this library count as well: a task's module may have brought its own. */
  static override [Symbol.hasInstance](value: unknown): boolean {
    const { name, code } = (value ?? {}) as { name?: unknown; code?: unknown };
    return name === 'MerfError' && isMerfErrorCode(code);
  }
}

/** Whether the device that the work ran on is lost, and all that was on it. */
export function isDeviceLost(error: unknown): error is MerfError {
  return error instanceof MerfError && error.code === 'DEVICE_LOST';
}

/** `value` as an error message shows it: short, with its type where the value alone does not say it. */
export function describeValue(value: unknown): string {
  if (value === null || value === undefined || typeof value === 'boolean' || typeof value === 'bigint') {
    return String(value);
  }
  if (typeof value === 'number') return String(value);
  if (typeof value === 'string') {
    return value.length > 60
      ? `${JSON.stringify(value.slice(0, 60))}… of type string`
      : `${JSON.stringify(value)} of type string`;
  }
  if (typeof value === 'function') return `function ${value.name || '(anonymous)'}`;
  if (Array.isArray(value)) return `array of length ${value.length}`;
  // Data from outside may have keys of this name.
  const named: unknown = (value as object).constructor?.name;
  const constructorName = typeof named === 'string' ? named : undefined;
  if (ArrayBuffer.isView(value) && 'length' in value)
    return `${constructorName} of length ${String(value.length)}`;
  return `${typeof value} of type ${constructorName ?? 'Object'}`;
}

/** The error of one form for arguments: "Expected <expected> for <argument> but received <value>". */
export function invalidArgument(argument: string, expected: string, value: unknown): MerfError {
  return new MerfError(
    'INVALID_ARGUMENT',
    `Expected ${expected} for ${argument} but received ${describeValue(value)}`,
  );
}

/** Throws ABORTED where the signal has fired; `what` names the work, as in "sampling". */
export function throwIfAborted(signal: AbortSignal | undefined, what: string): void {
  if (signal?.aborted) throw new MerfError('ABORTED', `${what} was aborted`, { cause: signal.reason });
}
