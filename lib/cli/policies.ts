import { openModel, type Policy, Tokenizer } from '../policy/index.js';
import { resolveModel } from './paths.js';

/** The flags that choose a model and how it runs. */
export interface ModelFlags {
  model?: string | undefined;
  device?: string | undefined;
  dtype?: 'auto' | 'f32' | 'bf16' | undefined;
  threads?: number | undefined;
}

/** The options of `Policy.load` that the flags give. */
export function loadOptions(flags: ModelFlags, trainable: boolean) {
  const { device = 'auto', dtype = 'auto', threads } = flags;
  return { device, dtype, trainable, ...(threads !== undefined && { threads }) };
}

/** The device in a heading, with why `auto` chose no GPU. */
export function deviceText({ device: { name, reason } }: Policy): string {
  return reason === undefined ? name : `${name} (${reason})`;
}

/** A model's tokenizer and context length, without its weights. */
export async function openTokenizer(model: string | undefined) {
  const path = resolveModel(model);
  const files = await openModel(path);
  return { tokenizer: new Tokenizer(files.tokenizer, path), contextLength: files.config.maxPositions };
}
