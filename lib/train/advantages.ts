import { groupAdvantages } from '../kernels/group-advantages.js';
import type { EpisodeGroup } from '../rollout/index.js';
import type { GrpoSettings } from './settings.js';

/** What episodes are rewarded with, and their advantages, both by group and episode. */
export interface Judgement {
  rewards: number[][];
  advantages: number[][];
}

export type AdvantageSettings = Pick<GrpoSettings, 'advantage' | 'scaleAdvantages'>;

/** The advantages of a step's episodes. */
export async function judgementOf(
  groups: readonly EpisodeGroup[],
  settings: AdvantageSettings,
): Promise<Judgement> {
  const { advantage: kind, scaleAdvantages: scale } = settings;
  const rewards = groups.map(({ episodes }) => episodes.map(({ reward }) => reward.total));
  return { rewards, advantages: await groupAdvantages(rewards, { kind, scale }) };
}

/** Whether all episodes of a group are rewarded alike, so that it teaches nothing. */
export function isUniform(rewards: readonly number[]): boolean {
  return rewards.every((reward) => reward === rewards[0]);
}
