import { openModel, type Policy, Tokenizer, type TokenizerOptions } from '../policy/index.js';
import { printError } from './output.js';
import { resolveModel } from './paths.js';

/** The flags that choose a model and how it runs. */
export interface ModelFlags extends TokenizerOptions {
  model?: string | undefined;
  device?: string | undefined;
  dtype?: 'auto' | 'f32' | 'bf16' | undefined;
  threads?: number | undefined;
}

/** The options of `Policy.load` that the flags give. */
export function loadOptions(flags: ModelFlags, trainable: boolean) {
  const { device = 'auto', dtype = 'auto', threads } = flags;
  return { device, dtype, trainable, ...tokenizerOptions(flags), ...(threads !== undefined && { threads }) };
}

/** The options of a tokenizer that the flags give. */
function tokenizerOptions({ splitSpecialTokens, systemMessages }: TokenizerOptions): TokenizerOptions {
  return { splitSpecialTokens, systemMessages };
}

/** The device in a heading, with why `auto` chose no GPU. */
export function deviceText({ device: { name, reason } }: Policy): string {
  return reason === undefined ? name : `${name} (${reason})`;
}

/** Says what the user should know beside what the command prints. */
export function tellNotices(notices: Iterable<string>): void {
  for (const notice of notices) printError(`merf: ${notice}\n`);
}

/** A model's tokenizer and context length, without its weights. */
export async function openTokenizer(model: string | undefined, options: TokenizerOptions = {}) {
  const path = resolveModel(model);
  const files = await openModel(path);
  const tokenizer = new Tokenizer(files.tokenizer, path, tokenizerOptions(options));
  tellNotices(tokenizer.notices);
  return { tokenizer, contextLength: files.config.maxPositions };
}
