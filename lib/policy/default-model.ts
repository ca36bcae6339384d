import { existsSync } from 'node:fs';
import { join } from 'node:path';
import { MerfError } from '../errors.js';
import { packageRoot } from '../package-root.js';

/** The path of the small model that ships with merf. @throws MerfError FILE_NOT_FOUND where it is missing */
export function defaultModel(): string {
  const path = join(packageRoot(), 'models', 'merf-mini');
  if (!existsSync(join(path, 'config.json'))) {
    throw new MerfError(
      'FILE_NOT_FOUND',
      `The model that ships with merf is missing from ${path}: name one with --model`,
    );
  }
  return path;
}
