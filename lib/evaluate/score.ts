import type { CompletionGroup } from '../policy/index.js';
import { parseCompletion, type Score } from '../reward/index.js';
import type { Task } from '../tasks/index.js';

/**
 * The score of every completion, in the shape of `groups`; rows, prompts and groups line up. All verifiers run at
 * once, each within the specification's time limit.
 * @throws MerfError VERIFIER_FAILED or VERIFIER_TIMEOUT naming the row, ABORTED
 */
export async function scoreGroups<Row>(
  task: Task<Row>,
  rows: readonly Row[],
  prompts: readonly string[],
  groups: readonly CompletionGroup[],
  options: { signal?: AbortSignal } = {},
): Promise<Score[][]> {
  return Promise.all(
    groups.map((group, i) =>
      Promise.all(
        group.completions.map((completion) =>
          task.spec.score(
            parseCompletion({
              raw: completion.text,
              prompt: prompts[i] as string,
              finishReason: completion.finishReason,
              tokenCount: completion.tokens.length,
            }),
            rows[i] as Row,
            options,
          ),
        ),
      ),
    ),
  );
}

/** Whether a score counts as a correct completion: it is the highest of the specification, see `RewardSpec.highest`. */
export function isCorrect(task: Pick<Task<never>, 'spec'>, score: Score): boolean {
  return task.spec.isHighest(score);
}
