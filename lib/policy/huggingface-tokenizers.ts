import * as library from '@huggingface/tokenizers';

/** Merging of @huggingface/tokenizers: what is left to that library of a tokenizer. */
export interface BpeModel {
  readonly tokens_to_ids: Map<string, number>;
  readonly unk_token_id: number | undefined;
  (pieces: readonly string[]): string[];
}

// The library's declarations name these without a file extension, which Node's resolution does not follow.
export const { BPE, SplitPreTokenizer } = library as unknown as {
  BPE: new (config: unknown) => BpeModel;
  SplitPreTokenizer: new (config: unknown) => { readonly pattern: RegExp | null };
};
