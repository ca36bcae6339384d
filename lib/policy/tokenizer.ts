import { describeValue, invalidArgument, MerfError } from '../errors.js';
import { type ChatMessage, ChatTemplate, type ChatTemplateOptions } from '../prompt/chat-template.js';
import {
  type AddedToken,
  gatherAddedTokens,
  isTokenId,
  looksLikeMark,
  maxTokenId,
  type Span,
  TokenFinder,
  tokenText,
} from './added-tokens.js';
import { malformed, unsupported } from './files.js';
import type { TokenizerFiles } from './gguf-tokenizer.js';
import { BPE, type BpeModel } from './huggingface-tokenizers.js';
import { characterOfByte, type Place, type TextSteps, textSteps } from './pre-tokenizers.js';
import { patternMilliseconds, TookTooLong, within } from './text-limits.js';

export { characterOfByte };

export interface EncodeOptions {
  /** Adds what the tokenizer puts around a text, such as a begin-of-sequence token. Default false. */
  special?: boolean;
  /** Takes the names of special tokens as text like any other. Default false. */
  splitSpecialTokens?: boolean;
  /** Spans of the text, in order, in which no special token is found: what it says there is text. */
  literal?: readonly Span[];
}

export interface DecodeOptions {
  /** Leaves special tokens such as end-of-turn out of the text. Default false. */
  skipSpecial?: boolean;
  /** Tokens that are left out of the text, whether special or not. */
  skip?: ReadonlySet<number>;
}

/** What becomes of a system message where the chat template has no place for it. */
export type SystemMessages = 'move' | 'refuse';

/** How a model's prompts are written. */
export interface TokenizerOptions {
  /**
   * Whether a special token's name in the messages of a prompt, or in a row's text, stays text (true, the
   * default) or becomes the token, as in `transformers` by default. Those that the chat template itself
   * writes are tokens always.
   */
  splitSpecialTokens?: boolean | undefined;
  /**
   * What becomes of a system message where the chat template drops or refuses it: `move` (default) puts its
   * words at the beginning of the user's, `refuse` fails.
   */
  systemMessages?: SystemMessages | undefined;
}

/** Text to token ids and back, and the model's chat template. */
export class Tokenizer {
  /**
   * Number of ids; every id is below it. A model's vocabulary may be larger (padded), or smaller by unused
   * tokens.
   */
  readonly size: number;
  /** The least number of ids that a model needs a row for: those of the tokens that merging ends in. */
  readonly mergedSize: number;
  /** The ids that end a completion: the model's end-of-sequence tokens and its chat template's end of turn. */
  readonly eosIds: readonly number[];
  readonly bosId: number | undefined;
  readonly padId: number | undefined;
  readonly splitSpecialTokens: boolean;
  readonly systemMessages: SystemMessages;
  /** What a user should know of how the model's files were read. */
  readonly notices: readonly string[];
  readonly #model: BpeModel;
  readonly #steps: TextSteps;
  /** Finds the tokens that stand in the text as it is, and those in the text as the normalizer leaves it. */
  readonly #inText: TokenFinder;
  readonly #inNormalized: TokenFinder;
  readonly #specialTexts: TokenFinder;
  readonly #idOfAdded = new Map<string, number>();
  readonly #around: Around;
  readonly #pieces: (Uint8Array | undefined)[] = [];
  readonly #special = new Set<number>();
  /** The special tokens, and others that mark turns. */
  readonly #guarded = new Set<number>();
  readonly #template: ChatTemplate | undefined;
  readonly #stripsFirstSpace: boolean;
  readonly #bosText: string | undefined;
  #keepsSystem: boolean | undefined;

