import type { Forest, Segment } from './forest.js';

/** A prompt and what follows it, each of several turns a path of segments. */
export interface Branch {
  promptTokens: ArrayLike<number>;
  completions: Segment[];
}

/**
 * One tree of all branches: what their prompts begin with in common (the motivation, mostly) is the root, the
 * rest of each prompt a child of it, and its completions that one's children. Targets keep the order of the
 * branches.
 */
export function forestOf(branches: readonly Branch[]): Forest {
  const prompts = branches.map((branch) => branch.promptTokens);
  const shared = branches.length > 1 ? commonPrefix(prompts) : 0;
  const children = branches.map(
    ({ promptTokens, completions }): Segment => ({
      tokens: slice(promptTokens, shared),
      children: completions,
    }),
  );
  const first = prompts[0];
  return shared > 0 && first !== undefined ? [{ tokens: slice(first, 0, shared), children }] : children;
}

/** Tokens computed for a forest: each distinct one once. */
export function countTokens(forest: Forest): number {
  return forest.reduce(
    (sum, segment) => sum + segment.tokens.length + countTokens(segment.children ?? []),
    0,
  );
}

/** How many tokens all begin with; at least one token of each is left over, so that no segment is empty. */
function commonPrefix(sequences: readonly ArrayLike<number>[]): number {
  const first = sequences[0] as ArrayLike<number>;
  let length = Math.min(...sequences.map((sequence) => sequence.length)) - 1;
  for (const sequence of sequences) {
    let i = 0;
    while (i < length && sequence[i] === first[i]) i++;
    length = i;
  }
  return Math.max(0, length);
}

function slice(tokens: ArrayLike<number>, from: number, to = tokens.length): number[] {
  return Array.prototype.slice.call(tokens, from, to) as number[];
}
