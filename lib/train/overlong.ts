import { MerfError } from '../errors.js';
import { drawnTurns, type PlainEpisode } from '../rollout/index.js';
import type { GrpoSettings } from './settings.js';

export type OverlongSettings = Pick<GrpoSettings, 'maxTokens' | 'overlongBuffer' | 'overlongPenalty'>;

/**
 * The soft overlong punishment of DAPO (arXiv:2503.14476, equation 13): 0 up to `maxTokens` - `overlongBuffer` tokens,
 * from there falling in a straight line to -`overlongPenalty` at `maxTokens`. What counts is the episode's longest turn of
 * the model, since `maxTokens` is the room of a turn.
 */
export function overlongPunishment(episode: PlainEpisode, settings: OverlongSettings): number {
  const { maxTokens, overlongBuffer, overlongPenalty } = settings;
  if (overlongBuffer === 0) return 0;
  const longest = Math.max(0, ...drawnTurns(episode).map(({ tokens }) => tokens.length));
  const excess = longest - (maxTokens - overlongBuffer);
  return excess > 0 ? (-Math.min(excess, overlongBuffer) / overlongBuffer) * overlongPenalty : 0;
}

/** @throws MerfError INVALID_CONFIG where the buffer is longer than a completion may be */
export function checkOverlong({ maxTokens, overlongBuffer }: OverlongSettings): void {
  if (overlongBuffer <= maxTokens) return;
  throw new MerfError(
    'INVALID_CONFIG',
    `Expected overlongBuffer to be at most maxTokens = ${maxTokens} but it was ${overlongBuffer}`,
  );
}
