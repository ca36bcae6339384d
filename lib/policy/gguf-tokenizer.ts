import { looksLikeMark, looksLikeName } from './added-tokens.js';
import { Fields, malformed, unsupported } from './files.js';
import type { GgufFile } from './gguf.js';

/** The files that describe a tokenizer in a Hugging Face directory, parsed. */
export interface TokenizerFiles {
  /** tokenizer.json */
  tokenizer: Record<string, unknown>;
  /** tokenizer_config.json */
  config: Record<string, unknown>;
  /** generation_config.json */
  generation?: Record<string, unknown>;
  /** chat_template.jinja, or the template out of tokenizer_config.json */
  chatTemplate?: string;
  /** special_tokens_map.json, kept for saving */
  specialTokensMap?: Record<string, unknown>;
  /** What a user should know of how the model's files were read. */
  notices?: readonly string[];
}

const tokenType = { normal: 1, unknown: 2, control: 3, userDefined: 4, byte: 6 } as const;

const gpt2Split = "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+";
const contractions = "(?i:'s|'t|'re|'ve|'m|'ll|'d)";
const words = '[^\\r\\n\\p{L}\\p{N}]?\\p{L}+';
const rest = ' ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+';
const llama3Split = `${contractions}|${words}|\\p{N}{1,3}|${rest}`;
const qwen2Split = `${contractions}|${words}|\\p{N}|${rest}`;

/**
 * How the text is cut before merging, by `tokenizer.ggml.pre` as llama.cpp names it: patterns applied one after
 * another. `ignoreMerges`: a word that is a token as it stands is taken whole.
 */
interface PreTokenization {
  readonly splits: readonly string[];
  readonly ignoreMerges?: boolean;
  readonly normalize?: 'NFC';
  /** Whether texts begin with a begin-of-sequence token where the file does not say. */
  readonly addsBos?: boolean;
}

const llama3: PreTokenization = { splits: [llama3Split], ignoreMerges: true, addsBos: true };

const preTokenizers: ReadonlyMap<string, PreTokenization> = new Map(
  Object.entries<PreTokenization>({
    'gpt-2': { splits: [gpt2Split] },
    default: { splits: [gpt2Split] },
    smollm: { splits: ['\\p{N}', gpt2Split] },
    starcoder: { splits: ['\\p{N}', gpt2Split] },
    refact: { splits: ['\\p{N}', gpt2Split] },
    'command-r': { splits: ['\\p{N}', gpt2Split] },
    'llama-bpe': llama3,
    llama3,
    'llama-v3': llama3,
    qwen2: { splits: [qwen2Split], normalize: 'NFC' },
    'deepseek-r1-qwen': { splits: [qwen2Split] },
  }),
);

/**
 * Tokens that end a turn or a text and that converters have stored as ordinary ones; llama.cpp mends these
 * too.
 */
const endTexts: ReadonlySet<string> = new Set([
  '<|eot_id|>',
  '<|eom_id|>',
  '<|im_end|>',
  '<|end|>',
  '<|endoftext|>',
  '<|end_of_text|>',
  '<|return|>',
  '<|call|>',
  '<end_of_turn>',
  '<end_of_utterance>',
  '</s>',
  '<eos>',
  '<EOT>',
  '_<EOT>',
  '[EOT]',
  '[EOS]',
  '<｜end▁of▁sentence｜>',
]);

/** What begins and ends texts where the file does not say, as llama.cpp has it. */
const sentencePieceDefaults = { bos: 1, eos: 2, unknown: 0 } as const;

/**
 * The tokenizer that a GGUF file's metadata describes, in the form of Hugging Face's files: byte-level BPE
 * (`tokenizer.ggml.model` gpt2) and SentencePiece BPE (`llama`).
 * @throws MerfError MALFORMED_FILE, UNSUPPORTED
 */
