import { existsSync, readFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { beforeAll, describe, expect, test } from '@jest/globals';
import { type GgufFile, type GgufValue, readGguf } from '../../lib/policy/gguf.js';
import { tokenizerFromGguf } from '../../lib/policy/gguf-tokenizer.js';
import { TextStream, Tokenizer } from '../../lib/policy/tokenizer.js';
import { readJson } from '../support/fixtures.js';
import { expectFailure, smollm, tinyTokens, tokenizerFiles } from './helpers.js';

const tiny = () => new Tokenizer(tokenizerFiles(), 'tiny');

describe('a tokenizer', () => {
  test('merges, keeps special tokens whole, and gives the text back', () => {
    const tokenizer = tiny();
    expect(tokenizer.decode(tokenizer.encode('hello'))).toBe('hello');
    expect(tokenizer.encode('<|im_end|>')).toEqual([2]);
    for (const text of ['hello wo', 'né 日本 👍🏽\u0000\n', ' a<|im_start|>b ', '']) {
      expect(tokenizer.decode(tokenizer.encode(text))).toBe(text);
    }
    expect(tokenizer.decode(tokenizer.encode('a<|im_end|>b'), { skipSpecial: true })).toBe('ab');
  });

  test('knows where its text ends: generation config and the end of a turn', () => {
    expect(tiny().eosIds).toEqual([0, 2]);
    const { chatTemplate: _, ...plain } = tokenizerFiles();
    expect(new Tokenizer({ ...plain, generation: { eos_token_id: 1 } }, 'tiny').eosIds).toEqual([1, 0]);
  });

  test('adds a begin-of-sequence token where asked to, and never two', () => {
    const files = tokenizerFiles();
    files.config.bos_token = '<|im_start|>';
    files.tokenizer.post_processor = {
      type: 'TemplateProcessing',
      single: [{ SpecialToken: { id: '<|im_start|>', type_id: 0 } }, { Sequence: { id: 'A', type_id: 0 } }],
      pair: [],
      special_tokens: { '<|im_start|>': { id: '<|im_start|>', ids: [1], tokens: ['<|im_start|>'] } },
    };
    const tokenizer = new Tokenizer(files, 'tiny');
    const hello = tokenizer.encode('hello');
    expect(hello[0]).not.toBe(1);
    expect(tokenizer.encode('hello', { special: true })).toEqual([1, ...hello]);
    expect(tokenizer.encodePrompt('hello')).toEqual([1, ...hello]);
    expect(tokenizer.encodePrompt('<|im_start|>hello')).toEqual([1, ...hello]);
  });

  test('streams whole characters only', () => {
    const tokenizer = tiny();
    const text = 'né 日本 👍🏽 ok';
    const ids = tokenizer.encode(text);
    expect(ids.length).toBeGreaterThan(Array.from(text).length);
    const stream = new TextStream(tokenizer);
    const pieces = ids.map((id) => stream.push([id]));
    expect(pieces.join('') + stream.end()).toBe(text);
    for (const piece of pieces) expect(piece).not.toContain('\ufffd');

    const cut = new TextStream(tokenizer);
    const first = tokenizer.encode('👍').slice(0, 2);
    expect(cut.push(first)).toBe('');
    expect(cut.end()).toBe('\ufffd');
  });

  test('gives the bytes of its tokens as one table, special tokens empty', () => {
    const tokenizer = tiny();
    const { bytes, offsets } = tokenizer.byteTable(300);
    expect(offsets).toHaveLength(301);
    const piece = (id: number) => Buffer.from(bytes.subarray(offsets[id], offsets[id + 1])).toString();
    const [first, second] = tokenizer.encode('hello') as [number, number];
    expect(piece(first) + piece(second)).toBe('hello');
    expect([piece(0), piece(2), piece(299)]).toEqual(['', '', '']);
    expect(offsets[300]).toBe(bytes.length);
  });

  test('refuses what is not text, not an id, or not in its chat template', async () => {
    const tokenizer = tiny();
    await expectFailure(() => tokenizer.encode(5 as unknown as string), 'INVALID_ARGUMENT', 'text', '5');
    await expectFailure(() => tokenizer.decode([-1]), 'INVALID_ARGUMENT', 'token id');
    await expectFailure(() => tokenizer.decode([1.5]), 'INVALID_ARGUMENT', 'token id');
    await expectFailure(() => tokenizer.applyChatTemplate([]), 'INVALID_ARGUMENT', 'messages');
    const { chatTemplate: _, ...plain } = tokenizerFiles();
    const messages = [{ role: 'user', content: 'hi' }];
    await expectFailure(
      () => new Tokenizer(plain, 'x').applyChatTemplate(messages),
      'UNSUPPORTED',
      'chat template',
    );
    const raising = { ...plain, chatTemplate: "{{ raise_exception('roles must alternate') }}" };
    await expectFailure(
      () => new Tokenizer(raising, 'x').applyChatTemplate(messages),
      'INVALID_ARGUMENT',
      'must alternate',
    );
    await expectFailure(
      () => new Tokenizer({ ...plain, chatTemplate: '{% if %}' }, 'x'),
      'UNSUPPORTED',
      'chat template',
    );
  });

  test.each([
    ['no model', { model: undefined }, 'MALFORMED_FILE', 'model'],
    ['another model', { model: { type: 'WordPiece', vocab: {} } }, 'UNSUPPORTED', 'WordPiece'],
    ['no vocabulary', { model: { type: 'BPE', merges: [] } }, 'MALFORMED_FILE', 'vocab'],
    ['a huge id', { model: { type: 'BPE', vocab: { a: 4e9 }, merges: [] } }, 'MALFORMED_FILE', '4000000000'],
    [
      'an id that is text',
      { model: { type: 'BPE', vocab: { a: 'b' }, merges: [] } },
      'MALFORMED_FILE',
      '"a"',
    ],
    [
      'merges of one',
      { model: { type: 'BPE', vocab: { a: 0 }, merges: [['a']] } },
      'MALFORMED_FILE',
      'merges',
    ],
    [
      'a huge added token',
      { added_tokens: [{ id: 2 ** 31, content: 'x' }] },
      'MALFORMED_FILE',
      'added_tokens',
    ],
    ['no decoder', { decoder: null }, 'UNSUPPORTED', 'decoder'],
    ['a pre-tokenizer that is none', { pre_tokenizer: { type: 'Nonsense' } }, 'MALFORMED_FILE', 'Nonsense'],
  ] as const)('is refused for %s', async (_, change, code, part) => {
    const files = tokenizerFiles();
    Object.assign(files.tokenizer, change);
    await expectFailure(() => new Tokenizer(files, 'some/tokenizer.json'), code, part, 'some/tokenizer.json');
  });
});

describe('a tokenizer, as the Rust library reads it', () => {
  const fixture = readJson<{
    models: Record<string, Record<string, unknown>>;
    cases: {
      name: string;
      model: string;
      files: Record<string, unknown>;
      rows: [text: string, plain: number[], special: number[], split: number[]][];
    }[];
  }>('pre_tokenizers.json');

  test.each(fixture.cases)('gives its ids for $name', ({ name, model, files, rows }) => {
    const tokenizer = new Tokenizer(
      { tokenizer: { ...files, model: fixture.models[model] }, config: {} },
      name,
    );
    for (const [text, plain, special, split] of rows) {
      expect({
        text,
        plain: tokenizer.encode(text),
        special: tokenizer.encode(text, { special: true }),
        split: tokenizer.encode(text, { splitSpecialTokens: true }),
      }).toEqual({ text, plain, special, split });
    }
  });

  const cases = join(dirname(smollm), '..', 'cases');
  const testShared = existsSync(join(cases, 'digits-tokenizer.json')) ? test : test.skip;
  testShared("splits at all of Unicode's numbers [needs ../shared]", () => {
    const read = (name: string) => JSON.parse(readFileSync(join(cases, name), 'utf8'));
    const tokenizer = new Tokenizer({ tokenizer: read('digits-tokenizer.json'), config: {} }, 'digits');
    const expected = read('expected.json').digits as Record<string, number[]>;
    for (const [text, ids] of Object.entries(expected)) expect(tokenizer.encode(text)).toEqual(ids);
  });

  test('takes no special token from a span that is literal, and all others', () => {
    for (const normalized of [false, true]) {
      const files = tokenizerFiles();
      files.tokenizer.normalizer = { type: 'NFC' };
      for (const token of files.tokenizer.added_tokens as { normalized: boolean }[])
        token.normalized = normalized;
      const tokenizer = new Tokenizer(files, 'tiny');
      const text = '<|im_start|>a<|im_end|>b<|im_end|>';
      const [start, end] = [text.indexOf('<|im_end|>'), text.indexOf('b')];
      const ids = tokenizer.encode(text, { literal: [[start, end]] });
      expect([ids[0], ids.at(-1)]).toEqual([1, 2]);
      expect(ids.slice(1, -1)).toEqual(tokenizer.encode('a<|im_end|>b', { splitSpecialTokens: true }));
      expect(ids.slice(1, -1).some((id) => tokenizer.isSpecial(id))).toBe(false);
      expect(tokenizer.decode(ids)).toBe(text);
    }
  });

  // Ids of transformers 5.24, `AutoTokenizer.from_pretrained` of a folder with these files.
  test('reads added_tokens_decoder and the named tokens of tokenizer_config.json', () => {
    const files = tokenizerFiles();
    files.tokenizer.added_tokens = [];
    files.config = {
      added_tokens_decoder: {
        0: { content: '<|endoftext|>', special: true, normalized: false },
        1: { content: '<|im_start|>', special: true, normalized: false },
        400: { content: '<think>', special: false, normalized: false },
      },
      eos_token: '<|im_end|>',
    };
    const tokenizer = new Tokenizer(files, 'tiny');
    expect(tokenizer.encode('<|im_start|><think><|im_end|><|endoftext|>')).toEqual([1, 400, 2, 0]);
    expect([0, 1, 2, 400].map((id) => tokenizer.isSpecial(id))).toEqual([true, true, true, false]);
    expect(tokenizer.decode([400])).toBe('<think>');
    expect(tokenizer.size).toBe(401);
    expect(tokenizer.mergedSize).toBe(tinyTokens.length);
  });

  test('puts around a text what add_bos_token and add_eos_token ask for', () => {
    const files = tokenizerFiles();
    Object.assign(files.config, { add_bos_token: true, bos_token: '<|im_start|>', add_eos_token: true });
    const tokenizer = new Tokenizer(files, 'tiny');
    expect(tokenizer.encode('a', { special: true })).toEqual([1, ...tokenizer.encode('a'), 0]);
  });

  test('ends a completion with the end of turn of the template, be it special or not', () => {
    const files = tokenizerFiles();
    for (const token of files.tokenizer.added_tokens as { special: boolean }[]) token.special = false;
    expect(new Tokenizer(files, 'tiny').eosIds).toEqual([0, 2]);
  });
});

describe('a hostile tokenizer file', () => {
  const nested = (depth: number) => JSON.parse(`${'['.repeat(depth)}${']'.repeat(depth)}`) as unknown;
  const replace = (pattern: object, content: string) => ({ type: 'Replace', pattern, content });
  const growing = Array.from({ length: 40 }, () => replace({ String: 'a' }, 'aa'));
  const split = (pattern: string) => ({
    type: 'Sequence',
    pretokenizers: [
      { type: 'Split', pattern: { Regex: pattern }, behavior: 'Isolated', invert: false },
      { type: 'ByteLevel', add_prefix_space: false, use_regex: false },
    ],
  });
  const around = (single: unknown, special_tokens: unknown = {}) => ({
    post_processor: { type: 'TemplateProcessing', single, special_tokens },
  });

  test.each([
    ['a pattern that tries all divisions', { pre_tokenizer: split('(a+)+$') }, 'MALFORMED_FILE', 'for ever'],
    ['such a normalizer', { normalizer: replace({ Regex: '(a|a)*$' }, '') }, 'MALFORMED_FILE', 'for ever'],
    ['a pattern that is none', { pre_tokenizer: split('(') }, 'UNSUPPORTED', 'pattern'],
    ['a pattern that is huge', { pre_tokenizer: split('a'.repeat(1e6)) }, 'MALFORMED_FILE', 'longer'],
    [
      'a content that is huge',
      { normalizer: replace({ String: 'a' }, 'b'.repeat(1e6)) },
      'MALFORMED_FILE',
      'content',
    ],
    ['a normalizer that is a list', { normalizer: [] }, 'MALFORMED_FILE', 'normalizers'],
    [
      'a sequence of null',
      { normalizer: { type: 'Sequence', normalizers: null } },
      'MALFORMED_FILE',
      'normalizers',
    ],
    ['a post-processor with nothing in it', around(null), 'MALFORMED_FILE', 'single'],
    ['a post-processor of null', around([null]), 'MALFORMED_FILE', 'single'],
    [
      'a token of the post-processor that is missing',
      around([{ SpecialToken: { id: '__proto__' } }]),
      'MALFORMED_FILE',
      'single',
    ],
    [
      'a text that comes twice',
      around([{ Sequence: { id: 'A' } }, { Sequence: { id: 'A' } }]),
      'MALFORMED_FILE',
      'once',
    ],
    ['a post-processor that is text', { post_processor: 'x' }, 'UNSUPPORTED', 'post-processor'],
    ['sequences in sequences', { pre_tokenizer: nested(10_000) }, 'MALFORMED_FILE', 'deep'],
    ['a decoder of depth alone', { decoder: nested(100_000) }, 'MALFORMED_FILE', 'deep'],
    ['an added token of depth alone', { added_tokens: [nested(100_000)] }, 'MALFORMED_FILE', 'deep'],
    ['an added token that is null', { added_tokens: [null] }, 'MALFORMED_FILE', 'added_tokens'],
    [
      'two added tokens of one id',
      {
        added_tokens: [
          { id: 1, content: 'x' },
          { id: 1, content: 'y' },
        ],
      },
      'MALFORMED_FILE',
      'in common',
    ],
    ['a type from the prototype', { pre_tokenizer: { type: '__proto__' } }, 'MALFORMED_FILE', '__proto__'],
    [
      'Precompiled',
      { normalizer: { type: 'Precompiled', precompiled_charsmap: '' } },
      'UNSUPPORTED',
      'Precompiled',
    ],
    [
      'a subword prefix',
      { model: { type: 'BPE', vocab: {}, merges: [], continuing_subword_prefix: '##' } },
      'UNSUPPORTED',
      'continuing_subword_prefix',
    ],
  ] as const)('is refused for %s', async (_, change, code, part) => {
    const files = tokenizerFiles();
    Object.assign(files.tokenizer, change);
    await expectFailure(() => new Tokenizer(files, 'some/tokenizer.json'), code, part);
  });

  test('is refused for added_tokens_decoder that is none', async () => {
    for (const decoder of ['x', [], { '-1': { content: 'x' } }, { 1: null }, { 1e9: { content: 'x' } }]) {
      const files = tokenizerFiles();
      files.config.added_tokens_decoder = decoder;
      await expectFailure(() => new Tokenizer(files, 'x'), 'MALFORMED_FILE', 'added_tokens_decoder');
    }
  });

  test('names its vocabulary as it likes', () => {
    const files = tokenizerFiles();
    const { vocab: plain } = files.tokenizer.model as { vocab: object };
    const vocab = JSON.parse(`${JSON.stringify(plain).slice(0, -1)},"__proto__":290,"constructor":291}`);
    files.tokenizer.model = { ...(files.tokenizer.model as object), vocab };
    const tokenizer = new Tokenizer(files, 'tiny');
    expect([tokenizer.idOf('__proto__'), tokenizer.idOf('constructor'), tokenizer.idOf('toString')]).toEqual([
      290,
      291,
      undefined,
    ]);
    expect(tokenizer.decode(tokenizer.encode('__proto__'))).toBe('__proto__');
  });

  test('ends with an error where a text grows without bound', async () => {
    const files = { ...tokenizerFiles(), chatTemplate: 'x' };
    files.tokenizer.normalizer = { type: 'Sequence', normalizers: growing };
    const tokenizer = new Tokenizer(files, 'growing.json');
    await expectFailure(
      () => tokenizer.encode('a'.repeat(1000)),
      'MALFORMED_FILE',
      'growing.json',
      'normalizer',
    );
  });

  test('ends with an error where a pattern takes too long on one text alone', async () => {
    const files = tokenizerFiles();
    files.tokenizer.pre_tokenizer = split('(?:z+z+)+y');
    const tokenizer = new Tokenizer(files, 'x');
    expect(tokenizer.decode(tokenizer.encode('zzzy z'))).toBe('zzzy z');
    await expectFailure(() => tokenizer.encode('z'.repeat(64)), 'UNSUPPORTED', '64 characters');
  });
});

interface Expected {
  texts: string[];
  ids: Record<string, number[][]>;
}

describe('a SentencePiece tokenizer of a GGUF file', () => {
  const here = dirname(fileURLToPath(import.meta.url));
  const fixture = JSON.parse(readFileSync(join(here, 'fixtures', 'sentencepiece.json'), 'utf8')) as {
    tokens: string[];
    scores: number[];
    types: number[];
    texts: string[];
    ids: number[][];
  };
  const metadata = new Map<string, GgufValue>([
    ['tokenizer.ggml.model', 'llama'],
    ['tokenizer.ggml.tokens', fixture.tokens],
    ['tokenizer.ggml.scores', fixture.scores],
    ['tokenizer.ggml.token_type', fixture.types],
    ['tokenizer.ggml.unknown_token_id', 0],
    ['tokenizer.ggml.bos_token_id', 1],
    ['tokenizer.ggml.eos_token_id', 2],
  ]);
  const file = { path: 'tiny.gguf', metadata, tensors: new Map() };
  const tokenizer = new Tokenizer(tokenizerFromGguf(file, fixture.tokens.length), 'tiny.gguf');

  test.each(fixture.texts.map((text, i) => [text, i] as const))(
    'gives the ids of sentencepiece for %j',
    (text, i) => {
      const ids = tokenizer.encode(text);
      expect(ids).toEqual(fixture.ids[i]);
      expect(tokenizer.decode(ids)).toBe(text);
    },
  );

  test('goes on after other tokens without a dummy prefix', () => {
    const whole = tokenizer.encode('The knight says');
    const first = tokenizer.encode('The knight');
    expect(whole.slice(0, first.length)).toEqual(first);
    expect(tokenizer.encodeContinuation(' says')).toEqual(whole.slice(first.length));
    expect(tokenizer.encodeContinuation('knight')).not.toEqual(tokenizer.encode('knight'));
  });

  test('begins a prompt with its begin-of-sequence token', () => {
    expect(tokenizer.encodePrompt('x')).toEqual([1, ...tokenizer.encode('x')]);
    expect(tokenizer.eosIds).toEqual([2]);
  });
});

describe('a byte-level tokenizer of a GGUF file', () => {
  const end = tinyTokens.indexOf('<|im_end|>');
  const chat =
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' + '\\n' }}{% endfor %}";
  const fields = (changes: Record<string, GgufValue | undefined> = {}) => {
    const all: Record<string, GgufValue | undefined> = {
      'tokenizer.ggml.model': 'gpt2',
      'tokenizer.ggml.pre': 'gpt-2',
      'tokenizer.ggml.tokens': tinyTokens,
      'tokenizer.ggml.merges': ['h e', 'l l', 'o w', 'he ll', 'Ġ w', 'Ġw o'],
      'tokenizer.ggml.token_type': tinyTokens.map((_, id) => (id < 3 ? 3 : 1)),
      'tokenizer.ggml.bos_token_id': 0,
      'tokenizer.ggml.eos_token_id': 0,
      'tokenizer.chat_template': chat,
      ...changes,
    };
    const given = Object.entries(all).filter((entry): entry is [string, GgufValue] => entry[1] !== undefined);
    return { path: 'tiny.gguf', metadata: new Map(given), tensors: new Map() };
  };
  const read = (changes: Record<string, GgufValue | undefined> = {}) =>
    new Tokenizer(tokenizerFromGguf(fields(changes), tinyTokens.length), 'tiny.gguf');

  // llama.cpp's src/llama-vocab.cpp: `add_bos = true` for these pre-tokenizers, unless the file says
  // otherwise.
  test.each([
    ['gpt-2', undefined, []],
    ['qwen2', undefined, []],
    ['smollm', undefined, []],
    ['llama-bpe', undefined, [0]],
    ['llama3', undefined, [0]],
    ['llama-v3', undefined, [0]],
    ['llama-bpe', false, []],
    ['gpt-2', true, [0]],
  ] as const)('cut as %s begins texts as llama.cpp does where add_bos_token is %s', (pre, flag, before) => {
    const tokenizer = read({ 'tokenizer.ggml.pre': pre, 'tokenizer.ggml.add_bos_token': flag });
    expect(tokenizer.encodePrompt('hello')).toEqual([...before, ...tokenizer.encode('hello')]);
  });

  test('ends texts where the file asks for it', () => {
    const tokenizer = read({ 'tokenizer.ggml.add_eos_token': true, 'tokenizer.ggml.eos_token_id': end });
    expect(tokenizer.encodePrompt('hello')).toEqual([...tokenizer.encode('hello'), end]);
  });

  test.each([1, 4])('ends completions with an end of turn that is typed %i', (type) => {
    const types = tinyTokens.map((_, id) => (id < 3 ? type : 1));
    const tokenizer = read({ 'tokenizer.ggml.token_type': types });
    expect(tokenizer.eosIds).toEqual([0, end]);
    expect(tokenizer.encode('a<|im_end|>')).toEqual([...tokenizer.encode('a'), end]);
    expect([0, 1, 2].map((id) => tokenizer.isSpecial(id))).toEqual([true, true, true]);
    expect(tokenizer.encode('<|im_start|>', { splitSpecialTokens: true })).not.toContain(1);
  });

  test('leaves an ordinary token ordinary, be it the end of texts', () => {
    const line = tinyTokens.indexOf('Ċ');
    const tokenizer = read({ 'tokenizer.ggml.eos_token_id': line, 'tokenizer.ggml.bos_token_id': line });
    expect(tokenizer.isSpecial(line)).toBe(false);
    expect(tokenizer.eosIds).toContain(line);
  });

  test('says that the file does not tell how text is cut', () => {
    expect(read().notices).toEqual([]);
    const [notice] = read({ 'tokenizer.ggml.pre': undefined }).notices;
    expect(notice).toMatch(/tiny\.gguf.*tokenizer\.ggml\.pre/);
  });

  test.each(['__proto__', 'constructor', 'nonsense'])('is refused for the pre-tokenizer %s', async (pre) => {
    await expectFailure(() => read({ 'tokenizer.ggml.pre': pre }), 'UNSUPPORTED', pre, 'llama-bpe');
  });
});

const describeShared = existsSync(smollm) ? describe : describe.skip;
describeShared('the tokenizer of SmolLM2 [needs ../shared]', () => {
  const here = dirname(fileURLToPath(import.meta.url));
  const expected = JSON.parse(readFileSync(join(here, 'fixtures', 'tokens.json'), 'utf8')) as Expected;
  let file: GgufFile;
  beforeAll(async () => {
    file = await readGguf(smollm);
  });

  test.each(Object.keys(expected.ids))(
    'cut as %s gives the ids of the Rust library, and the text back',
    (pre) => {
      const metadata = new Map(file.metadata).set('tokenizer.ggml.pre', pre);
      const files = tokenizerFromGguf({ ...file, metadata }, 49_152);
      // The fixture's words are merged in every case; its texts are not normalised.
      Object.assign(files.tokenizer, { normalizer: null });
      (files.tokenizer.model as Record<string, unknown>).ignore_merges = false;
      const tokenizer = new Tokenizer(files, smollm);
      expected.texts.forEach((text, i) => {
        const ids = tokenizer.encode(text);
        expect({ text, ids }).toEqual({ text, ids: expected.ids[pre]?.[i] });
        expect(tokenizer.decode(ids)).toBe(text);
      });
    },
  );

  test('writes ChatML and ends with its end of turn', () => {
    const tokenizer = new Tokenizer(tokenizerFromGguf(file, 49_152), smollm);
    expect(tokenizer.eosIds).toEqual([2]);
    expect(
      tokenizer.applyChatTemplate([{ role: 'user', content: 'hi' }], { addGenerationPrompt: true }),
    ).toBe(
      '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' +
        '<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n',
    );
  });
});
