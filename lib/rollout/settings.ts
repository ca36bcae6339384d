import { z } from 'zod';
import { setting } from '../settings.js';

const count = z.int().min(1);
const positive = z.number().positive();

/**
 * The settings of how far episodes go and of who answers and judges them.
 * @param group the heading they stand under in --help
 * @param matters whether they change what a run trains on
 */
export const limitSettings = (group: string, matters: boolean) => ({
  maxTokens: setting(count.default(256), {
    group,
    description: 'longest completion, in tokens; of episodes of several turns, the longest turn',
    matters,
  }),
  maxEpisodeTokens: setting(count.optional(), {
    group,
    description:
      "longest episode of several turns, in tokens, its environment's included (default: what the context leaves)",
    matters,
  }),
  maxTurns: setting(count.optional(), {
    group,
    description: "turns of the model in an episode at most (default: the environment's)",
    matters,
  }),
  stop: setting(z.array(z.string().min(1)).optional(), {
    group,
    description:
      'a string that ends a completion, as it stands or as JSON ("\\n\\n"); may be given several times',
    matters,
    verbatim: true,
  }),
  replySeconds: setting(positive.optional(), {
    group,
    description: "seconds that a reply of an environment may take (default: the environment's)",
    matters: false,
  }),
  onEnvironmentError: setting(z.enum(['fail', 'end', 'report']).default('fail'), {
    group,
    description: 'an environment that fails ends the run, ends the episode, or is reported to the model',
    matters,
  }),
  verifiersAtOnce: setting(count.default(64), {
    group,
    description: 'completions that are judged at once',
    matters: false,
  }),
});

export type LimitSettings = z.output<z.ZodObject<ReturnType<typeof limitSettings>>>;

/** The limits of episodes, as `collect` takes them. */
export function limitsOf(settings: LimitSettings): LimitSettings {
  const { maxTokens, maxEpisodeTokens, maxTurns, stop, replySeconds, onEnvironmentError, verifiersAtOnce } =
    settings;
  return { maxTokens, maxEpisodeTokens, maxTurns, stop, replySeconds, onEnvironmentError, verifiersAtOnce };
}