  /**
   * @param path the file or directory that `files` came from, for errors
   * @throws MerfError MALFORMED_FILE, UNSUPPORTED, INVALID_ARGUMENT
   */
  constructor(
    readonly files: TokenizerFiles,
    path: string,
    options: TokenizerOptions = {},
  ) {
    const { splitSpecialTokens = true, systemMessages = 'move' } = options;
    if (typeof splitSpecialTokens !== 'boolean') {
      throw invalidArgument('splitSpecialTokens', 'true or false', splitSpecialTokens);
    }
    if (systemMessages !== 'move' && systemMessages !== 'refuse') {
      throw invalidArgument('systemMessages', '"move" or "refuse"', systemMessages);
    }
    this.splitSpecialTokens = splitSpecialTokens;
    this.systemMessages = systemMessages;
    this.notices = files.notices ?? [];
    const { tokenizer, config } = files;
    checkDepth(path, files);
    this.#model = bpeModel(tokenizer.model, path);
    this.#steps = textSteps(tokenizer.normalizer, tokenizer.pre_tokenizer, path);
    const vocabulary = this.#model.tokens_to_ids;
    const added = gatherAddedTokens(tokenizer, config, vocabulary, path);
    const isRaw = ({ normalized }: AddedToken) => !normalized || tokenizer.normalizer == null;
    this.#inText = new TokenFinder(added.filter(isRaw).map((token) => [token.content, token]));
    this.#inNormalized = new TokenFinder(
      added
        .filter((token) => !isRaw(token) && token.content !== '')
        .map((token) => [this.#steps.normalize(token.content, 'start'), token]),
    );
    for (const { content, id, special } of added) {
      this.#idOfAdded.set(content, id);
      if (special) this.#special.add(id);
    }

    const decoders = decoderParts(tokenizer.decoder);
    const byteLevel = decoders.some(({ type }) => type === 'ByteLevel');
    const sentencePiece = decoders.some(({ type }) => type === 'ByteFallback' || type === 'Metaspace');
    if (!byteLevel && !sentencePiece) {
      const types = decoders.map(({ type }) => type).join(', ') || 'none';
      throw unsupported(
        path,
        `tokenizer decoder ${types.slice(0, 80)} is not supported: expected ByteLevel, ByteFallback or Metaspace`,
      );
    }
    const spell = byteLevel ? byteLevelBytes : sentencePieceBytes;
    let size = 0;
    for (const [piece, id] of vocabulary) {
      this.#pieces[id] = spell(piece);
      size = Math.max(size, id + 1);
    }
    this.mergedSize = size;
    for (const { content, id } of added) {
      this.#pieces[id] = new TextEncoder().encode(content);
      size = Math.max(size, id + 1);
    }
    this.size = size;
    this.#stripsFirstSpace =
      decoders.some(({ type, start }) => type === 'Strip' && start === 1) ||
      decoders.some(({ type, prepend_scheme }) => type === 'Metaspace' && prepend_scheme !== 'never');

    const named: Record<string, string> = {};
    for (const key of ['bos_token', 'eos_token', 'pad_token', 'unk_token']) {
      const text = tokenText(config[key]);
      if (text !== undefined) named[key] = text;
    }
    const idOf = (text: string | undefined) => (text === undefined ? undefined : this.idOf(text));
    this.#around = specialsAround(files, (text) => this.idOf(text), path);
    this.#bosText = named.bos_token;
    this.bosId = firstId(files.generation?.bos_token_id) ?? idOf(named.bos_token);
    this.padId = firstId(files.generation?.pad_token_id) ?? idOf(named.pad_token);
    this.#template =
      files.chatTemplate === undefined ? undefined : new ChatTemplate(files.chatTemplate, named);
    const ends = [...idList(files.generation?.eos_token_id), idOf(named.eos_token), this.#endOfTurn()];
    this.eosIds = [...new Set(ends.filter((id) => id !== undefined))].filter((id) => id < size);
    // Files have marks of turns that are not called special: a text must not become one of these either.
    const marks = added.filter(
      ({ id, content, special }) =>
        special ||
        this.eosIds.includes(id) ||
        (looksLikeMark(content) && (files.chatTemplate?.includes(content) ?? false)),
    );
    for (const { id } of marks) this.#guarded.add(id);
    this.#specialTexts = new TokenFinder(marks.map((token) => [token.content, token]));
  }

  /**
   * The token that the chat template writes after an assistant's words, where it is one that is not merged.
   */
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
      return first !== undefined && this.#isAdded(first) ? first : undefined;
    } catch {
      return undefined;
    }
  }

