import { readFileSync } from 'node:fs';
import { fileURLToPath } from 'node:url';

export function fixturePath(name: string): string {
  return fileURLToPath(new URL(`../fixtures/${name}`, import.meta.url));
}

export function readJson<T>(name: string): T {
  return JSON.parse(readFileSync(fixturePath(name), 'utf8')) as T;
}

export interface FixtureTensor {
  shape: number[];
  /** Values of F32 tensors, bytes of U8 tensors. */
  data: Float32Array | Uint8Array;
  /** The place of its bytes in the file. */
  offset: number;
  byteLength: number;
}

/** The tensors of a safetensors fixture; apart from the package's own reader, so that neither vouches for itself. */
export function readTensors(path: string): Map<string, FixtureTensor> {
  const file = readFileSync(path);
  const headerBytes = Number(file.readBigUInt64LE(0));
  const header = JSON.parse(file.toString('utf8', 8, 8 + headerBytes)) as Record<
    string,
    { dtype: string; shape: number[]; data_offsets: [number, number] }
  >;
  const tensors = new Map<string, FixtureTensor>();
  for (const [name, { dtype, shape, data_offsets }] of Object.entries(header)) {
    if (name === '__metadata__') continue;
    const [begin, end] = data_offsets;
    const offset = 8 + headerBytes + begin;
    const bytes = new Uint8Array(file.subarray(offset, 8 + headerBytes + end));
    if (dtype !== 'F32' && dtype !== 'U8') throw new Error(`${path}: ${name} is ${dtype}`);
    const data = dtype === 'F32' ? new Float32Array(bytes.buffer) : bytes;
    tensors.set(name, { shape, data, offset, byteLength: end - begin });
  }
  return tensors;
}
