import { readFileSync } from 'node:fs';
import { readTokenizerFiles } from '../../../lib/policy/model-files.js';
import { Tokenizer } from '../../../lib/policy/tokenizer.js';
import { encodePrompt } from '../../../lib/prompt/encode-prompt.js';
import { tokenizerFiles } from '../../policy/tiny-model.js';
import type { Draw } from '../draw.js';
import { hostileText, mutatedJsonText, mutateText } from '../mutate.js';
import { type Target, textOf, writeInput } from '../target.js';

const tiny = tokenizerFiles();
const shipped = JSON.parse(
  readFileSync(new URL('../../../models/merf-mini/tokenizer.json', import.meta.url), 'utf8'),
) as Record<string, unknown>;

const texts = [
  'The quick brown fox, 12345 jumps!\n\n  over\tthe lazy dogs.',
  "I'm sure they'll've Ünïcödé ١٢٣ 中文字符 👩‍👩‍👧 İ ß ﬁ",
  `${'a'.repeat(300)} ${' '.repeat(300)}${'0'.repeat(300)}${'.'.repeat(300)}`,
  '<|im_start|>user\n<|im_end|><|endoftext|>',
];

/** A pattern of the kinds that tokenizers have, and of those that they should not. */
function pattern(draw: Draw, depth = 3): string {
  const atom = () => {
    if (depth > 0 && draw.chance(0.4)) {
      const open = draw.pick(['(', '(?:', '(?i:', '(?=', '(?!', '(?<=', '(?<!', '(?>', '(?<n>']);
      return `${open}${pattern(draw, depth - 1)})`;
    }
    return draw.pick([
      'a',
      'ab',
      '.',
      '\\s',
      '\\S',
      '\\w',
      '\\d',
      '\\p{L}',
      '\\p{N}',
      '\\p{Han}',
      '\\p{IsAlpha}',
      '[^\\s\\p{L}\\p{N}]',
      '[a-z&&[^b]]',
      '[[:alpha:]]',
      '\\1',
      '\\A',
      '\\z',
      '\\R',
      '\\X',
      '\\h',
      '^',
      '$',
      '\\b',
      ' ?',
      '\\x{1F600}',
      '(?i)',
      "'(?:[sdmt]|ll|ve|re)",
      '[',
      ')',
    ]);
  };
  const quantified = () =>
    atom() + draw.pick(['', '', '+', '*', '?', '++', '*+', '{1,3}', '{0,9999}', '{2,}', '+?', '{,2}']);
  const parts = Array.from({ length: 1 + draw.below(4) }, quantified).join('');
  return draw.chance(0.3) ? `${parts}|${quantified()}` : parts;
}

function patternOf(draw: Draw): object {
  return draw.chance(0.7)
    ? { Regex: pattern(draw) }
    : { String: draw.pick([' ', '', 'a', hostileText(draw)]) };
}

function normalizer(draw: Draw): object {
  return draw.pick<() => object>([
    () => ({
      type: draw.pick(['NFC', 'NFD', 'NFKC', 'NFKD', 'Lowercase', 'StripAccents', 'Nmt', 'Precompiled']),
    }),
    () => ({ type: 'Strip', strip_left: draw.chance(0.5), strip_right: draw.chance(0.5) }),
    () => ({ type: 'Prepend', prepend: draw.pick(['▁', '', hostileText(draw)]) }),
    () => ({
      type: 'Replace',
      pattern: patternOf(draw),
      content: draw.pick(['▁', '', '$&$&', 'aa', hostileText(draw)]),
    }),
  ])();
}

const behaviors = ['Removed', 'Isolated', 'MergedWithPrevious', 'MergedWithNext', 'Contiguous'];

function preTokenizer(draw: Draw): object {
  return draw.pick<() => object>([
    () => ({ type: 'ByteLevel', add_prefix_space: draw.chance(0.5), use_regex: draw.chance(0.5) }),
    () => ({ type: 'Digits', individual_digits: draw.chance(0.5) }),
    () => ({
      type: 'Split',
      pattern: patternOf(draw),
      behavior: draw.pick(behaviors),
      invert: draw.chance(0.3),
    }),
    () => ({ type: 'Punctuation', behavior: draw.pick(behaviors) }),
    () => ({ type: draw.pick(['Whitespace', 'WhitespaceSplit', 'BertPreTokenizer', 'CharDelimiterSplit']) }),
    () => ({
      type: 'Metaspace',
      replacement: draw.pick(['▁', '', 'ab']),
      prepend_scheme: draw.pick(['always', 'never', 'first', 'x']),
      split: draw.chance(0.5),
    }),
  ])();
}

