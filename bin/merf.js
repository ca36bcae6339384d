#!/usr/bin/env node
import { existsSync } from 'node:fs';

const entry = new URL('../dist/cli/index.js', import.meta.url);
if (existsSync(entry)) {
  const { main } = await import(entry.href);
  process.exitCode = await main(process.argv.slice(2));
} else {
  process.stderr.write(
    'merf is not built yet. In a clone of the repository run: node scripts/bootstrap.mjs\n',
  );
  process.exitCode = 1;
}
