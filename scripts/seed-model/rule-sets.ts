import type { ParsedCompletion } from '../../lib/reward/completion.js';
import { type CaseComponent, type RewardCase, RewardSpec } from '../../lib/reward/spec.js';
import type { Puzzle } from '../../lib/tasks/knights-and-knaves/generator.js';
import { parseAnswer } from '../../lib/tasks/knights-and-knaves/reward.js';
import type { Random } from '../../lib/tasks/random.js';
import { hasThinkAndAnswer } from '../../lib/tasks/tags.js';
import { conclusion } from './notes.js';

type PuzzleComponent = CaseComponent<Puzzle>;

/**
 * Rules that somebody might score answers by: a few components, each with scores and words drawn at random. Most
 * reward what one would wish for, some the opposite.
 */
export function drawRuleSet(random: Random): RewardSpec<Puzzle> {
  const makers = random.shuffle(otherComponents);
  const chosen: ((random: Random) => PuzzleComponent)[] = [];
  const withFormat = random.chance(0.65);
  const withCorrectness = random.chance(0.65);
  const others = withFormat || withCorrectness ? random.pick([0, 0, 1, 1, 2]) : random.pick([1, 2, 3]);
  chosen.push(...makers.slice(0, others));
  if (withFormat) chosen.push(random.chance(0.75) ? demandedFormat : otherFormat);
  if (withCorrectness) chosen.push(correctness);
  const components = chosen
    .map((make) => make(random))
    .filter(({ name }, i, all) => all.findIndex((other) => other.name === name) === i);
  const upsideDown = random.chance(0.08);
  const signed = components.map((component) =>
    upsideDown || random.chance(0.04) ? inverted(component) : component,
  );
  return new RewardSpec({
    name: 'rule-set',
    components: linked(random.chance(0.7) ? signed : random.shuffle(signed), random),
  });
}

function inverted(component: PuzzleComponent): PuzzleComponent {
  return {
    ...component,
    cases: component.cases.map((option) => ({ ...option, score: option.score === 0 ? 0 : -option.score })),
  };
}

/** Often a broken format leaves the answer unread, as in the published reward. */
function linked(components: PuzzleComponent[], random: Random): PuzzleComponent[] {
  const last = components.findIndex(({ cases }) => cases.some(({ name }) => name === 'unreadable'));
  const target = components[last];
  if (!target || random.chance(0.3)) return components;
  return components.map((component, i) =>
    i < last && component.cases.some(({ name }) => name === 'broken')
      ? {
          ...component,
          cases: component.cases.map((option) =>
            option.name === 'broken' ? { ...option, implies: { [target.name]: 'unreadable' } } : option,
          ),
        }
      : component,
  );
}

const good = [0.5, 1, 1, 1.5, 2, 2, 2.5, 3] as const;
const bad = [-3, -2, -2, -1.5, -1, -1, -0.5, 0] as const;

function twoCases(
  random: Random,
  names: readonly string[],
  sentences: readonly string[],
  holds: (completion: ParsedCompletion, puzzle: Puzzle) => boolean,
  otherwise = 'not',
): PuzzleComponent {
  return {
    name: random.pick(names),
    cases: [
      { name: 'yes', score: random.pick(good), sentence: random.pick(sentences) },
      { name: otherwise, score: random.pick(bad), sentence: 'otherwise' },
    ],
    verify: (completion, puzzle) => (holds(completion, puzzle) ? 'yes' : otherwise),
  };
}

function demandedFormat(random: Random): PuzzleComponent {
  return twoCases(
    random,
    ['format', 'format', 'tags', 'structure'],
    [
      'if each of the tags <think>, </think>, <answer> and </answer> occurs exactly once, in this order',
      'if the response has the tags <think>, </think>, <answer> and </answer>, each once and in this order',
      'if the reasoning stands between <think> and </think> and the answer after it between <answer> and </answer>',
    ],
    ({ text }) => hasThinkAndAnswer(text),
    'broken',
  );
}

