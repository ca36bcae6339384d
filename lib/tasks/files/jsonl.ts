import { isUtf8 } from 'node:buffer';
import { MerfError } from '../../errors.js';
import { cannotRead, type OpenDataFile, openDataFile } from './open.js';

/** A line that is not blank, counted from 1; without its text where its bytes are no UTF-8. */
export interface Line {
  readonly number: number;
  readonly text: string | undefined;
}

// A piece is read between two turns of the event loop, and its lines are decoded in one go.
const pieceBytes = 1 << 18;
const mostLineBytes = 1 << 25;
const newline = 0x0a;

/**
 * The lines of a text file piece by piece, so that neither the file's size nor its length as a string is limited. A
 * byte order mark is left out.
 *
 * @throws MerfError FILE_NOT_FOUND, MALFORMED_FILE for UTF-16 and UTF-32 and for a line of more than 32 MiB
 */
export async function* readLines(file: string): AsyncGenerator<Line[]> {
  const opened = await openDataFile(file);
  try {
    checkEncoding(file, opened.head);
    yield* linesOf(file, opened);
  } finally {
    await opened.handle.close();
  }
}

async function* linesOf(file: string, { handle, head }: OpenDataFile): AsyncGenerator<Line[]> {
  const mark = head.length >= 3 && head.readUIntBE(0, 3) === 0xefbbbf ? 3 : 0;
  let position = mark;
  let begun: Buffer[] = [];
  let begunBytes = 0;
  let number = 1;
  for (;;) {
    const buffer = Buffer.allocUnsafe(pieceBytes);
    let bytesRead: number;
    try {
      ({ bytesRead } = await handle.read(buffer, 0, pieceBytes, position));
    } catch (cause) {
      throw cannotRead(file, cause);
    }
    position += bytesRead;
    const piece = buffer.subarray(0, bytesRead);
    const isLast = bytesRead === 0;
    const end = isLast ? 0 : piece.lastIndexOf(newline) + 1;
    if (isLast || end > 0) {
      const whole = Buffer.concat([...begun, piece.subarray(0, end)]);
      const lines = decode(whole);
      yield lines.flatMap((text, i) => (text?.trim() === '' ? [] : { number: number + i, text }));
      number += lines.length - 1;
      begun = [];
      begunBytes = 0;
    }
    if (isLast) return;
    begun.push(piece.subarray(end));
    begunBytes += bytesRead - end;
    if (begunBytes > mostLineBytes) {
      throw new MerfError(
        'MALFORMED_FILE',
        `${file}, line ${number}: Expected a line of at most ${mostLineBytes >> 20} MiB but it is longer`,
      );
    }
  }
}

function decode(bytes: Buffer): (string | undefined)[] {
  if (isUtf8(bytes)) return bytes.toString('utf8').split('\n');
  const lines: (string | undefined)[] = [];
  for (let start = 0; ; ) {
    const end = bytes.indexOf(newline, start);
    const line = bytes.subarray(start, end < 0 ? undefined : end);
    lines.push(isUtf8(line) ? line.toString('utf8') : undefined);
    if (end < 0) return lines;
    start = end + 1;
  }
}

/** Text in two or four bytes a character has a byte order mark or, where it begins with ASCII, zero bytes beside it. */
function checkEncoding(file: string, head: Buffer): void {
  const [a = -1, b = -1, c = -1, d = -1] = head;
  let encoding: string | undefined;
  if ((a === 0xff && b === 0xfe && c === 0 && d === 0) || (a === 0 && b === 0 && (c !== 0 || d !== 0))) {
    encoding = 'UTF-32';
  } else if ((a === 0xff && b === 0xfe) || (a === 0xfe && b === 0xff)) encoding = 'UTF-16';
  else if ((a > 0 && b === 0) || (a === 0 && b > 0)) encoding = c === 0 && d === 0 ? 'UTF-32' : 'UTF-16';
  if (encoding === undefined) return;
  throw new MerfError(
    'MALFORMED_FILE',
    `Expected UTF-8 in ${file} but it is ${encoding}: convert it with iconv -f ${encoding} -t UTF-8`,
  );
}
