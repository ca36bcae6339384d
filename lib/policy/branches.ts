import type { Forest, Segment } from './forest.js';

/** A prompt and what follows it, each of several turns a path of segments. */
export interface Branch {
  promptTokens: ArrayLike<number>;
  completions: Segment[];
}

// A shared beginning of fewer tokens is computed twice: it would cost a segment of its own more than it saves.
const leastShared = 16;

/**
 * One tree of all branches: what their prompts begin with in common (the beginning of the system message, mostly) is the
 * root, and what neighbours among them begin with beyond that (its motivation, say) a child of it; below stand the rest
 * of each prompt and its completions. Targets keep the order of the branches, so those that share much belong beside each
 * other.
 */
export function forestOf(branches: readonly Branch[]): Forest {
  return segmentsOf(branches, 0, 1);
}

/** Segments of branches whose first `depth` tokens stand above them. */
function segmentsOf(branches: readonly Branch[], depth: number, least: number): Segment[] {
  return neighbours(branches, depth, least).flatMap((together): Segment[] => {
    const [first] = together as [Branch];
    if (together.length === 1) {
      return [{ tokens: slice(first.promptTokens, depth), children: first.completions }];
    }
    const shared = commonPrefix(together.map((branch) => branch.promptTokens));
    const tokens = slice(first.promptTokens, depth, shared);
    return [{ tokens, children: segmentsOf(together, shared, leastShared) }];
  });
}

/** The branches in stretches, each as long as all of it share at least `least` tokens behind `depth`. */
function neighbours(branches: readonly Branch[], depth: number, least: number): Branch[][] {
  const stretches: Branch[][] = [];
  for (const branch of branches) {
    const stretch = stretches.at(-1);
    const first = stretch?.[0];
    // At least one token of each branch is left over, so that no segment is empty.
    const shared = first ? commonPrefix([first.promptTokens, branch.promptTokens]) - depth : 0;
    if (stretch && shared >= least) stretch.push(branch);
    else stretches.push([branch]);
  }
  return stretches;
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