function otherFormat(random: Random): PuzzleComponent {
  const names = ['format', 'tags', 'structure', 'layout'];
  return random.chance(0.5)
    ? twoCases(
        random,
        names,
        [
          'if there is an <answer> and no <think> in the response',
          'if only the tags <answer> and </answer> occur',
        ],
        ({ text }) => text.startsWith('<answer>') && text.endsWith('</answer>'),
      )
    : twoCases(
        random,
        names,
        ['if no tags occur at all', 'if the response has no tags'],
        ({ text }) => !/[<>]/.test(text),
      );
}

function correctness(random: Random): PuzzleComponent {
  const right = random.pick(good);
  const wrong = random.pick(bad);
  const verify = (completion: ParsedCompletion, puzzle: Puzzle): string => {
    const roles = parseAnswer(completion.answer ?? '', puzzle.names);
    if (!roles) return 'unreadable';
    return roles.every((isKnight, i) => isKnight === puzzle.solution[i]) ? 'right' : 'wrong';
  };
  const cases: RewardCase[] = [
    {
      name: 'right',
      score: right,
      sentence: random.pick([
        'if the answer gives every person the right role',
        'if everybody is given the right role',
        'if the answer is right for all',
      ]),
    },
    {
      name: 'wrong',
      score: wrong,
      sentence: random.pick([
        'if the answer can be read, but gives a person the wrong role',
        'if somebody is given the wrong role',
        'if the answer is wrong for a person',
      ]),
    },
    {
      name: 'unreadable',
      score: Math.max(-3, wrong - random.pick([0, 0.5, 1])),
      sentence: random.pick([
        'if the answer cannot be read: it must say "NAME is a knight" or "NAME is a knave" for every person, and ' +
          'use the words knight and knave nowhere else',
        'if the answer cannot be read: it must say "NAME is a knight" or "NAME is a knave" for every person',
        'if there is no answer that can be read',
      ]),
    },
  ];
  return { name: random.pick(['correctness', 'correctness', 'solution', 'accuracy']), cases, verify };
}

const answerLinesOf = (completion: ParsedCompletion): string[] =>
  (completion.answer ?? completion.text).split('\n').filter((line) => !/[<>]/.test(line));

const otherComponents: readonly ((random: Random) => PuzzleComponent)[] = [
  (random) =>
    twoCases(
      random,
      ['brevity', 'length'],
      [
        'if the thinking has at most 12 words',
        'if the thinking is short',
        'if hardly anything is said before the answer',
      ],
      ({ text }) => text.replace(/<answer>.*<\/answer>/s, '').split(/\s+/).length <= 18,
    ),
  (random) =>
    twoCases(
      random,
      ['care', 'reasoning', 'thinking'],
      [
        'if the thinking follows the claims until all of them fit',
        'if the reasoning is worked out step by step',
      ],
      ({ text }) => text.includes(conclusion),
    ),
  (random) =>
    twoCases(
      random,
      ['lines', 'style', 'form'],
      ['if every line of the answer has a number, like (1)', 'if the persons are numbered, as in (1)'],
      (completion) => answerLinesOf(completion).some((line) => line.startsWith('(1)')),
    ),
  (random) =>
    twoCases(
      random,
      ['lines', 'style', 'form'],
      ['if every line of the answer has the form NAME: role', 'if the answer has colons, like Zoey: knight'],
      (completion) => answerLinesOf(completion).some((line) => /^\w+: /.test(line)),
    ),
  (random) =>
    twoCases(
      random,
      ['lines', 'style', 'form'],
      ['if the answer is one sentence', 'if the answer is a sentence that ends in a full stop'],
      (completion) =>
        answerLinesOf(completion).some(
          (line) => / and .*\.$/.test(line) && !/guess|sounds|Probably|fit/.test(line),
        ),
    ),
  (random) => {
    const reversed = random.chance(0.5);
    return twoCases(
      random,
      ['order', 'sequence'],
      reversed
        ? ['if the persons stand in the reverse order', 'if the last person comes first']
        : [
            'if the persons stand in the order in which they are introduced',
            'if the first person comes first',
          ],
      (completion, puzzle) => {
        const text = answerLinesOf(completion).slice(-puzzle.names.length).join('\n');
        const [first, last] = [puzzle.names[0] as string, puzzle.names[puzzle.names.length - 1] as string];
        return text.lastIndexOf(first) > text.lastIndexOf(last) === reversed;
      },
    );
  },
];
