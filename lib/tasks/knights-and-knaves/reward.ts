import type { ParsedCompletion } from '../../reward/completion.js';
import { RewardSpec } from '../../reward/spec.js';
import { thinkAndAnswerFormat } from '../tags.js';

/** What the reward needs to know of a puzzle. */
export interface KnightsAndKnavesSolution {
  readonly names: readonly string[];
  /** `solution[i]`: person i is a knight. */
  readonly solution: readonly boolean[];
}

/**
 * Who the answer says is a knight, in the order of `names`; undefined where it cannot be parsed. As in Logic-RL,
 * "knight" and "knave" must occur (as substrings, in any case) exactly as often as there are people, and for every
 * person the first place where the name is followed by "is a" and one of the two counts.
 */
export function parseAnswer(answer: string, names: readonly string[]): boolean[] | undefined {
  const lower = answer.toLowerCase();
  const mentions = lower.split('knight').length - 1 + lower.split('knave').length - 1;
  if (mentions !== names.length) return undefined;
  const roles: boolean[] = [];
  for (const name of names) {
    const match = patternOf(name).exec(answer);
    if (!match) return undefined;
    roles.push((match[1] as string).toLowerCase() === 'knight');
  }
  return roles;
}

const word = '[\\p{L}\\p{N}_]';

/** Word boundaries count letters of every script, as Python's do. */
function patternOf(name: string): RegExp {
  const escaped = name.replace(/[\\^$.*+?()[\]{}|/-]/g, '\\$&');
  return new RegExp(`(?<!${word})${escaped}(?!${word})\\s+is\\s+a\\s+(knight|knave)(?!${word})`, 'iu');
}

function judgeCorrectness(completion: ParsedCompletion, row: KnightsAndKnavesSolution): string {
  const roles = parseAnswer(completion.answer ?? '', row.names);
  if (!roles) return 'unreadable';
  return roles.every((isKnight, i) => isKnight === row.solution[i]) ? 'right' : 'wrong';
}

/**
 * The reward of the MeRF paper (arXiv 2506.18485), which is Logic-RL's: format and correctness, where a wrong format
 * leaves the answer unread.
 */
export const knightsAndKnavesReward: RewardSpec<KnightsAndKnavesSolution> = new RewardSpec({
  name: 'knights-and-knaves',
  components: [
    thinkAndAnswerFormat,
    {
      name: 'correctness',
      cases: [
        { name: 'right', score: 2, sentence: 'if the answer gives every person the right role' },
        {
          name: 'wrong',
          score: -1.5,
          sentence: 'if the answer can be read, but gives a person the wrong role',
        },
        {
          name: 'unreadable',
          score: -2,
          sentence:
            'if the answer cannot be read: it must say "NAME is a knight" or "NAME is a knave" for every person, ' +
            'and use the words knight and knave nowhere else',
        },
      ],
      verify: judgeCorrectness,
    },
  ],
});
