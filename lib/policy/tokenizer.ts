import { Tokenizer as HuggingFaceTokenizer } from '@huggingface/tokenizers';
import { invalidArgument, MerfError } from '../errors.js';
import { type ChatMessage, ChatTemplate, type ChatTemplateOptions } from '../prompt/chat-template.js';
import { malformed, unsupported } from './files.js';
import type { TokenizerFiles } from './gguf-tokenizer.js';

export interface EncodeOptions {
  /** Adds what the tokenizer puts around a text, such as a begin-of-sequence token. Default false. */
  special?: boolean;
}

export interface DecodeOptions {
  /** Leaves special tokens such as end-of-turn out of the text. Default false. */
  skipSpecial?: boolean;
}

interface AddedToken {
  id: number;
  content: string;
  special: boolean;
}

/** Text to token ids and back, and the model's chat template. */
export class Tokenizer {
  /** Number of ids; every id is below it. A model's vocabulary may be larger (padded). */
  readonly size: number;
  /** The ids that end a completion: the model's end-of-sequence tokens and its chat template's end of turn. */
  readonly eosIds: readonly number[];
  readonly bosId: number | undefined;
  readonly padId: number | undefined;
  readonly #encoder: HuggingFaceTokenizer;
  readonly #pieces: (Uint8Array | undefined)[] = [];
  readonly #special = new Set<number>();
  readonly #template: ChatTemplate | undefined;
  readonly #stripsFirstSpace: boolean;
  readonly #bosText: string | undefined;

