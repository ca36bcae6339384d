import { existsSync } from 'node:fs';
import { join, relative, resolve } from 'node:path';
import { MerfError } from '../errors.js';
import { defaultModel } from '../policy/index.js';

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
