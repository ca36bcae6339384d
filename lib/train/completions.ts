import { existsSync, readdirSync, rmSync } from 'node:fs';
import { join } from 'node:path';
import { makeFolder, whileReading, whileWriting, writeFileAtomically } from '../atomic-files.js';
import { withControlsShown } from '../control-characters.js';
import { formatMotivation } from '../prompt/motivation.js';
import type { Reward } from '../reward/index.js';
import { type EpisodeEnd, type EpisodeGroup, textOf } from '../rollout/index.js';

/** One line of completions/step-000001.jsonl. */
export interface CompletionRecord {
  step: number;
  /** Which prompt of the step, and which completion of it, both from 0. */
  promptIndex: number;
  completionIndex: number;
  /** What of the motivation the prompt shows. */
  view: string;
  prompt: string;
  /** All that follows the prompt. */
  text: string;
  /** The turns of an episode of several, by who wrote them. */
  turns?: readonly { role: 'model' | 'environment'; text: string; tokens: number; failure?: string }[];
  /** Tokens that the model drew. */
  tokens: number;
  /** How the episode ended. */
  finishReason: EpisodeEnd;
  reward: number;
  parts: Reward['parts'];
  /** What it was learned with. */
  advantage: number;
  /** True where its group was drawn and not learned, as dynamic sampling leaves groups without signal out. */
  dropped?: true;
  /** The step that drew it, where this one learned it again. */
  replayed?: number;
}

/**
 * The records of all groups that were drawn or learned again.
 *
 * @param learned the ones of them that the step learned
 * @param advantages those of the groups that were learned
 */
export function recordsOf(
  groups: readonly (EpisodeGroup & { readonly replayed?: number })[],
  learned: readonly EpisodeGroup[],
  advantages: readonly number[][],
  step: number,
): CompletionRecord[] {
  const advantagesOf = new Map(learned.map((group, i) => [group, advantages[i] as number[]]));
  return groups.flatMap((group, i) =>
    group.episodes.map((episode, j) => {
      const own = advantagesOf.get(group);
      const { prompt, turns, end, completion, reward } = episode;
      const several = turns.length > 1 && {
        turns: turns.map((turn) => ({
          role: turn.role,
          text: turn.text,
          tokens: turn.tokens.length,
          ...('failure' in turn && { failure: turn.failure }),
        })),
      };
      return {
        step,
        promptIndex: i,
        completionIndex: j,
        view: formatMotivation(prompt.view),
        prompt: prompt.text,
        text: textOf(episode),
        ...several,
        tokens: completion.tokenCount,
        finishReason: end,
        reward: reward.total,
        parts: reward.parts,
        advantage: own?.[j] ?? 0,
        ...(own === undefined && { dropped: true }),
        ...(group.replayed !== undefined && { replayed: group.replayed }),
      };
    }),
  );
}

/** Keeps every completion of every step: a JSONL file to query and a transcript to read. */
export class CompletionLog {
  readonly folder: string;

  constructor(folder: string) {
    this.folder = folder;
  }

  write(step: number, records: readonly CompletionRecord[]): void {
    makeFolder(this.folder);
    const base = join(this.folder, `step-${String(step).padStart(6, '0')}`);
    writeFileAtomically(`${base}.jsonl`, records.map((record) => `${JSON.stringify(record)}\n`).join(''));
    writeFileAtomically(`${base}.txt`, transcript(records));
  }

  discardAfter(step: number): void {
    if (!existsSync(this.folder)) return;
    for (const name of whileReading(this.folder, () => readdirSync(this.folder))) {
      const number = /^step-(\d+)\./.exec(name)?.[1];
      const path = join(this.folder, name);
      if (number !== undefined && Number(number) > step) whileWriting(path, () => rmSync(path));
    }
  }
}

/** A text to read on a terminal: what could command one is written out, and stands unchanged in the JSONL file. */
function transcript(records: readonly CompletionRecord[]): string {
  const lines: string[] = [];
  let shown: string | undefined;
  for (const record of records) {
    if (record.completionIndex === 0 || record.prompt !== shown) {
      const again = record.replayed === undefined ? '' : `, replayed from step ${record.replayed}`;
      const dropped = record.dropped ? ', not learned' : '';
      const title = `PROMPT ${record.promptIndex + 1}, motivation ${record.view}${dropped}${again}`;
      lines.push(`${'='.repeat(80)}`, title, '', record.prompt.trimEnd(), '');
      shown = record.prompt;
    }
    const parts = Object.entries(record.parts).map(
      ([name, part]) => `${name} ${part.case} ${signed(part.score)}`,
    );
    lines.push(
      '-'.repeat(80),
      `COMPLETION ${record.promptIndex + 1}.${record.completionIndex + 1}: reward ${record.reward} ` +
        `(${parts.join(', ')}), advantage ${record.advantage.toFixed(3)}, ` +
        `${record.tokens} tokens, ended by ${record.finishReason}`,
      '',
      record.text.trimEnd(),
      '',
    );
  }
  return withControlsShown(`${lines.join('\n')}\n`);
}

function signed(value: number): string {
  return value > 0 ? `+${value}` : String(value);
}
