import { invalidArgument, MerfError } from '../errors.js';

/** Tokens that stand after their parent's; every path from a root to a leaf is one sequence. */
export interface Segment {
  /** Token ids; may be empty. */
  tokens: ArrayLike<number>;
  children?: Segment[] | undefined;
  /** Present where the segment's tokens are scored or trained on: a completion. */
  train?: TrainTarget | undefined;
}

/** Per-token arrays have one element for each of the segment's tokens. */
export interface TrainTarget {
  /**
   * The advantage of the whole completion, or [tokens] of each token (an importance weight times an advantage, say); every
   * loss but cross_entropy needs it.
   */
  advantage?: number | ArrayLike<number> | undefined;
  /** Coefficient of the KL penalty on this target, at least 0. Default: the loss's. */
  kl?: number | undefined;
  /** Coefficient of the entropy bonus on this target. Default: the loss's. */
  entropy?: number | undefined;
  /**
   * Log-probabilities under the policy that drew the tokens (`Completion.logprobs`), at the loss's temperature. Default:
   * those of the policy as it is now.
   */
  logprobs?: ArrayLike<number> | undefined;
  /** Log-probabilities under the reference policy, for the KL penalty, at the loss's temperature. */
  referenceLogprobs?: ArrayLike<number> | undefined;
  /** 0 leaves a token out of loss and scores. Default: all 1. */
  mask?: ArrayLike<number> | undefined;
  /** Segments of one completion of several turns share a number; they lie on one path. Default: one of its own. */
  sequence?: number | undefined;
}

export type Forest = Segment[];

/** A forest in depth-first order: key j is visible to query i exactly when j <= i < visibleUntil[j]. All [T] int32. */
export interface PackedTokens {
  tokens: Int32Array;
  /** Depth along the path, in tokens. */
  positions: Int32Array;
  visibleUntil: Int32Array;
}

/** A segment with a `train` target. */
export interface Target {
  tokens: Int32Array;
  train: TrainTarget;
  /** Which completion it belongs to, counted from 0 in the order in which they begin. */
  sequence: number;
  /** Indices of the tokens that are scored: mask is not 0 and a token stands before them. */
  active: Int32Array;
}

/** A forest checked and packed, with a loss row for each active token of its R. */
export interface PackedForest extends PackedTokens {
  /** In depth-first order. */
  targets: Target[];
  /** How many completions there are, those without an active token included. */
  completions: number;
  /** [R] the packed row whose logits predict, and the id predicted. */
  sourceRows: Int32Array;
  predicted: Int32Array;
  /** [R] which of the targets a row belongs to, and which of its tokens is predicted. */
  rowTarget: Int32Array;
  rowToken: Int32Array;
  /** [R] rising from 0, contiguous: the completions that have active tokens. */
  sequences: Int32Array;
}

export interface PackOptions {
  vocabSize: number;
  /** The most tokens that a path may hold. */
  contextLength: number;
}

interface FlatSegment {
  parent: number;
  tokens: Int32Array;
  /** Tokens before this segment on its path. */
  depth: number;
  /** Index into the targets; -1 where it is none. */
  target: number;
}

const maxNesting = 10_000;

/**
 * Checks a forest and packs it in depth-first order. Segments without a target in or under them are left out.
 * A root's first token is never a target: nothing predicts it.
 * @throws MerfError INVALID_ARGUMENT, CONTEXT_EXCEEDED
 */
export function packForest(forest: Forest, options: PackOptions): PackedForest {
  const { segments, targets, completions } = flatten(forest, options);
  if (targets.length === 0) {
    throw new MerfError(
      'INVALID_ARGUMENT',
      'Expected at least one segment with a train target in the forest',
    );
  }
  const { starts, ...packed } = packSegments(segments, withTargets(segments));
  return { ...packed, targets, completions, ...lossRows(segments, targets, starts) };
}

