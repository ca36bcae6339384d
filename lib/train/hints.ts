import type { MotivationView } from '../prompt/motivation.js';
import type { RewardSpec } from '../reward/index.js';
import type { Episode, EpisodeGroup } from '../rollout/index.js';
import { isWithoutSignal } from './advantages.js';

/**
 * Draws the groups without one correct completion again, under a hint, and puts these in their place, as Guide does
 * (arXiv:2506.13923): a hint costs nothing where the model gets there without, and a group is compared within one prompt.
 * A hinted episode's prompt is the one with the hint; under which prompt it is learned is a choice of its own.
 *
 * @param hint the view that hints; undefined: none does
 * @param draw draws episodes of rows under the hint
 * @returns the groups in their order, with those that failed beside the ones drawn again
 */
export async function hintFailed<Row>(
  groups: readonly EpisodeGroup<Row>[],
  spec: RewardSpec<Row>,
  hint: MotivationView | undefined,
  draw: (rows: readonly Row[], hint: MotivationView) => Promise<EpisodeGroup<Row>[]>,
): Promise<EpisodeGroup<Row>[]> {
  if (hint === undefined) return [...groups];
  const failed = groups.filter(({ episodes }) => !episodes.some(({ reward }) => spec.isHighest(reward)));
  if (failed.length === 0) return [...groups];
  const again = await draw(
    failed.map(({ row }) => row),
    hint,
  );
  return groups.map((group) => {
    const hinted = again[failed.indexOf(group)];
    return hinted ? { ...hinted, failed: group.episodes } : group;
  });
}

/** The episodes that were drawn without a hint, which say what the model can do by itself. */
export function unhinted({ failed, episodes }: EpisodeGroup): readonly Episode[] {
  return failed ?? episodes;
}

/** The groups and, where some were drawn again, the episodes before that too. */
export function withFailed(groups: readonly EpisodeGroup[]): EpisodeGroup[] {
  return groups.flatMap((group) =>
    group.failed ? [{ row: group.row, episodes: group.failed }, group] : [group],
  );
}

/**
 * How many groups were drawn again under the hint, and how many of them then had advantages that are not 0.
 *
 * @param advantages those of all groups
 */
export function hintMetrics(
  groups: readonly EpisodeGroup[],
  advantages: readonly (readonly number[])[],
): { groups: number; withSignal: number } {
  const hinted = advantages.filter((_, i) => groups[i]?.failed !== undefined);
  return { groups: hinted.length, withSignal: hinted.filter((one) => !isWithoutSignal(one)).length };
}
