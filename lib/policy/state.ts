import { createHash } from 'node:crypto';
import { createReadStream } from 'node:fs';
import { join } from 'node:path';
import { writeFolderAtomically } from '../atomic-files.js';
import { MerfError, throwIfAborted } from '../errors.js';
import type { NativeModel } from '../native.js';
import {
  Fields,
  fileSize,
  malformed,
  parseJsonObject,
  readRange,
  readTextIfPresent,
  unreadable,
} from './files.js';
import { readSafetensorsHeader } from './safetensors.js';
import { writeJson, writeSafetensors } from './save.js';

const format = 'merf-training-state';
const version = 1;
const kinds = ['value', 'adam_m', 'adam_v'] as const;

/** float32 master weights of what is trained, AdamW's moments and its step: what makes a run go on bit for bit. */
export async function saveState(
  directory: string,
  model: NativeModel,
  config: object,
  signal?: AbortSignal,
): Promise<void> {
  await writeFolderAtomically(
    directory,
    async (beside) => {
      const trained = model.parameters().filter((parameter) => parameter.trained);
      const tensors = kinds.flatMap((kind) =>
        trained.map(({ name, shape }) => ({
          name: `${kind}.${name}`,
          shape,
          dtype: 'F32' as const,
          read: () => model.readTensor(name, kind),
        })),
      );
      const written = await writeSafetensors(join(beside, 'state.safetensors'), tensors, { format }, signal);
      await writeJson(join(beside, 'state.json'), {
        format,
        version,
        optimizerStep: model.optimizerStep,
        model: config,
        ...written,
      });
    },
    () => true,
  );
}

/**
 * Everything is checked, the digest of all bytes included, before the model is touched.
 * @throws MerfError FILE_NOT_FOUND, MALFORMED_FILE, RESUME_MISMATCH
 */
export async function loadState(
  directory: string,
  model: NativeModel,
  config: object,
  signal?: AbortSignal,
): Promise<void> {
  const path = join(directory, 'state.json');
  const text = await readTextIfPresent(path);
  if (text === undefined)
    throw new MerfError('FILE_NOT_FOUND', `Expected a training state but ${path} does not exist`);
  const json = parseJsonObject(path, text);
  const fields = new Fields(path, (key) => json[key]);
  if (fields.string('format') !== format)
    throw malformed(path, `expected format ${format} but found ${fields.string('format')}`);
  const found = fields.integer('version', 1, Number.MAX_SAFE_INTEGER);
  if (found !== version) {
    throw new MerfError(
      'RESUME_MISMATCH',
      `${path}: expected version ${version} of the state but found ${found}`,
    );
  }
  const step = fields.integer('optimizerStep', 0, Number.MAX_SAFE_INTEGER);
  compareModels(path, json.model, config);

  const weights = join(directory, 'state.safetensors');
  const size = await fileSize(weights);
  const bytes = fields.integer('bytes', 0, Number.MAX_SAFE_INTEGER);
  if (size !== bytes)
    throw malformed(weights, `expected ${bytes} bytes, as state.json says, but found ${size}`);
  const digest = await digestOf(weights, signal);
  if (digest !== fields.string('sha256')) {
    throw malformed(
      weights,
      `expected SHA-256 ${fields.string('sha256')}, as state.json says, but found ${digest}`,
    );
  }
  const header = await readSafetensorsHeader(weights);
  const parameters = model.parameters().filter((parameter) => parameter.trained);
  const stored = (kind: string, name: string) => {
    const tensor = header.get(`${kind}.${name}`);
    if (tensor?.dtype !== 'F32')
      throw malformed(weights, `expected a float32 tensor ${kind}.${name} but there is none`);
    return tensor;
  };
  for (const { name, shape } of parameters) {
    for (const kind of kinds) {
      const tensor = stored(kind, name);
      if (String(tensor.shape) !== String(shape)) {
        throw malformed(
          weights,
          `tensor ${kind}.${name}: expected shape [${shape}] but found [${tensor.shape}]`,
        );
      }
    }
  }

  for (const { name } of parameters) {
    for (const kind of kinds) {
      const { offset, byteLength } = stored(kind, name);
      const data = await readRange(weights, offset, byteLength);
      await model.writeTensor(name, kind, new Float32Array(data.buffer));
    }
  }
  model.setOptimizerStep(step);
}

function compareModels(path: string, stored: unknown, config: object): void {
  if (typeof stored !== 'object' || stored === null) throw malformed(path, 'expected an object for model');
  const [found, wanted] = [stored, config] as Record<string, unknown>[];
  for (const key of new Set([...Object.keys(config), ...Object.keys(stored)])) {
    const [value, expected] = [found?.[key], wanted?.[key]];
    if (JSON.stringify(value) !== JSON.stringify(expected)) {
      throw new MerfError(
        'RESUME_MISMATCH',
        `${path}: the state is of another model: expected ${key} ${JSON.stringify(expected)} but found ${JSON.stringify(value)}`,
      );
    }
  }
}

async function digestOf(path: string, signal: AbortSignal | undefined): Promise<string> {
  const hash = createHash('sha256');
  try {
    for await (const chunk of createReadStream(path, { highWaterMark: 1 << 20 })) {
      throwIfAborted(signal, 'loading the state');
      hash.update(chunk as Buffer);
    }
  } catch (error) {
    throw unreadable(path, error);
  }
  return hash.digest('hex');
}