  #isAdded(id: number): boolean {
    return this.#special.has(id) || [...this.#idOfAdded.values()].includes(id);
  }

  get hasChatTemplate(): boolean {
    return this.#template !== undefined;
  }

  /**
   * Whether the chat template writes the system message that a conversation begins with. Mistral's first
   * templates drop it, Gemma's refuse it.
   */
  get keepsSystemMessages(): boolean {
    this.#keepsSystem ??= this.#writesSystem();
    return this.#keepsSystem;
  }

  #writesSystem(): boolean {
    const system = 'merf:the-system-spoke-here';
    const user = { role: 'user', content: 'question' };
    try {
      const options = { addGenerationPrompt: true };
      return this.applyChatTemplate([{ role: 'system', content: system }, user], options).includes(system);
    } catch {
      return false;
    }
  }

  /**
   * @throws MerfError INVALID_ARGUMENT where `text` is not a string, UNSUPPORTED where its patterns take too
   *   long
   */
  encode(text: string, options: EncodeOptions = {}): number[] {
    if (typeof text !== 'string') throw invalidArgument('text', 'a string', text);
    const ids = this.#encode(text, options, true);
    return options.special ? [...this.#around.before, ...ids, ...this.#around.after] : ids;
  }

  /**
   * `encode` of a text that goes on after other tokens: without the space that SentencePiece puts before a text's first
   * word.
   */
  encodeContinuation(text: string, options: Omit<EncodeOptions, 'special'> = {}): number[] {
    if (typeof text !== 'string') throw invalidArgument('text', 'a string', text);
    return this.#encode(text, options, false);
  }

  #encode(text: string, options: EncodeOptions, atStart: boolean): number[] {
    if (text === '') return [];
    if (!this.#steps.watched) return this.#sections(text, options, atStart);
    try {
      return within(patternMilliseconds(text.length), () => this.#sections(text, options, atStart));
    } catch (error) {
      if (!(error instanceof TookTooLong)) throw error;
      throw new MerfError(
        'UNSUPPORTED',
        `The tokenizer's patterns take too long on a text of ${text.length} characters: ${error.message}`,
        { cause: error },
      );
    }
  }

  #sections(text: string, options: EncodeOptions, atStart: boolean): number[] {
    const { splitSpecialTokens = false, literal = [] } = options;
    const allowed = ({ id }: AddedToken, start: number, end: number) =>
      !this.#guarded.has(id) ||
      !(splitSpecialTokens || literal.some((span) => start < span[1] && end > span[0]));
    const ids: number[] = [];
    for (const section of this.#inText.divide(text, allowed)) {
      if (section.token) ids.push(section.token.id);
      else {
        const place = section.start > 0 ? 'section' : atStart ? 'start' : 'continued';
        const inside = (token: AddedToken, nth: number, count: number) => {
          if (!this.#guarded.has(token.id)) return true;
          // Its places in the text as it was are those in the text as it is now, in their order.
          const places = [...placesOf(section.text, token.content)];
          const start = section.start + (places[nth] ?? 0);
          return places.length === count
            ? allowed(token, start, start + token.content.length)
            : !splitSpecialTokens && literal.length === 0;
        };
        this.#encodeSection(section.text, place, inside, ids);
      }
    }
    return ids;
  }

  /** Appends the ids of a text without tokens that stand in it as it is. */
  #encodeSection(
    text: string,
    place: Place,
    allowed: (token: AddedToken, nth: number, count: number) => boolean,
    ids: number[],
  ): void {
    const normal = this.#steps.normalize(text, place);
    const found = (token: AddedToken, start: number, end: number) => {
      const places = [...placesOf(normal, normal.slice(start, end))];
      return allowed(token, places.indexOf(start), places.length);
    };
    for (const section of this.#inNormalized.divide(normal, found)) {
      if (section.token) ids.push(section.token.id);
      else {
        const pieces = this.#steps.preTokenize(section.text, section.start > 0 ? 'section' : place);
        for (const piece of pieces) this.#merge(piece, ids);
      }
    }
  }

  #merge(piece: string, ids: number[]): void {
    const { tokens_to_ids: vocabulary, unk_token_id: unknown } = this.#model;
    for (const token of this.#model([piece])) {
      const id = vocabulary.get(token) ?? unknown;
      if (id === undefined) {
        throw new MerfError(
          'INVALID_ARGUMENT',
          'The text holds a character that the tokenizer has no token for',
        );
      }
      ids.push(id);
    }
  }

  /** `encode` with its special tokens, but no second begin-of-sequence token where the text brings one already. */
  encodePrompt(text: string, options: Omit<EncodeOptions, 'special'> = {}): number[] {
    if (typeof text !== 'string') throw invalidArgument('prompt', 'a string', text);
    const brings = this.#bosText !== undefined && this.#bosText !== '' && text.startsWith(this.#bosText);
    return this.encode(text, { ...options, special: !brings || options.splitSpecialTokens === true });
  }

  /** Where the names of special tokens stand in a text, as spans that do not touch each other. */
  specialSpans(text: string): Span[] {
    return this.#specialTexts.spans(text);
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
    return this.#idOfAdded.get(token) ?? this.#model.tokens_to_ids.get(token);
  }

  /**
   * All tokens' bytes after one another, with those that end a completion empty (they never match a stop
   * string).
   * @param vocabSize entries wanted, [vocabSize + 1] offsets
   */
  byteTable(vocabSize: number): { bytes: Uint8Array; offsets: Int32Array } {
    const offsets = new Int32Array(vocabSize + 1);
    const ends = new Set(this.eosIds);
    for (let id = 0; id < vocabSize; ++id) {
      offsets[id + 1] = (offsets[id] as number) + (ends.has(id) ? 0 : this.bytes(id).length);
    }
    const bytes = new Uint8Array(offsets[vocabSize] as number);
    for (let id = 0; id < vocabSize; ++id) {
      if (!ends.has(id)) bytes.set(this.bytes(id), offsets[id] as number);
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
      const skipped =
        (this.options.skipSpecial && this.tokenizer.isSpecial(id)) || this.options.skip?.has(id);
      if (!skipped) pieces.push(bytes);
    }
    return this.#decoder.decode(Buffer.concat(pieces), { stream: true });
  }

  /** What is left: U+FFFD where the tokens ended inside a character. */
  end(): string {
    return this.#decoder.decode();
  }
}

