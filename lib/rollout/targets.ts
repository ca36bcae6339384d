import type { Branch, Segment, TrainTarget } from '../policy/index.js';
import { drawnTurns, type EpisodeGroup, type PlainEpisode, type Turn } from './episode.js';

/**
 * The episodes as branches of a token forest: under each prompt a path for each episode, whose turns are segments, those
 * of the model with the target that `train` gives for it. The turns of one episode are one completion of the loss.
 *
 * @param train what is trained on of a turn of so many tokens, the `turn`-th of all of the model's turns in the order of
 *   the groups; its own log-probabilities are there already
 */
export function branchesOf(
  groups: readonly EpisodeGroup<unknown, PlainEpisode>[],
  train: (at: { group: number; episode: number; turn: number; tokens: number }) => TrainTarget = () => ({}),
): Branch[] {
  let sequence = 0;
  let turn = 0;
  return groups.map(({ prompt, episodes }, group) => ({
    promptTokens: prompt.tokens,
    completions: episodes.map(({ turns }, episode) => {
      const several = turns.length > 1 ? { sequence: sequence++ } : {};
      const targets = turns.map((one) =>
        one.role === 'model'
          ? {
              logprobs: one.logprobs,
              ...several,
              ...train({ group, episode, turn: turn++, tokens: one.tokens.length }),
            }
          : undefined,
      );
      return path(turns, targets);
    }),
  }));
}

/** The turns as segments, each the child of the one before it. */
function path(turns: readonly Turn[], targets: readonly (TrainTarget | undefined)[]): Segment {
  return turns.reduceRight<Segment | undefined>((child, { tokens }, i) => {
    const train = targets[i];
    return { tokens, ...(train && { train }), ...(child && { children: [child] }) };
  }, undefined) as Segment;
}

/** Tokens of all episodes that the model drew. */
export function countDrawn(groups: readonly EpisodeGroup<unknown, PlainEpisode>[]): number {
  return groups
    .flatMap(({ episodes }) => episodes)
    .flatMap(drawnTurns)
    .reduce((sum, { tokens }) => sum + tokens.length, 0);
}
