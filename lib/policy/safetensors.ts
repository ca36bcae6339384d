import { describeValue } from '../errors.js';
import { fileSize, lfsPointer, malformed, parseJsonObject, readRange } from './files.js';

/** One tensor of a file: `offset` and `byteLength` in bytes from the file's start. */
export interface StoredTensor {
  dtype: string;
  shape: number[];
  offset: number;
  byteLength: number;
}

export const safetensorsElementBytes: Readonly<Record<string, number>> = {
  F64: 8,
  F32: 4,
  F16: 2,
  BF16: 2,
  F8_E4M3: 1,
  F8_E5M2: 1,
  I64: 8,
  I32: 4,
  I16: 2,
  I8: 1,
  U64: 8,
  U32: 4,
  U16: 2,
  U8: 1,
  BOOL: 1,
};

const maxHeaderBytes = 100_000_000;

/**
 * The tensors of a .safetensors file. The header is held to the format's rules: every range inside the file, ranges
 * that neither overlap nor leave holes, and byte lengths that equal the product of the shape times the element size.
 * @throws MerfError FILE_NOT_FOUND, MALFORMED_FILE
 */
export async function readSafetensorsHeader(path: string): Promise<Map<string, StoredTensor>> {
  const size = await fileSize(path);
  if (size < 8)
    throw malformed(path, `expected a safetensors header of at least 8 bytes but the file has ${size}`);
  const lengthBytes = await readRange(path, 0, 8);
  const declared = new DataView(lengthBytes.buffer).getBigUint64(0, true);
  if (declared > BigInt(Math.min(maxHeaderBytes, size - 8))) {
    const pointer = await lfsPointer(path);
    if (pointer !== undefined) throw pointer;
    throw malformed(
      path,
      `expected a header of at most ${Math.min(maxHeaderBytes, size - 8)} bytes but the file declares ${declared}`,
    );
  }
  const headerBytes = Number(declared);
  const text = new TextDecoder().decode(await readRange(path, 8, headerBytes));
  const header = parseJsonObject(`${path} (header)`, text);
  const dataStart = 8 + headerBytes;
  const dataBytes = size - dataStart;

  const tensors = new Map<string, StoredTensor>();
  for (const [name, value] of Object.entries(header)) {
    if (name === '__metadata__') continue;
    tensors.set(name, parseEntry(path, name, value, dataStart, dataBytes));
  }
  let covered = dataStart;
  for (const [name, tensor] of [...tensors].sort((a, b) => a[1].offset - b[1].offset)) {
    if (tensor.byteLength === 0) continue;
    if (tensor.offset !== covered) {
      const fault = tensor.offset < covered ? 'overlaps the tensor before it' : 'leaves a hole before it';
      throw malformed(
        path,
        `tensor ${name} ${fault}: expected offset ${covered - dataStart} but found ${tensor.offset - dataStart}`,
      );
    }
    covered += tensor.byteLength;
  }
  if (covered !== size) {
    throw malformed(
      path,
      `the header describes ${covered - dataStart} bytes of tensors but the file holds ${dataBytes}`,
    );
  }
  return tensors;
}

function parseEntry(
  path: string,
  name: string,
  value: unknown,
  dataStart: number,
  dataBytes: number,
): StoredTensor {
  const entry = value as { dtype?: unknown; shape?: unknown; data_offsets?: unknown } | null;
  const wrong = (detail: string) => malformed(path, `tensor ${name}: ${detail}`);
  if (typeof entry !== 'object' || entry === null) throw wrong('expected an object in the header');
  const isKnown = typeof entry.dtype === 'string' && Object.hasOwn(safetensorsElementBytes, entry.dtype);
  const elementBytes = isKnown ? safetensorsElementBytes[entry.dtype as string] : undefined;
  if (elementBytes === undefined)
    throw wrong(`expected a dtype such as F32 but found ${describeValue(entry.dtype)}`);
  const isCount = (n: unknown): n is number => typeof n === 'number' && Number.isSafeInteger(n) && n >= 0;
  if (!Array.isArray(entry.shape) || entry.shape.length > 8 || !entry.shape.every(isCount)) {
    throw wrong(
      `expected a shape of up to 8 non-negative integers but found ${JSON.stringify(entry.shape)?.slice(0, 80)}`,
    );
  }
  const offsets = entry.data_offsets;
  if (!Array.isArray(offsets) || offsets.length !== 2 || !offsets.every(isCount)) {
    throw wrong(`expected data_offsets [begin, end] but found ${JSON.stringify(offsets)?.slice(0, 80)}`);
  }
  const [begin, end] = offsets as [number, number];
  if (begin > end || end > dataBytes) {
    throw wrong(`expected data_offsets within the ${dataBytes} bytes of data but found [${begin}, ${end}]`);
  }
  const shape = entry.shape as number[];
  const expected = shape.reduce((product, n) => product * n, elementBytes);
  if (expected !== end - begin) {
    throw wrong(
      `shape [${shape}] of ${String(entry.dtype)} takes ${expected} bytes but its data_offsets span ${end - begin}`,
    );
  }
  return { dtype: entry.dtype as string, shape, offset: dataStart + begin, byteLength: end - begin };
}

/** The header's bytes for tensors laid out in the order given, padded with spaces to a multiple of 8. */
export function safetensorsHeader(
  tensors: readonly { name: string; dtype: string; shape: readonly number[] }[],
  metadata: Record<string, string>,
): { bytes: Uint8Array; dataBytes: number } {
  const header: Record<string, unknown> = { __metadata__: metadata };
  let offset = 0;
  for (const { name, dtype, shape } of tensors) {
    const elementBytes = safetensorsElementBytes[dtype] as number;
    const byteLength = shape.reduce((product, n) => product * n, elementBytes);
    header[name] = { dtype, shape, data_offsets: [offset, offset + byteLength] };
    offset += byteLength;
  }
  const text = new TextEncoder().encode(JSON.stringify(header));
  const padded = Math.ceil(text.length / 8) * 8;
  const bytes = new Uint8Array(8 + padded).fill(0x20);
  new DataView(bytes.buffer).setBigUint64(0, BigInt(padded), true);
  bytes.set(text, 8);
  return { bytes, dataBytes: offset };
}
