import { existsSync, readFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { MerfError } from './errors.js';

/** The folder of the package, whether it runs from its sources or from what was built of them. */
export function packageRoot(): string {
  let folder = dirname(fileURLToPath(import.meta.url));
  for (;;) {
    const manifest = join(folder, 'package.json');
    if (
      existsSync(manifest) &&
      (JSON.parse(readFileSync(manifest, 'utf8')) as { name?: string }).name === 'merf'
    ) {
      return folder;
    }
    const parent = dirname(folder);
    if (parent === folder) throw new MerfError('INTERNAL', 'Cannot find the folder of the package merf');
    folder = parent;
  }
}
