import type { LessonSettings } from '../../lib/train/lessons.js';

/** Settings under which an episode is learned once, with nothing beside its policy loss. */
export const plainLessons: LessonSettings = {
  loss: 'grpo',
  kl: 0,
  entropy: 0,
  temperature: 1,
  maskTruncated: false,
  miniBatches: 1,
  updatesPerRollout: 1,
  learnCorrection: 'none',
  learnCap: 2,
  anchor: 0,
};
