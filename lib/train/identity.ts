import { createHash } from 'node:crypto';
import { closeSync, existsSync, openSync, readdirSync, readSync, statSync } from 'node:fs';
import { basename, join } from 'node:path';
import { MerfError } from '../errors.js';

const blockBytes = 1 << 16;
const sampledBlocks = 64;

/**
 * A hash that tells files and folders apart by content: names, sizes and, of each file, everything up to 4 MiB or
 * else 64 blocks spread evenly over it, so that weights of many gigabytes take milliseconds.
 */
export function fingerprint(path: string): string {
  if (!existsSync(path)) throw new MerfError('FILE_NOT_FOUND', `No such file or folder: ${path}`);
  const hash = createHash('sha256');
  const files = statSync(path).isDirectory()
    ? readdirSync(path)
        .filter((name) => statSync(join(path, name)).isFile())
        .sort()
        .map((name) => join(path, name))
    : [path];
  const block = Buffer.alloc(blockBytes);
  for (const file of files) {
    const size = statSync(file).size;
    if (files.length > 1) hash.update(`${basename(file)}\0`);
    hash.update(`${size}\0`);
    const blocks = Math.ceil(size / blockBytes);
    const count = Math.min(blocks, sampledBlocks);
    const descriptor = openSync(file, 'r');
    try {
      for (let i = 0; i < count; i++) {
        const index = count === 1 ? 0 : Math.round((i * (blocks - 1)) / (count - 1));
        const read = readSync(descriptor, block, 0, blockBytes, index * blockBytes);
        hash.update(block.subarray(0, read));
      }
    } finally {
      closeSync(descriptor);
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
