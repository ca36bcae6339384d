import { createRequire } from 'node:module';
import { dirname, join } from 'node:path';

/** The package's folder. */
export const root = dirname(createRequire(import.meta.url).resolve('merf/package.json'));

/** The path of a program of benchmarks/CMakeLists.txt, which only a clone has built. */
export const programPath = (name: string) => join(root, 'build', 'Release', name);

/** The folder in which `npm run bench` puts the peers that it brings. */
export const peersFolder = join(root, 'build', 'peers');

export const say = (line: string) => process.stderr.write(`${line}\n`);
