import { createHash } from 'node:crypto';
import { closeSync, fstatSync, openSync, readSync } from 'node:fs';
import { basename } from 'node:path';
import { MerfError } from '../errors.js';

const blockBytes = 1 << 16;
const sampledBlocks = 64;

/**
 * A hash that tells files apart by content: names where they are several, sizes and, of each file, everything up to
 * 4 MiB or else 64 blocks spread evenly over it, so that weights of many gigabytes take milliseconds.
 * @throws MerfError FILE_NOT_FOUND
 */
export function fingerprint(paths: readonly string[]): string {
  const hash = createHash('sha256');
  const block = Buffer.alloc(blockBytes);
  for (const path of [...paths].sort()) {
    if (paths.length > 1) hash.update(`${basename(path)}\0`);
    try {
      const descriptor = openSync(path, 'r');
      try {
        const { size } = fstatSync(descriptor);
        hash.update(`${size}\0`);
        const blocks = Math.ceil(size / blockBytes);
        const count = Math.min(blocks, sampledBlocks);
        for (let i = 0; i < count; i++) {
          const index = count === 1 ? 0 : Math.round((i * (blocks - 1)) / (count - 1));
          const read = readSync(descriptor, block, 0, blockBytes, index * blockBytes);
          hash.update(block.subarray(0, read));
        }
      } finally {
        closeSync(descriptor);
      }
    } catch (error) {
      throw new MerfError('FILE_NOT_FOUND', `${path} cannot be read: ${(error as Error).message}`, {
        cause: error,
      });
    }
  }
  return hash.digest('hex').slice(0, 16);
}

/** Tells values apart by content, wherever they came from. */
export function contentHash(values: Iterable<unknown>): string {
  const hash = createHash('sha256');
  for (const value of values) {
    hash
      .update(JSON.stringify(value, (_, v) => (typeof v === 'bigint' ? String(v) : v)) ?? 'undefined')
      .update('\n');
  }
  return hash.digest('hex').slice(0, 16);
}
