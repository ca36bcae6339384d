import type { ModelConfig, TokenizerFiles } from '../../lib/policy/index.js';
import { trainTokenizer } from './train-tokenizer.js';

const endOfText = '<|endoftext|>';
const turnStart = '<|im_start|>';
const turnEnd = '<|im_end|>';

const vocabularySize = 800;

/** ChatML (as Qwen and SmolLM2 use it): every turn between two special tokens, with the role in its first line. */
const chatTemplate =
  "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}" +
  "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";

export const contextLength = 2048;

export const modelConfig: ModelConfig = {
  architecture: 'llama',
  hiddenSize: 128,
  layers: 4,
  heads: 4,
  kvHeads: 4,
  headSize: 32,
  mlpSize: 384,
  vocabSize: vocabularySize,
  rmsNormEps: 1e-5,
  tiedHead: false,
  attentionBias: false,
  outputBias: false,
  mlpBias: false,
  maxPositions: contextLength,
  rope: { type: 'default', theta: 10_000 },
};

/** A tokenizer trained on the texts, with all that a Hugging Face directory has beside the weights. */
export function tokenizerFiles(texts: Iterable<string>): TokenizerFiles {
  const tokenizer = trainTokenizer(texts, {
    vocabularySize,
    special: [endOfText, turnStart, turnEnd],
    whole: ['<think>', '</think>', '<answer>', '</answer>'],
  });
  const idOf = (content: string) =>
    (tokenizer.added_tokens as { id: number; content: string }[]).find((token) => token.content === content)
      ?.id;
  return {
    tokenizer,
    config: {
      tokenizer_class: 'PreTrainedTokenizerFast',
      model_max_length: contextLength,
      eos_token: turnEnd,
      pad_token: endOfText,
      clean_up_tokenization_spaces: false,
    },
    generation: { eos_token_id: idOf(turnEnd), pad_token_id: idOf(endOfText), do_sample: true },
    chatTemplate,
  };
}
