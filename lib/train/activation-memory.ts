// How much of the device's memory a trainer takes to keep what the first update needs of the rollout.
import type { Policy } from '../policy/index.js';
import { parseLearnUnder, stageAt } from '../prompt/motivation.js';
import type { GrpoSettings } from './settings.js';

const gib = 2 ** 30;
/** The largest default, in GiB, and the smallest: less holds too few layers to be worth it. */
const most = 0.5;
const least = 1 / 16;

/**
 * The default of `keepActivations`, in GiB: 0.5, halved until it is at most a quarter of the memory that the policy's
 * device has to spare, and 0 where that is next to nothing. It goes by halves so that two runs with about as much
 * memory keep the same: how many layers are kept may change the last bits of gradients.
 */
export function defaultKeepActivations(policy: Partial<Pick<Policy, 'spareMemory'>>): number {
  const spare = (policy.spareMemory?.() ?? Number.POSITIVE_INFINITY) / gib;
  let kept = most;
  while (kept >= least && kept > spare / 4) kept /= 2;
  return kept >= least ? kept : 0;
}

/** The bytes that the rollout of `step` is given to keep activations in: 0 where its update could not use them. */
export function bytesToKeep(
  settings: Pick<GrpoSettings, 'keepActivations' | 'learnUnder' | 'anchor'>,
  step: number,
): number {
  // Tokens under another prompt than the one that drew them have to be computed, with all that shares a root with them.
  const learned = stageAt(parseLearnUnder(settings.learnUnder), step - 1);
  if (settings.anchor > 0 || learned.some((view) => view !== 'same')) return 0;
  return Math.floor((settings.keepActivations ?? 0) * gib);
}