export function tokenizerFromGguf(file: GgufFile, vocabSize: number): TokenizerFiles {
  const { path, metadata } = file;
  const fields = new Fields(path, (key) => metadata.get(`tokenizer.ggml.${key}`));
  if (!fields.has('model'))
    throw malformed(path, 'expected a tokenizer (tokenizer.ggml.model) but the file has none');
  const model = fields.string('model');
  const tokens = stringArray(path, metadata, 'tokens');
  if (tokens.length !== vocabSize) {
    throw malformed(
      path,
      `expected ${vocabSize} tokens in tokenizer.ggml.tokens, as token_embd.weight has rows, but found ${tokens.length}`,
    );
  }
  const types =
    numberArray(path, metadata, 'token_type', tokens.length) ?? tokens.map(() => tokenType.normal);

  if (model !== 'gpt2' && model !== 'llama') {
    throw unsupported(path, `tokenizer.ggml.model ${model} is not supported: expected gpt2 or llama`);
  }
  const pre = model === 'gpt2' ? preTokenizationOf(path, fields) : undefined;
  const template = metadata.get('tokenizer.chat_template');
  const chatTemplate = typeof template === 'string' ? template : undefined;

  const defaults = model === 'llama' ? sentencePieceDefaults : undefined;
  const idOf = (key: string, fallback?: number) => {
    if (fields.has(key)) return fields.integer(key, 0, tokens.length - 1);
    return fallback !== undefined && fallback < tokens.length ? fallback : undefined;
  };
  const bos = idOf('bos_token_id', defaults?.bos);
  const eos = idOf('eos_token_id', defaults?.eos);
  const pad = idOf('padding_token_id');
  const unknown = idOf('unknown_token_id', defaults?.unknown);
  const ends = [eos, idOf('eot_token_id'), idOf('eom_token_id')].filter((id) => id !== undefined);
  const addBos = fields.boolean('add_bos_token', model === 'llama' || (pre?.addsBos ?? false));
  const addEos = fields.boolean('add_eos_token', false);
  const before = addBos && bos !== undefined ? bos : undefined;
  const after = addEos && eos !== undefined ? eos : undefined;

  const named = new Set([bos, ...ends]);
  const isSpecial = (content: string, id: number): boolean => {
    const type = types[id];
    if (type === tokenType.control || (type === tokenType.unknown && model === 'llama')) return true;
    if (type !== tokenType.normal && type !== tokenType.userDefined) return false;
    if (endTexts.has(content) || (named.has(id) && looksLikeName(content))) return true;
    return looksLikeMark(content) && (chatTemplate?.includes(content) ?? false);
  };
  const added = tokens.flatMap((content, id) => {
    const special = isSpecial(content, id);
    if (!special && types[id] !== tokenType.userDefined) return [];
    return [{ id, content, single_word: false, lstrip: false, rstrip: false, normalized: false, special }];
  });

  const tokenizer: Record<string, unknown> = {
    version: '1.0',
    truncation: null,
    padding: null,
    added_tokens: added,
    ...(pre
      ? byteLevelParts(path, metadata, pre, tokens)
      : sentencePieceParts(path, metadata, fields, tokens, types)),
    post_processor: templateProcessing(
      ...[before, after].map((id) => (id === undefined ? undefined : { id, content: tokens[id] as string })),
    ),
  };
  const tokenAt = (id: number | undefined) => (id === undefined ? null : (tokens[id] as string));
  const notices =
    model === 'gpt2' && !fields.has('pre')
      ? [
          `${path} does not say how its tokenizer cuts text (tokenizer.ggml.pre): it is read as gpt-2's, which few ` +
            'models are, so that prompts may be other tokens than the model was trained on',
        ]
      : [];
  return {
    tokenizer,
    config: {
      tokenizer_class: 'PreTrainedTokenizerFast',
      bos_token: tokenAt(bos),
      eos_token: tokenAt(eos),
      pad_token: tokenAt(pad),
      unk_token: tokenAt(unknown),
      add_bos_token: before !== undefined,
      add_eos_token: after !== undefined,
      clean_up_tokenization_spaces: false,
    },
    generation: {
      bos_token_id: bos ?? null,
      eos_token_id: ends.length === 0 ? null : [...new Set(ends)],
      pad_token_id: pad ?? null,
    },
    ...(chatTemplate !== undefined && { chatTemplate }),
    ...(notices.length > 0 && { notices }),
  };
}

/** @throws MerfError UNSUPPORTED */
function preTokenizationOf(path: string, fields: Fields): PreTokenization {
  const kind = fields.string('pre', 'default');
  const pre = preTokenizers.get(kind);
  if (pre !== undefined) return pre;
  throw unsupported(
    path,
    `tokenizer.ggml.pre ${kind} is not supported: expected ${[...preTokenizers.keys()].join(', ')}`,
  );
}

function byteLevelParts(
  path: string,
  metadata: GgufFile['metadata'],
  pre: PreTokenization,
  tokens: string[],
) {
  const vocab = uniqueVocabulary(path, tokens);
  const merges = stringArray(path, metadata, 'merges').map((merge, i) => {
    const space = merge.indexOf(' ', 1);
    if (space < 1 || space === merge.length - 1) {
      throw malformed(
        path,
        `tokenizer.ggml.merges[${i}]: expected two tokens with a space between but found ${JSON.stringify(merge)}`,
      );
    }
    return [merge.slice(0, space), merge.slice(space + 1)];
  });
  const isolated = (pattern: string) => ({
    type: 'Split',
    pattern: { Regex: pattern },
    behavior: 'Isolated',
    invert: false,
  });
  return {
    normalizer: pre.normalize === undefined ? null : { type: pre.normalize },
    pre_tokenizer: {
      type: 'Sequence',
      pretokenizers: [
        ...pre.splits.map(isolated),
        { type: 'ByteLevel', add_prefix_space: false, trim_offsets: true, use_regex: false },
      ],
    },
    decoder: { type: 'ByteLevel', add_prefix_space: false, trim_offsets: true, use_regex: false },
    model: {
      type: 'BPE',
      dropout: null,
      unk_token: null,
      continuing_subword_prefix: null,
      end_of_word_suffix: null,
      fuse_unk: false,
      byte_fallback: false,
      ignore_merges: pre.ignoreMerges ?? false,
      vocab,
      merges,
    },
  };
}

