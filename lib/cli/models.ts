import { existsSync, readFileSync } from 'node:fs';
import { dirname, join, relative, resolve } from 'node:path';
import { fileURLToPath } from 'node:url';
import { MerfError } from '../errors.js';

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

/** The small model that ships with merf. Throws FILE_NOT_FOUND where it is missing. */
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

/** The path of a model as the user named it: of a run's folder, the model that the run saved. */
export function resolveModel(path: string | undefined): string {
  if (path === undefined) return defaultModel();
  const absolute = resolve(path);
  if (!existsSync(absolute)) throw new MerfError('FILE_NOT_FOUND', `No model at ${path}`);
  const isRun = existsSync(join(absolute, 'run.json')) && !existsSync(join(absolute, 'config.json'));
  if (!isRun) return absolute;
  const saved = join(absolute, 'model');
  if (existsSync(saved)) return saved;
  throw new MerfError(
    'FILE_NOT_FOUND',
    `The run in ${path} has not saved a model yet: resume it to its end first`,
  );
}

/** `path` as one would type it here. */
export function shortPath(path: string): string {
  const short = relative(process.cwd(), path);
  return short !== '' && !short.startsWith('..') ? short : path;
}