function flatten(forest: Forest, { vocabSize, contextLength }: PackOptions) {
  if (!Array.isArray(forest) || forest.length === 0)
    throw invalidArgument('forest', 'at least one segment', forest);
  const segments: FlatSegment[] = [];
  const targets: Target[] = [];
  // By the number that its segments share: which completion it is, and its last segment so far.
  const sequences = new Map<number, { index: number; last: number; nesting: number }>();
  let completions = 0;
  /** Segments above the one that is visited, and that itself, by how deep they are nested. */
  const path: number[] = [];

  const stack = forest
    .map((segment, i) => ({ segment, parent: -1, nesting: 0, where: `forest[${i}]` }))
    .reverse();
  for (let next = stack.pop(); next !== undefined; next = stack.pop()) {
    const { segment, parent, nesting, where } = next;
    if (nesting > maxNesting)
      throw invalidArgument(where, `at most ${maxNesting} nested segments`, 'more of them');
    const above = segments[parent];
    const tokens = checkedTokens(segment?.tokens, vocabSize, `${where}.tokens`);
    const depth = above === undefined ? 0 : above.depth + above.tokens.length;
    if (depth + tokens.length > contextLength) {
      throw new MerfError(
        'CONTEXT_EXCEEDED',
        `Expected at most ${contextLength} tokens on a path but ${where} ends at ${depth + tokens.length}`,
      );
    }
    const index = segments.length;
    path[nesting] = index;
    segments.push({ parent, tokens, depth, target: segment.train === undefined ? -1 : targets.length });
    if (segment.train !== undefined) {
      const active = activeTokens(segment.train, tokens.length, depth, `${where}.train`);
      const key = segment.train.sequence;
      const before = key === undefined ? undefined : sequences.get(key);
      if (before !== undefined && !(before.nesting < nesting && path[before.nesting] === before.last)) {
        throw new MerfError(
          'INVALID_ARGUMENT',
          `Expected the segments of sequence ${key} on one path but ${where} is on another`,
        );
      }
      const sequence = before?.index ?? completions++;
      if (key !== undefined) sequences.set(key, { index: sequence, last: index, nesting });
      targets.push({ tokens, train: segment.train, sequence, active });
    }
    const children = segment.children ?? [];
    if (!Array.isArray(children))
      throw invalidArgument(`${where}.children`, 'an array of segments', children);
    for (let i = children.length - 1; i >= 0; --i) {
      const child = children[i] as Segment;
      stack.push({ segment: child, parent: index, nesting: nesting + 1, where: `${where}.children[${i}]` });
    }
  }
  return { segments, targets, completions };
}

/** Indices of the segments that have a target in or under them, in depth-first order. */
function withTargets(segments: readonly FlatSegment[]): number[] {
  const wanted = segments.map(({ target }) => target !== -1);
  for (let i = segments.length - 1; i > 0; --i) {
    const { parent } = segments[i] as FlatSegment;
    if (wanted[i] && parent !== -1) wanted[parent] = true;
  }
  return Array.from(wanted.keys()).filter((i) => wanted[i]);
}

/** @throws MerfError INVALID_ARGUMENT naming the first that is no id of the vocabulary */
export function checkedTokens(tokens: ArrayLike<number>, vocabSize: number, argument: string): Int32Array {
  if (
    typeof tokens !== 'object' ||
    tokens === null ||
    !Number.isSafeInteger(tokens.length) ||
    tokens.length < 0
  ) {
    throw invalidArgument(argument, 'an array of token ids', tokens);
  }
  const checked = new Int32Array(tokens.length);
  for (let i = 0; i < tokens.length; ++i) {
    const id = tokens[i];
    if (!Number.isInteger(id) || (id as number) < 0 || (id as number) >= vocabSize) {
      throw invalidArgument(`${argument}[${i}]`, `a token id below ${vocabSize}`, id);
    }
    checked[i] = id as number;
  }
  return checked;
}