/** SentencePiece merges the pair whose joined token scores highest; as merges, all pairs in that order. */
function sentencePieceParts(
  path: string,
  metadata: GgufFile['metadata'],
  fields: Fields,
  tokens: string[],
  types: number[],
) {
  const scores = numberArray(path, metadata, 'scores', tokens.length);
  if (scores === undefined) throw malformed(path, 'expected tokenizer.ggml.scores but there is none');
  const vocab = uniqueVocabulary(path, tokens);
  const mergeable = new Set(tokens.filter((_, id) => types[id] === tokenType.normal));
  const pairs: { pair: [string, string]; score: number; order: number }[] = [];
  tokens.forEach((token, id) => {
    if (types[id] !== tokenType.normal) return;
    const characters = Array.from(token);
    let left = '';
    for (let i = 0; i < characters.length - 1; ++i) {
      left += characters[i];
      const right = token.slice(left.length);
      if (mergeable.has(left) && mergeable.has(right))
        pairs.push({ pair: [left, right], score: scores[id] as number, order: pairs.length });
    }
  });
  pairs.sort((a, b) => b.score - a.score || a.order - b.order);
  const unknown = tokens[fields.integer('unknown_token_id', 0, tokens.length - 1, 0)] as string;
  const prefix = fields.boolean('add_space_prefix', true);
  const replace = { type: 'Replace', pattern: { String: ' ' }, content: '▁' };
  return {
    normalizer: prefix
      ? { type: 'Sequence', normalizers: [{ type: 'Prepend', prepend: '▁' }, replace] }
      : replace,
    pre_tokenizer: null,
    decoder: {
      type: 'Sequence',
      decoders: [
        { type: 'Replace', pattern: { String: '▁' }, content: ' ' },
        { type: 'ByteFallback' },
        { type: 'Fuse' },
        ...(prefix ? [{ type: 'Strip', content: ' ', start: 1, stop: 0 }] : []),
      ],
    },
    model: {
      type: 'BPE',
      dropout: null,
      unk_token: unknown,
      continuing_subword_prefix: null,
      end_of_word_suffix: null,
      fuse_unk: true,
      byte_fallback: true,
      ignore_merges: false,
      vocab,
      merges: pairs.map(({ pair }) => pair),
    },
  };
}

interface NamedToken {
  id: number;
  content: string;
}

/** The post-processor that puts these tokens around a text. */
function templateProcessing(before?: NamedToken, after?: NamedToken) {
  const part = (token: NamedToken | undefined, type_id: number) =>
    token === undefined ? [] : [{ SpecialToken: { id: token.content, type_id } }];
  const text = (id: string, type_id: number) => [
    ...part(before, type_id),
    { Sequence: { id, type_id } },
    ...part(after, type_id),
  ];
  const tokens = [before, after].filter((token) => token !== undefined);
  return {
    type: 'TemplateProcessing',
    single: text('A', 0),
    pair: [...text('A', 0), ...text('B', 1)],
    special_tokens: Object.fromEntries(
      tokens.map(({ id, content }) => [content, { id: content, ids: [id], tokens: [content] }]),
    ),
  };
}

function uniqueVocabulary(path: string, tokens: string[]): Record<string, number> {
  const ids = new Map(tokens.map((token, id) => [token, id]));
  if (ids.size !== tokens.length) {
    const twice = tokens.findIndex((token, id) => ids.get(token) !== id);
    throw malformed(path, `tokenizer.ggml.tokens: ${JSON.stringify(tokens[twice])} occurs twice`);
  }
  return Object.fromEntries(ids);
}

function stringArray(path: string, metadata: GgufFile['metadata'], key: string): string[] {
  const value = metadata.get(`tokenizer.ggml.${key}`);
  if (!Array.isArray(value) || !value.every((item) => typeof item === 'string')) {
    throw malformed(
      path,
      `expected an array of strings for tokenizer.ggml.${key} but ${value === undefined ? 'it is missing' : 'found something else'}`,
    );
  }
  return value as string[];
}

function numberArray(
  path: string,
  metadata: GgufFile['metadata'],
  key: string,
  length: number,
): number[] | undefined {
  const value = metadata.get(`tokenizer.ggml.${key}`);
  if (value === undefined) return undefined;
  if (!Array.isArray(value) || value.length !== length || !value.every((item) => typeof item === 'number')) {
    throw malformed(path, `expected an array of ${length} numbers for tokenizer.ggml.${key}`);
  }
  return value as number[];
}