  /**
   * @param path the file or directory that `files` came from, for errors
   * @throws MerfError MALFORMED_FILE, UNSUPPORTED
   */
  constructor(
    readonly files: TokenizerFiles,
    path: string,
  ) {
    const { tokenizer, config } = files;
    const added = addedTokens(tokenizer, path);
    checkModel(tokenizer.model, path);
    try {
      this.#encoder = new HuggingFaceTokenizer(tokenizer, config);
    } catch (error) {
      throw malformed(path, `the tokenizer cannot be read: ${(error as Error).message}`, error);
    }
    const decoders = decoderParts(tokenizer.decoder);
    const byteLevel = decoders.some(({ type }) => type === 'ByteLevel');
    const sentencePiece = decoders.some(({ type }) => type === 'ByteFallback' || type === 'Metaspace');
    if (!byteLevel && !sentencePiece) {
      const types = decoders.map(({ type }) => type).join(', ') || 'none';
      throw unsupported(
        path,
        `tokenizer decoder ${types} is not supported: expected ByteLevel, ByteFallback or Metaspace`,
      );
    }
    const spell = byteLevel ? byteLevelBytes : sentencePieceBytes;
    const addedById = new Map(added.map((token) => [token.id, token]));
    const utf8 = new TextEncoder();
    let size = 0;
    for (const [piece, id] of this.#encoder.get_vocab()) {
      if (piece === undefined) continue;
      const token = addedById.get(id);
      this.#pieces[id] = token ? utf8.encode(token.content) : spell(piece);
      size = Math.max(size, id + 1);
    }
    for (const token of added) if (token.special) this.#special.add(token.id);
    this.size = size;
    this.#stripsFirstSpace =
      decoders.some(({ type, start }) => type === 'Strip' && start === 1) ||
      decoders.some(({ type, prepend_scheme }) => type === 'Metaspace' && prepend_scheme !== 'never');

    const named: Record<string, string> = {};
    for (const key of ['bos_token', 'eos_token', 'pad_token', 'unk_token']) {
      const text = tokenText(config[key]);
      if (text !== undefined) named[key] = text;
    }
    const idOf = (text: string | undefined) =>
      text === undefined ? undefined : this.#encoder.token_to_id(text);
    this.#bosText = named.bos_token;
    this.bosId = firstId(files.generation?.bos_token_id) ?? idOf(named.bos_token);
    this.padId = firstId(files.generation?.pad_token_id) ?? idOf(named.pad_token);
    this.#template =
      files.chatTemplate === undefined ? undefined : new ChatTemplate(files.chatTemplate, named);
    const ends = [...idList(files.generation?.eos_token_id), idOf(named.eos_token), this.#endOfTurn()];
    this.eosIds = [...new Set(ends.filter((id) => id !== undefined))].filter((id) => id < size);
  }

  /** The token that the chat template writes after an assistant's words, where it is a special one. */
  #endOfTurn(): number | undefined {
    if (this.#template === undefined) return undefined;
    const reply = 'reply';
    try {
      const text = this.#template.render([
        { role: 'user', content: 'question' },
        { role: 'assistant', content: reply },
      ]);
      const after = text.slice(text.lastIndexOf(reply) + reply.length).trimStart();
      const first = after === '' ? undefined : this.encode(after)[0];
      return first !== undefined && this.#special.has(first) ? first : undefined;
    } catch {
      return undefined;
    }
  }

  get hasChatTemplate(): boolean {
    return this.#template !== undefined;
  }

  /** @throws MerfError INVALID_ARGUMENT where `text` is not a string */
  encode(text: string, options: EncodeOptions = {}): number[] {
    if (typeof text !== 'string') throw invalidArgument('text', 'a string', text);
    if (text === '') return options.special && this.bosId !== undefined ? this.#encoder.encode('').ids : [];
    const { ids } = this.#encoder.encode(text, { add_special_tokens: options.special ?? false });
    const unknown = ids.indexOf(undefined as unknown as number);
    if (unknown !== -1) {
      throw new MerfError(
        'INVALID_ARGUMENT',
        'The text holds a character that the tokenizer has no token for',
      );
    }
    return ids;
  }

  /**
   * `encode` of a text that goes on after other tokens: without the space that SentencePiece puts before a text's first
   * word.
   */
  encodeContinuation(text: string): number[] {
    if (!this.#stripsFirstSpace) return this.encode(text);
    const before = '\n';
    const start = this.encode(before);
    const ids = this.encode(before + text);
    return start.every((id, i) => ids[i] === id) ? ids.slice(start.length) : this.encode(text);
  }

  /** `encode` with its special tokens, but no second begin-of-sequence token where the text brings one already. */
  encodePrompt(text: string): number[] {
    if (typeof text !== 'string') throw invalidArgument('prompt', 'a string', text);
    return this.encode(text, { special: !(this.#bosText && text.startsWith(this.#bosText)) });
  }

  /**
   * Bytes that are not UTF-8 (a character cut in half) become U+FFFD. Ids without a token (a padded vocabulary) add
   * nothing.
   * @throws MerfError INVALID_ARGUMENT where an id is not a non-negative integer
   */
  decode(ids: ArrayLike<number>, options: DecodeOptions = {}): string {
    const stream = new TextStream(this, options);
    const text = stream.push(ids) + stream.end();
    return this.#stripsFirstSpace && text.startsWith(' ') ? text.slice(1) : text;
  }

  /** The bytes that a token adds to the text; empty for ids without a token. */
  bytes(id: number): Uint8Array {
    if (!Number.isInteger(id) || id < 0) throw invalidArgument('token id', 'a non-negative integer', id);
    return this.#pieces[id] ?? noBytes;
  }

  isSpecial(id: number): boolean {
    return this.#special.has(id);
  }

  idOf(token: string): number | undefined {
    return this.#encoder.token_to_id(token);
  }

  /**
   * All tokens' bytes after one another, with special tokens empty (they never match a stop string).
   * @param vocabSize entries wanted, [vocabSize + 1] offsets
   */
  byteTable(vocabSize: number): { bytes: Uint8Array; offsets: Int32Array } {
    const offsets = new Int32Array(vocabSize + 1);
    for (let id = 0; id < vocabSize; ++id) {
      offsets[id + 1] = (offsets[id] as number) + (this.#special.has(id) ? 0 : this.bytes(id).length);
    }
    const bytes = new Uint8Array(offsets[vocabSize] as number);
    for (let id = 0; id < vocabSize; ++id) {
      if (!this.#special.has(id)) bytes.set(this.bytes(id), offsets[id] as number);
    }
    return { bytes, offsets };
  }

  /**
   * The conversation as text, by the model's own template.
   * @throws MerfError UNSUPPORTED where the model has no chat template, INVALID_ARGUMENT where it refuses the messages
   */
  applyChatTemplate(messages: readonly ChatMessage[], options: ChatTemplateOptions = {}): string {
    if (this.#template === undefined) {
      throw new MerfError(
        'UNSUPPORTED',
        'The model has no chat template: give prompts as text or as token ids',
      );
    }
    return this.#template.render(messages, options);
  }
}

/** Decodes tokens as they come; a character is given out once all of its bytes are there. */
export class TextStream {
  readonly #decoder = new TextDecoder('utf-8', { ignoreBOM: true });

  constructor(
    private readonly tokenizer: Tokenizer,
    private readonly options: DecodeOptions = {},
  ) {}

  push(ids: ArrayLike<number>): string {
    const pieces: Uint8Array[] = [];
    for (let i = 0; i < ids.length; ++i) {
      const id = ids[i] as number;
      const bytes = this.tokenizer.bytes(id);
      if (!this.options.skipSpecial || !this.tokenizer.isSpecial(id)) pieces.push(bytes);
    }
    return this.#decoder.decode(Buffer.concat(pieces), { stream: true });
  }

  /** What is left: U+FFFD where the tokens ended inside a character. */
  end(): string {
    return this.#decoder.decode();
  }
}

const noBytes = new Uint8Array(0);

/** GPT-2's alphabet, by which byte-level BPE writes the 256 bytes: printable ones as they are, others from U+0100 on. */
export const characterOfByte: readonly string[] = (() => {
  const characters: string[] = [];
  let next = 256;
  for (let byte = 0; byte < 256; ++byte) {
    const printable = (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
    characters.push(String.fromCharCode(printable ? byte : next++));
  }
  return characters;
})();

const byteOfCharacter: ReadonlyMap<string, number> = new Map(
  characterOfByte.map((character, byte) => [character, byte]),
);

function byteLevelBytes(piece: string): Uint8Array {
  const bytes: number[] = [];
  for (const character of piece) {
    const byte = byteOfCharacter.get(character);
    if (byte === undefined) return new TextEncoder().encode(piece);
    bytes.push(byte);
  }
  return Uint8Array.from(bytes);
}

function sentencePieceBytes(piece: string): Uint8Array {
  const byte = /^<0x([0-9A-F]{2})>$/.exec(piece)?.[1];
  if (byte !== undefined) return Uint8Array.of(Number.parseInt(byte, 16));
  return new TextEncoder().encode(piece.replaceAll('▁', ' '));
}

interface DecoderPart {
  type: string;
  start?: number;
  prepend_scheme?: string;
}

function decoderParts(decoder: unknown): DecoderPart[] {
  const part = decoder as (DecoderPart & { decoders?: unknown }) | null | undefined;
  if (typeof part !== 'object' || part === null) return [];
  if (part.type === 'Sequence' && Array.isArray(part.decoders)) return part.decoders.flatMap(decoderParts);
  return [part];
}

function addedTokens(tokenizer: Record<string, unknown>, path: string): AddedToken[] {
  const added = tokenizer.added_tokens ?? [];
  if (!Array.isArray(added)) throw malformed(path, 'expected an array for added_tokens');
  for (const token of added as Partial<AddedToken>[]) {
    if (!isTokenId(token?.id) || typeof token.content !== 'string') {
      throw malformed(
        path,
        `expected an id and a content in added_tokens but found ${JSON.stringify(token)?.slice(0, 80)}`,
      );
    }
  }
  return (added as Partial<AddedToken>[]).map(({ id, content, special }) => ({
    id: id as number,
    content: content as string,
    special: special ?? false,
  }));
}

const maxTokens = 1 << 24;

function isTokenId(id: unknown): id is number {
  return Number.isInteger(id) && (id as number) >= 0 && (id as number) < maxTokens;
}

/** The tokenizer library believes its file: a single lying id would have it fill gigabytes. */
function checkModel(value: unknown, path: string): void {
  const model = value as { type?: unknown; vocab?: unknown; merges?: unknown } | null | undefined;
  if (typeof model !== 'object' || model === null) throw malformed(path, 'expected an object for model');
  if (model.type !== 'BPE' && !(model.type === undefined && model.merges !== undefined)) {
    throw unsupported(path, `tokenizer model ${String(model.type)} is not supported: expected BPE`);
  }
  if (typeof model.vocab !== 'object' || model.vocab === null || Array.isArray(model.vocab)) {
    throw malformed(path, 'expected an object of tokens and ids for model.vocab');
  }
  for (const [token, id] of Object.entries(model.vocab)) {
    if (!isTokenId(id)) {
      throw malformed(
        path,
        `expected an id from 0 to ${maxTokens - 1} for token ${JSON.stringify(token)} but found ${String(id)}`,
      );
    }
  }
  const isMerge = (merge: unknown) =>
    typeof merge === 'string' ||
    (Array.isArray(merge) && merge.length === 2 && merge.every((s) => typeof s === 'string'));
  if (!Array.isArray(model.merges) || !model.merges.every(isMerge)) {
    throw malformed(path, 'expected an array of pairs of tokens for model.merges');
  }
}

/** A token as tokenizer_config.json spells it: its text, or an object around it. */
function tokenText(value: unknown): string | undefined {
  if (typeof value === 'string') return value;
  const content = (value as { content?: unknown } | null | undefined)?.content;
  return typeof content === 'string' ? content : undefined;
}

function idList(value: unknown): number[] {
  const list = Array.isArray(value) ? value : [value];
  return list.filter((id): id is number => Number.isInteger(id) && (id as number) >= 0);
}

function firstId(value: unknown): number | undefined {
  return idList(value)[0];
}