function activeTokens(train: TrainTarget, length: number, depth: number, where: string): Int32Array {
  const perToken = {
    logprobs: train.logprobs,
    referenceLogprobs: train.referenceLogprobs,
    ...(typeof train.advantage === 'object' && train.advantage !== null && { advantage: train.advantage }),
  };
  for (const [key, values] of Object.entries({ ...perToken, mask: train.mask })) {
    if (values !== undefined && values.length !== length) {
      throw invalidArgument(`${where}.${key}`, `${length} values, one for each token,`, values);
    }
  }
  for (const key of ['advantage', 'kl', 'entropy'] as const) {
    const value = train[key];
    if (value === undefined || (key === 'advantage' && 'advantage' in perToken)) continue;
    const valid = Number.isFinite(value) && (key !== 'kl' || (value as number) >= 0);
    if (!valid)
      throw invalidArgument(
        `${where}.${key}`,
        key === 'kl' ? 'a non-negative number' : 'a finite number',
        value,
      );
  }
  if (train.sequence !== undefined && !Number.isSafeInteger(train.sequence)) {
    throw invalidArgument(`${where}.sequence`, 'an integer', train.sequence);
  }
  const { mask } = train;
  const active: number[] = [];
  for (let i = depth === 0 ? 1 : 0; i < length; ++i) {
    const included = mask === undefined ? 1 : mask[i];
    if (included !== 0 && included !== 1) throw invalidArgument(`${where}.mask[${i}]`, '0 or 1', included);
    if (included === 0) continue;
    for (const [key, values] of Object.entries(perToken)) {
      const value = values?.[i];
      if (values !== undefined && !Number.isFinite(value))
        throw invalidArgument(`${where}.${key}[${i}]`, 'a finite number', value);
    }
    active.push(i);
  }
  return Int32Array.from(active);
}

function packSegments(
  segments: readonly { parent: number; tokens: Int32Array; depth: number }[],
  members: readonly number[],
): PackedTokens & { starts: Map<number, number> } {
  const starts = new Map<number, number>();
  let length = 0;
  for (const i of members) {
    starts.set(i, length);
    length += segments[i]?.tokens.length ?? 0;
  }
  const packed = {
    tokens: new Int32Array(length),
    positions: new Int32Array(length),
    visibleUntil: new Int32Array(length),
  };
  const ends = new Map<number, number>();
  for (let m = members.length - 1; m >= 0; --m) {
    const index = members[m] as number;
    const { parent, tokens, depth } = segments[index] as FlatSegment;
    const start = starts.get(index) as number;
    const end = Math.max(ends.get(index) ?? 0, start + tokens.length);
    ends.set(parent, Math.max(ends.get(parent) ?? 0, end));
    packed.tokens.set(tokens, start);
    for (let t = 0; t < tokens.length; ++t) packed.positions[start + t] = depth + t;
    packed.visibleUntil.fill(end, start, start + tokens.length);
  }
  return { ...packed, starts };
}

function lossRows(
  segments: readonly FlatSegment[],
  targets: readonly Target[],
  starts: ReadonlyMap<number, number>,
) {
  const targetOf = (index: number) => targets[(segments[index] as FlatSegment).target] as Target;
  const trained = Array.from(segments.keys()).filter((i) => segments[i]?.target !== -1);
  // Rows of one completion stand together, also where another branches off between its turns.
  trained.sort((a, b) => targetOf(a).sequence - targetOf(b).sequence || a - b);

  const rows = targets.reduce((sum, { active }) => sum + active.length, 0);
  const packed = {
    sourceRows: new Int32Array(rows),
    predicted: new Int32Array(rows),
    rowTarget: new Int32Array(rows),
    rowToken: new Int32Array(rows),
    sequences: new Int32Array(rows),
  };
  let row = 0;
  let sequence = -1;
  let last = -1;
  for (const index of trained) {
    const { parent, target: targetIndex } = segments[index] as FlatSegment;
    const target = targetOf(index);
    if (target.active.length === 0) continue;
    if (target.sequence !== last) ++sequence;
    last = target.sequence;
    const start = starts.get(index) as number;
    for (const token of target.active) {
      packed.sourceRows[row] = token > 0 ? start + token - 1 : lastRow(segments, starts, parent);
      packed.predicted[row] = target.tokens[token] as number;
      packed.rowTarget[row] = targetIndex;
      packed.rowToken[row] = token;
      packed.sequences[row] = sequence;
      ++row;
    }
  }
  return packed;
}

