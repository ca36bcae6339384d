import { createHash } from 'node:crypto';
import { readFileSync } from 'node:fs';
import { provide } from './host.js';

provide({
  sha256() {
    const hash = createHash('sha256');
    return { update: (text) => void hash.update(text), digest: () => hash.digest() };
  },
  readText: (path) => readFileSync(path, 'utf8'),
});
