// `npm run fuzz`: gives every reader of files and text from outside inputs that nobody would write.
import { spawnSync } from 'node:child_process';
import { bootstrap, root } from './bootstrap.mjs';

if (!process.argv.includes('--help')) bootstrap();
const fuzz = spawnSync(process.execPath, ['--import', 'tsx', 'scripts/fuzz.ts', ...process.argv.slice(2)], {
  cwd: root,
  stdio: 'inherit',
});
process.exitCode = fuzz.status ?? 1;