/** The row of the last token on the path that ends with segment `index`, past empty ones. */
function lastRow(
  segments: readonly FlatSegment[],
  starts: ReadonlyMap<number, number>,
  index: number,
): number {
  let i = index;
  while ((segments[i] as FlatSegment).tokens.length === 0) i = (segments[i] as FlatSegment).parent;
  return (starts.get(i) as number) + (segments[i] as FlatSegment).tokens.length - 1;
}

// ---- prompts

interface TrieNode {
  tokens: Int32Array;
  parent: number;
  children: Map<number, number>;
}

/**
 * Prompts as one forest in which what several begin with stands once: wherever prompts part, and wherever one
 * ends, a segment ends. `promptRows` [P] is the packed row of each prompt's last token; equal prompts share
 * it.
 */
export function packPrompts(prompts: readonly Int32Array[]): PackedTokens & { promptRows: Int32Array } {
  const nodes: TrieNode[] = [{ tokens: new Int32Array(0), parent: -1, children: new Map() }];
  const add = (tokens: Int32Array, parent: number) => {
    nodes.push({ tokens, parent, children: new Map() });
    (nodes[parent] as TrieNode).children.set(tokens[0] as number, nodes.length - 1);
    return nodes.length - 1;
  };
  const ends = prompts.map((prompt) => {
    let node = 0;
    let at = 0;
    while (at < prompt.length) {
      const child = (nodes[node] as TrieNode).children.get(prompt[at] as number);
      if (child === undefined) return add(prompt.subarray(at), node);
      const { tokens } = nodes[child] as TrieNode;
      let common = 1;
      while (common < tokens.length && at + common < prompt.length && tokens[common] === prompt[at + common])
        ++common;
      if (common < tokens.length) split(nodes, child, common);
      node = (nodes[node] as TrieNode).children.get(prompt[at] as number) as number;
      at += common;
    }
    return node;
  });

  const segments: { parent: number; tokens: Int32Array; depth: number }[] = nodes.map(
    ({ parent, tokens }) => ({ parent, tokens, depth: 0 }),
  );
  const members: number[] = [];
  const stack = [0];
  for (let index = stack.pop(); index !== undefined; index = stack.pop()) {
    const { parent, children, tokens } = nodes[index] as TrieNode;
    const above = segments[parent];
    segments[index] = { parent, tokens, depth: above === undefined ? 0 : above.depth + above.tokens.length };
    members.push(index);
    stack.push(...[...children.values()].reverse());
  }
  const { starts, ...packed } = packSegments(segments, members);
  const promptRows = ends.map(
    (end) => (starts.get(end) as number) + (nodes[end] as TrieNode).tokens.length - 1,
  );
  return { ...packed, promptRows: Int32Array.from(promptRows) };
}

/** Puts a new node with the first `length` tokens above `index`, which keeps its number and the rest. */
function split(nodes: TrieNode[], index: number, length: number): void {
  const node = nodes[index] as TrieNode;
  const head = node.tokens.subarray(0, length);
  const rest = node.tokens.subarray(length);
  nodes.push({ tokens: head, parent: node.parent, children: new Map([[rest[0] as number, index]]) });
  (nodes[node.parent] as TrieNode).children.set(head[0] as number, nodes.length - 1);
  node.parent = nodes.length - 1;
  node.tokens = rest;
}
