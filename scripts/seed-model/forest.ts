import type { Segment, Tokenizer } from '../../lib/policy/index.js';
import type { Lesson } from './corpus.js';

/**
 * A lesson as one tree: the system message is the root, then what all questions begin with, the rest of each
 * question, and its completion. Completions alone are learned: most of a question cannot be foreseen, and learning it
 * would drown what a completion teaches.
 */
export function lessonTree(lesson: Lesson, tokenizer: Tokenizer): Segment {
  const end = tokenizer.eosIds[0] as number;
  const system = tokenizer.applyChatTemplate([lesson.system]);
  const examples = lesson.examples.map(({ question, completion }) => {
    const prompt = tokenizer.applyChatTemplate([lesson.system, question], { addGenerationPrompt: true });
    return {
      question: tokenizer.encode(prompt.slice(system.length)),
      completion: [...tokenizer.encode(completion), end],
    };
  });
  const shared = commonLength(examples.map(({ question }) => question));
  const first = examples[0]?.question ?? [];
  return {
    tokens: tokenizer.encode(system),
    children: [
      {
        tokens: first.slice(0, shared),
        children: examples.map(({ question, completion }) => ({
          tokens: question.slice(shared),
          children: [{ tokens: completion, train: {} }],
        })),
      },
    ],
  };
}

/** How many tokens all of the lists begin with in common. */
function commonLength(lists: readonly (readonly number[])[]): number {
  const [first = [], ...others] = lists;
  const differs = first.findIndex((token, i) => others.some((other) => other[i] !== token));
  return differs < 0 ? first.length : differs;
}
