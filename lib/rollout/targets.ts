import type { Branch, Segment, TrainTarget } from '../policy/index.js';
import {
  drawnTurns,
  type EpisodeGroup,
  type EpisodePrompt,
  type PlainEpisode,
  type Turn,
} from './episode.js';

/** A turn of the model's as it is learned. */
export interface TargetPlace {
  /** Which group, and which of its episodes. */
  readonly group: number;
  readonly episode: number;
  /** The prompt that it is learned under. */
  readonly prompt: EpisodePrompt;
  /** Which of the model's turns in its episode. */
  readonly index: number;
  /** Which of all turns that are trained on, in the order of the branches: that of the results of `score`. */
  readonly turn: number;
  readonly tokens: number;
}

/**
 * The episodes as branches of a token forest: under each prompt a path for each episode, whose turns are segments, those
 * of the model with the target that `train` gives for it. The turns of one episode are one completion of the loss.
 * Branches under one view lie beside each other, so that what their prompts begin with is computed once.
 *
 * @param train what is trained on of a turn; the log-probabilities that it was drawn with are there already.
 *   A turn that it gives null for is not; an episode of such turns alone is left out.
 * @param under the prompts that an episode is learned under (default: the one that it was drawn under)
 */
export function branchesOf(
  groups: readonly EpisodeGroup<unknown, PlainEpisode>[],
  train: (place: TargetPlace) => TrainTarget | null = () => ({}),
  under: (group: number, episode: number) => readonly EpisodePrompt[] = (group, episode) => [
    ((groups[group] as EpisodeGroup).episodes[episode] as PlainEpisode).prompt,
  ],
): Branch[] {
  let sequence = 0;
  let turn = 0;
  return byPrompt(groups, under).flatMap(({ prompt, group, episodes }) => {
    const completions = episodes.flatMap((episode) => {
      const { turns } = (groups[group] as EpisodeGroup).episodes[episode] as PlainEpisode;
      const several = turns.length > 1 ? { sequence: sequence++ } : {};
      let index = 0;
      const targets = turns.map((one) => {
        if (one.role !== 'model') return undefined;
        const target = train({ group, episode, prompt, index: index++, turn, tokens: one.tokens.length });
        if (target === null) return undefined;
        turn++;
        return { logprobs: one.logprobs, ...several, ...target };
      });
      return targets.some((target) => target !== undefined) ? [path(turns, targets)] : [];
    });
    return completions.length > 0 ? [{ promptTokens: prompt.tokens, completions }] : [];
  });
}

/** The episodes of each group under each of their prompts: the groups in turn under one view, then under the next. */
function byPrompt(
  groups: readonly EpisodeGroup<unknown, PlainEpisode>[],
  under: (group: number, episode: number) => readonly EpisodePrompt[],
): { prompt: EpisodePrompt; group: number; episodes: number[] }[] {
  const byView = new Map<string, Map<EpisodePrompt, { group: number; episodes: number[] }>>();
  groups.forEach(({ episodes }, group) => {
    episodes.forEach((_, episode) => {
      for (const prompt of under(group, episode)) {
        const view = JSON.stringify(prompt.view);
        const prompts = byView.get(view) ?? new Map();
        byView.set(view, prompts);
        const branch = prompts.get(prompt) ?? { group, episodes: [] };
        prompts.set(prompt, branch);
        branch.episodes.push(episode);
      }
    });
  });
  return [...byView.values()].flatMap((prompts) =>
    [...prompts].map(([prompt, branch]) => ({ prompt, ...branch })),
  );
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
