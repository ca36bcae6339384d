import type { Target } from '../target.js';
import { answerTargets } from './answers.js';
import { dataTargets } from './data.js';
import { modelTargets } from './models.js';
import { runTargets } from './runs.js';
import { templateTargets } from './templates.js';
import { tokenizerTargets } from './tokenizers.js';

/** A target for each reader of files or text from outside. */
export const targets: readonly Target[] = [
  ...modelTargets,
  ...tokenizerTargets,
  ...templateTargets,
  ...dataTargets,
  ...runTargets,
  ...answerTargets,
];
