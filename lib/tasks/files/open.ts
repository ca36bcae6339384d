import { type FileHandle, open } from 'node:fs/promises';
import { MerfError } from '../../errors.js';

const sniffedBytes = 256;

/** A data file that is open for reading. */
export interface OpenDataFile {
  readonly handle: FileHandle;
  /** Bytes of the whole file. */
  readonly size: number;
  /** What the file begins with, 256 bytes at most. */
  readonly head: Buffer;
}

/**
 * Opens a data file and looks at its beginning.
 *
 * @throws MerfError FILE_NOT_FOUND, MALFORMED_FILE for the pointer that Git LFS leaves in a file's place
 */
export async function openDataFile(file: string): Promise<OpenDataFile> {
  let handle: FileHandle | undefined;
  try {
    handle = await open(file, 'r');
    const { size } = await handle.stat();
    const buffer = Buffer.alloc(sniffedBytes);
    const { bytesRead } = await handle.read(buffer, 0, sniffedBytes, 0);
    const head = buffer.subarray(0, bytesRead);
    if (head.toString('latin1').startsWith('version https://git-lfs.github.com/spec/')) {
      throw new MerfError(
        'MALFORMED_FILE',
        `${file} is the pointer of a file in Git LFS, not the file: fetch it with git lfs pull`,
      );
    }
    return { handle, size, head };
  } catch (cause) {
    await handle?.close();
    throw cause instanceof MerfError ? cause : cannotRead(file, cause);
  }
}

export function cannotRead(file: string, cause: unknown): MerfError {
  const { code } = cause as NodeJS.ErrnoException;
  const reason = code === 'ENOENT' ? 'there is no such file' : String(cause);
  return new MerfError('FILE_NOT_FOUND', `Cannot read the data set ${file}: ${reason}`, { cause });
}