function postProcessor(draw: Draw): object | null {
  return draw.pick<() => object | null>([
    () => null,
    () => ({ type: 'ByteLevel' }),
    () => ({ type: 'BertProcessing', cls: ['<|im_start|>', 1], sep: ['<|im_end|>', 2] }),
    () => ({
      type: 'TemplateProcessing',
      single: [{ SpecialToken: { id: '<|im_start|>', type_id: 0 } }, { Sequence: { id: 'A', type_id: 0 } }],
      pair: [],
      special_tokens: { '<|im_start|>': { id: '<|im_start|>', ids: [1], tokens: ['<|im_start|>'] } },
    }),
    () => ({ type: 'Sequence', processors: [{ type: 'ByteLevel' }, postProcessor(draw)] }),
  ])();
}

function sequence(draw: Draw, type: 'normalizers' | 'pretokenizers', part: (draw: Draw) => object): object {
  if (draw.chance(0.5)) return part(draw);
  return { type: 'Sequence', [type]: Array.from({ length: draw.below(4) }, () => part(draw)) };
}

function described(draw: Draw): object {
  const base = draw.chance(0.7) ? tiny.tokenizer : shipped;
  const decoder = draw.pick([
    base.decoder,
    { type: 'ByteFallback' },
    { type: 'Metaspace', replacement: '▁', prepend_scheme: 'always' },
    {
      type: 'Sequence',
      decoders: [
        { type: 'ByteFallback' },
        { type: 'Fuse' },
        { type: 'Strip', content: ' ', start: 1, stop: 0 },
      ],
    },
  ]);
  const added = (base.added_tokens as Record<string, unknown>[]).map((token) =>
    draw.chance(0.3)
      ? {
          ...token,
          [draw.pick(['single_word', 'lstrip', 'rstrip', 'normalized', 'special'])]: draw.chance(0.5),
        }
      : token,
  );
  return {
    ...base,
    added_tokens: added,
    decoder: draw.chance(0.2) ? decoder : base.decoder,
    normalizer: draw.chance(0.4) ? sequence(draw, 'normalizers', normalizer) : base.normalizer,
    pre_tokenizer: draw.chance(0.4) ? sequence(draw, 'pretokenizers', preTokenizer) : base.pre_tokenizer,
    post_processor: draw.chance(0.4) ? postProcessor(draw) : base.post_processor,
  };
}

/** Reads a tokenizer and has it do all that it does, up to the first thing that it refuses. */
const tokenizer: Target = {
  name: 'tokenizer',
  // Its patterns may take 2 s each where they are compiled, and 5 s where they divide a text.
  seconds: 20,
  make(draw) {
    const json = described(draw);
    return {
      'tokenizer.json': draw.chance(0.6) ? mutatedJsonText(draw, json) : JSON.stringify(json),
      'tokenizer_config.json': draw.chance(0.3)
        ? mutatedJsonText(draw, {
            ...tiny.config,
            add_bos_token: true,
            bos_token: { content: '<|im_start|>' },
            added_tokens_decoder: { 1: { content: '<|im_start|>', special: true } },
            additional_special_tokens: ['<|im_end|>'],
          })
        : JSON.stringify(tiny.config),
      'chat_template.jinja': tiny.chatTemplate,
      'text.txt': draw.chance(0.5) ? draw.pick(texts) : mutateText(draw, draw.pick(texts)).slice(0, 20_000),
    };
  },
  async run(input, folder) {
    writeInput(folder, input);
    const read = new Tokenizer(await readTokenizerFiles(folder), folder);
    const text = textOf(input, 'text.txt');
    const ids = read.encode(text, { special: true });
    read.decode(ids, { skipSpecial: true });
    read.encodeContinuation(text.slice(0, 100));
    read.byteTable(read.size);
    return encodePrompt(read, [
      { role: 'system', content: 'Be kind.' },
      { role: 'user', content: text.slice(0, 1000) },
    ]).tokens.length;
  },
};

export const tokenizerTargets: readonly Target[] = [tokenizer];
