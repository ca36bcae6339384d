import { groupAdvantages } from '../kernels/group-advantages.js';
import type { Episode, EpisodeGroup } from '../rollout/index.js';
import { normalizeThenSum } from './components.js';
import { type OverlongSettings, overlongPunishment } from './overlong.js';
import type { GrpoSettings } from './settings.js';

/** What episodes are rewarded with, and their advantages, both by group and episode. */
export interface Judgement {
  /** The task's totals, with the punishment of overlong episodes where there is one. */
  rewards: number[][];
  advantages: number[][];
}

export type AdvantageSettings = OverlongSettings &
  Pick<GrpoSettings, 'advantage' | 'scaleAdvantages' | 'multiObjectiveAggregation' | 'clipAdvantages'>;

/**
 * The advantages of a step's episodes: rewards, shaped, compared within their groups, weighted and clipped.
 *
 * @param weights what the advantages of each group are multiplied by (default: 1)
 */
export async function judgementOf(
  groups: readonly EpisodeGroup[],
  settings: AdvantageSettings,
  weights?: readonly number[],
): Promise<Judgement> {
  const { advantage: kind, scaleAdvantages: scale, clipAdvantages } = settings;
  const rewards = groups.map(({ episodes }) =>
    episodes.map((episode) => episode.reward.total + overlongPunishment(episode, settings)),
  );
  const compared =
    settings.multiObjectiveAggregation === 'normalize_then_sum'
      ? normalizeThenSum(groups.map(({ episodes }) => episodes.map((one) => scoresOf(one, settings))))
      : await groupAdvantages(rewards, { kind, scale });
  const advantages = compared.map((group, i) =>
    group.map((advantage) => clip(advantage * (weights?.[i] ?? 1), clipAdvantages)),
  );
  return { rewards, advantages };
}

/** Whether no advantage of a group differs from 0, so that it teaches nothing. */
export function isWithoutSignal(advantages: readonly number[]): boolean {
  return advantages.every((advantage) => advantage === 0);
}

/** The score of each component in the specification's order; the punishment is a component like the others. */
function scoresOf(episode: Episode, settings: OverlongSettings): number[] {
  const scores = Object.values(episode.reward.parts).map(({ score }) => score);
  return settings.overlongBuffer > 0 ? [...scores, overlongPunishment(episode, settings)] : scores;
}

/** The advantage within [-most, most]; 0 leaves it as it is. */
function clip(advantage: number, most: number): number {
  return most > 0 ? Math.min(Math.max(advantage, -most), most) : advantage;
}