const noBytes = new Uint8Array(0);

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

const maxDepth = 64;
const maxParts = 100_000;

/** Refuses a description that is nested so deeply, or so large, that walking through it would fail. */
function checkDepth(path: string, { tokenizer, config }: TokenizerFiles): void {
  const { normalizer, pre_tokenizer, post_processor, decoder } = tokenizer;
  const queue = [[normalizer, pre_tokenizer, post_processor, decoder, config], tokenizer.added_tokens]
    .flat()
    .map((value): [unknown, number] => [value, 0]);
  for (let parts = 0; queue.length > 0; ++parts) {
    const [value, depth] = queue.pop() as [unknown, number];
    if (typeof value !== 'object' || value === null) continue;
    if (depth > maxDepth) throw malformed(path, `the tokenizer is nested more than ${maxDepth} deep`);
    for (const inner of Object.values(value)) queue.push([inner, depth + 1]);
    if (parts > maxParts) throw malformed(path, `the tokenizer has more than ${maxParts} parts`);
  }
}

/** The tokenizer library believes its file: a single lying id would have it fill gigabytes. */
function bpeModel(value: unknown, path: string): BpeModel {
  const model = value as Readonly<Record<string, unknown>> | null | undefined;
  if (typeof model !== 'object' || model === null) throw malformed(path, 'expected an object for model');
  if (model.type !== 'BPE' && !(model.type === undefined && model.merges !== undefined)) {
    const type = String(model.type).slice(0, 80);
    throw unsupported(path, `tokenizer model ${type} is not supported: expected BPE`);
  }
  if (typeof model.vocab !== 'object' || model.vocab === null || Array.isArray(model.vocab)) {
    throw malformed(path, 'expected an object of tokens and ids for model.vocab');
  }
  for (const [token, id] of Object.entries(model.vocab)) {
    if (!isTokenId(id)) {
      const shown = JSON.stringify(token.slice(0, 80));
      throw malformed(
        path,
        `expected an id from 0 to ${maxTokenId} for token ${shown} but found ${describeValue(id)}`,
      );
    }
  }
  const isMerge = (merge: unknown) =>
    typeof merge === 'string'
      ? merge.split(' ').length === 2
      : Array.isArray(merge) && merge.length === 2 && merge.every((s) => typeof s === 'string');
  const { merges } = model;
  if (
    !Array.isArray(merges) ||
    !merges.every((merge) => isMerge(merge) && typeof merge === typeof merges[0])
  ) {
    throw malformed(path, 'expected an array of pairs of tokens for model.merges');
  }
  for (const key of ['continuing_subword_prefix', 'end_of_word_suffix']) {
    if (model[key] !== undefined && model[key] !== null && model[key] !== '') {
      throw unsupported(path, `a tokenizer model with a ${key} is not supported`);
    }
  }
  const unknown = model.unk_token;
  if (unknown !== undefined && unknown !== null && typeof unknown !== 'string') {
    throw malformed(path, 'expected a text or null for model.unk_token');
  }
  try {
    return new BPE({ ...model, type: 'BPE' });
  } catch (error) {
    throw malformed(path, `the tokenizer cannot be read: ${(error as Error).message}`, error);
  }
}

