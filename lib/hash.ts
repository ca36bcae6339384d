import { sha256 as portableSha256 } from '@noble/hashes/sha2.js';
import { bytesToHex, utf8ToBytes } from '@noble/hashes/utils.js';
import { host, type Sha256 } from './host.js';

/** A SHA-256 of texts in UTF-8, the platform's own where it has a quick one. */
export function sha256(): Sha256 {
  return host.sha256?.() ?? inJavaScript();
}

function inJavaScript(): Sha256 {
  const hash = portableSha256.create();
  return { update: (text) => void hash.update(utf8ToBytes(text)), digest: () => hash.digest() };
}

export function sha256Hex(text: string): string {
  const hash = sha256();
  hash.update(text);
  return bytesToHex(hash.digest());
}

export { bytesToHex };
