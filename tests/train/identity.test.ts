import { mkdirSync, rmSync, symlinkSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterAll, beforeAll, expect, test } from '@jest/globals';
import { openModel } from '../../lib/policy/index.js';
import { fingerprint } from '../../lib/train/identity.js';
import { modelIdentity } from '../../lib/train/trainer.js';
import { expectFailure, temporaryDirectory, tokenizerFiles, writeTinyModel } from '../policy/helpers.js';

let directory: { path: string; remove: () => void };
beforeAll(() => {
  directory = temporaryDirectory();
});
afterAll(() => directory.remove());

test('a model is told by the files that are read, whatever stands beside them', async () => {
  const path = writeTinyModel(join(directory.path, 'model'));
  const before = modelIdentity(await openModel(path));
  expect(before.model).toMatch(/^[0-9a-f]{16}$/);
  writeFileSync(join(path, '.DS_Store'), 'x');
  writeFileSync(join(path, 'README.md'), 'x');
  symlinkSync(join(path, 'nowhere'), join(path, 'dangling'));
  mkdirSync(join(path, 'logs'));
  expect(modelIdentity(await openModel(path))).toEqual(before);
  expect(modelIdentity(await openModel(writeTinyModel(join(directory.path, 'another'))))).toEqual(before);

  const config = { ...tokenizerFiles().config, model_max_length: 7 };
  writeFileSync(join(path, 'tokenizer_config.json'), JSON.stringify(config));
  const changed = modelIdentity(await openModel(path));
  expect(changed).not.toEqual(before);
  // A file that was not there before and is read counts.
  writeFileSync(join(path, 'special_tokens_map.json'), '{}');
  expect(modelIdentity(await openModel(path))).not.toEqual(changed);
});

test('a model that is gone, or has none, has no identity, and its files no fingerprint', async () => {
  const path = writeTinyModel(join(directory.path, 'gone'));
  const files = await openModel(path);
  rmSync(path, { recursive: true });
  expect(modelIdentity(files)).toEqual({});
  expect(modelIdentity({})).toEqual({});
  await expectFailure(() => fingerprint(files.files), 'FILE_NOT_FOUND', 'config.json');
});