/** The ids that the tokenizer puts around a text. */
interface Around {
  readonly before: readonly number[];
  readonly after: readonly number[];
}

/**
 * What the post-processor puts around a single text, or where tokenizer_config.json says so by
 * `add_bos_token` and `add_eos_token` what these ask for, which win in `transformers`.
 */
function specialsAround(
  { tokenizer, config }: TokenizerFiles,
  idOf: (token: string) => number | undefined,
  path: string,
): Around {
  const known = (id: unknown): number => {
    if (!isTokenId(id)) throw malformed(path, 'expected token ids in the post-processor');
    return id;
  };
  if ('add_bos_token' in config || 'add_eos_token' in config) {
    const tokens = (name: string) => {
      const text = config[`add_${name}`] === true ? tokenText(config[name]) : undefined;
      const id = text === undefined ? undefined : idOf(text);
      return id === undefined ? [] : [id];
    };
    return { before: tokens('bos_token'), after: tokens('eos_token') };
  }
  const read = (value: unknown): Around => {
    if (value === null || value === undefined) return { before: [], after: [] };
    const processor = value as Readonly<Record<string, unknown>>;
    switch (processor.type) {
      case 'ByteLevel':
        return { before: [], after: [] };
      case 'BertProcessing':
      case 'RobertaProcessing':
        return {
          before: [known((processor.cls as unknown[] | undefined)?.[1])],
          after: [known((processor.sep as unknown[] | undefined)?.[1])],
        };
      case 'TemplateProcessing':
        return templateAround(processor, known, path);
      case 'Sequence': {
        if (!Array.isArray(processor.processors)) break;
        return processor.processors.map(read).reduce(
          (inner, outer) => ({
            before: [...outer.before, ...inner.before],
            after: [...inner.after, ...outer.after],
          }),
          { before: [], after: [] },
        );
      }
    }
    throw unsupported(path, `post-processor ${String(processor.type).slice(0, 80)} is not supported`);
  };
  return read(tokenizer.post_processor);
}

function templateAround(
  { single, special_tokens: specials }: Readonly<Record<string, unknown>>,
  known: (id: unknown) => number,
  path: string,
): Around {
  if (!Array.isArray(single)) throw malformed(path, 'expected an array for single of the post-processor');
  const parts = single.map((item: unknown): 'text' | number[] => {
    const { SpecialToken: token, Sequence: sequence } = Object(item) as Record<string, { id?: unknown }>;
    if (sequence?.id === 'A') return 'text';
    const name = token?.id;
    if (typeof name !== 'string' || !Object.hasOwn(Object(specials), name)) {
      throw malformed(path, 'expected special tokens and the sequence A in single of the post-processor');
    }
    const { ids } = Object((specials as Record<string, unknown>)[name]) as { ids?: unknown };
    if (!Array.isArray(ids)) throw malformed(path, 'expected ids for a special token of the post-processor');
    return ids.map(known);
  });
  const at = parts.indexOf('text');
  if (at < 0 || parts.lastIndexOf('text') !== at) {
    throw malformed(path, 'expected the sequence A once in single of the post-processor');
  }
  return { before: parts.slice(0, at).flat() as number[], after: parts.slice(at + 1).flat() as number[] };
}

/** Where `part` stands in a text, from left to right. */
function* placesOf(text: string, part: string): Generator<number> {
  for (let at = text.indexOf(part); at >= 0; at = text.indexOf(part, at + part.length)) yield at;
}

function idList(value: unknown): number[] {
  const list = Array.isArray(value) ? value : [value];
  return list.filter((id): id is number => Number.isInteger(id) && (id as number) >= 0);
}

function firstId(value: unknown): number | undefined {
  return idList(value)[0];
}
