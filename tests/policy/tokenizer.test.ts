import { existsSync, readFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { beforeAll, describe, expect, test } from '@jest/globals';
import { type GgufFile, type GgufValue, readGguf } from '../../lib/policy/gguf.js';
import { tokenizerFromGguf } from '../../lib/policy/gguf-tokenizer.js';
import { TextStream, Tokenizer } from '../../lib/policy/tokenizer.js';
import { expectFailure, smollm, tokenizerFiles } from './helpers.js';

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

  test('begins a prompt with its begin-of-sequence token', () => {
    expect(tokenizer.encodePrompt('x')).toEqual([1, ...tokenizer.encode('x')]);
    expect(tokenizer.eosIds).toEqual([2]);
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
