import { parseMotivation } from '../../../lib/prompt/motivation.js';
import { parseCompletion } from '../../../lib/reward/completion.js';
import { judgeAnswer } from '../../../lib/tasks/countdown/reward.js';
import { allOperations } from '../../../lib/tasks/countdown/solver.js';
import { parseStatements } from '../../../lib/tasks/knights-and-knaves/dataset.js';
import { parseAnswer } from '../../../lib/tasks/knights-and-knaves/reward.js';
import { areEquivalent, whyUnreadable } from '../../../lib/tasks/math/equivalence.js';
import { verify } from '../../../lib/tasks/math/grade.js';
import { hasDemandedFormat } from '../../../lib/tasks/math/reward.js';
import { formatPassages, readAction } from '../../../lib/tasks/search/environment.js';
import { isExactMatch } from '../../../lib/tasks/search/normalize.js';
import { hasSearchFormat } from '../../../lib/tasks/search/reward.js';
import { hasThinkAndAnswer } from '../../../lib/tasks/tags.js';
import { parseCurriculum } from '../../../lib/train/curriculum.js';
import type { Draw } from '../draw.js';
import { hostileText, mutateText } from '../mutate.js';
import { type Target, textOf } from '../target.js';

const completions = [
  '<think>\nZoey lies.\n</think>\n<answer>\n(1) Zoey is a knight\n(2) Oliver is a knave\n</answer>',
  '<think>3 * 5 + 11</think><answer>(3 + 7) * 5 - 11 / 1 = 39</answer>',
  '<think>hm</think> so \\boxed{\\frac{1}{2}} and \\fbox{x^{2}+1}',
  '<think>who</think><search> first question </search><information>x</information><answer>y</answer>',
];

const names = ['Zoey', 'Oliver', 'İpek', 'a.b*c', 'Zo'];

/** Tags and what stands between them, read as every task does. */
const tags: Target = {
  name: 'completion',
  make: (draw) => ({ text: mutateText(draw, mutateText(draw, draw.pick(completions))) }),
  run(input) {
    const raw = textOf(input, 'text');
    const completion = parseCompletion({ raw, prompt: 'x<think>' });
    hasThinkAndAnswer(raw);
    hasDemandedFormat(raw);
    hasSearchFormat(raw);
    readAction(raw);
    isExactMatch(raw, [raw]);
    formatPassages([{ id: '1', title: raw.slice(0, 99), text: raw }], 100);
    return parseAnswer(completion.answer ?? raw, names)?.length;
  },
};

function chain(draw: Draw, depth: number): string {
  if (depth === 0) return draw.pick(['1', '2', '3', '100', '007', '1.5', '', 'x', '99999999999999999999']);
  const inner = () => chain(draw, depth - 1);
  return draw.pick<() => string>([
    () => `(${inner()})`,
    () => `${inner()} ${draw.pick(['+', '-', '*', '/', '×', '÷', '−', '=', '^', '**', ''])} ${inner()}`,
    () => `-${inner()}`,
    () => `${inner()} / (${inner()} - ${inner()})`,
    inner,
  ])();
}

const countdown: Target = {
  name: 'countdown',
  make(draw) {
    const text = chain(draw, draw.below(7));
    const wrapped = draw.chance(0.1) ? draw.pick(['(', '-', '1+']).repeat(20_000) + text : text;
    return { text: draw.chance(0.4) ? mutateText(draw, wrapped) : wrapped };
  },
  run: (input) =>
    judgeAnswer(
      textOf(input, 'text'),
      { numbers: [1, 2, 3, 100], target: 39 },
      { use: 'at-most-once', operations: allOperations },
    ),
};

function latex(draw: Draw, depth: number): string {
  const inner = () => latex(draw, depth - 1);
  if (depth <= 0) {
    return draw.pick([
      '0',
      '1',
      '2',
      '-3',
      '1/2',
      '0.5',
      '12,345',
      '1e9',
      '10^{10}',
      'x',
      'y',
      'n',
      '\\pi',
      'e',
      'i',
      '\\infty',
      '\\theta',
      '50\\%',
      '90^\\circ',
      '\\$5',
      '5 \\text{ cm}',
      '\\text{east}',
      '\\text{(A)}',
      '99999999999999999999999',
      '',
    ]);
  }
  return draw.pick<() => string>([
    () => `\\frac{${inner()}}{${inner()}}`,
    () => `\\sqrt{${inner()}}`,
    () => `\\sqrt[${inner()}]{${inner()}}`,
    () => `${inner()}^{${inner()}}`,
    () =>
      `${inner()}${draw.pick(['+', '-', '\\cdot ', '\\times ', '\\div ', '/', ' ', '\\pm ', '*', '^', '_', '\\mod ', '!'])}${inner()}`,
    () => `\\left(${inner()}\\right)`,
    () => `(${inner()},${inner()})`,
    () => `[${inner()},${inner()})`,
    () => `\\{${inner()},${inner()},${inner()}\\}`,
    () =>
      `${inner()} ${draw.pick(['=', '<', '\\le', '\\ge', '>', '\\ne', '\\in', '\\cup', '\\cap'])} ${inner()}`,
    () => `\\begin{pmatrix}${inner()} & ${inner()} \\\\ ${inner()} & ${inner()}\\end{pmatrix}`,
    () =>
      `\\${draw.pick(['sin', 'cos', 'tan', 'log', 'ln', 'exp', 'lfloor', 'binom', 'overline', 'mathbf', 'sum', 'int', 'wat'])}{${inner()}}`,
    () => `\\log_{${inner()}}{${inner()}}`,
    () => `\\binom{${inner()}}{${inner()}}`,
    () => `${inner()}!`,
    () => `|${inner()}|`,
    () => `${inner()}_{${draw.pick(['2', '10', '16', '99', 'x'])}}`,
    () => `0.\\overline{${inner()}}`,
  ])();
}

const math: Target = {
  name: 'math',
  make(draw) {
    const write = () => {
      const text = draw.chance(0.1)
        ? draw
            .pick(['(', '\\sqrt{', '{', '-', '2^', '1/', '9', '!', '\\frac'])
            .repeat(draw.pick([50, 5000])) + latex(draw, 1)
        : latex(draw, draw.below(5));
      return draw.chance(0.3) ? mutateText(draw, text) : text;
    };
    const answer = write();
    return { answer, reference: draw.chance(0.4) ? answer : write() };
  },
  async run(input) {
    const [answer, reference] = [textOf(input, 'answer'), textOf(input, 'reference')];
    await areEquivalent(answer, reference);
    await whyUnreadable(reference);
    return verify(parseCompletion({ raw: `<think>x</think>\\boxed{${answer}}` }), { answer: reference });
  },
};

/** Short languages: statements of a puzzle, motivations, curricula. */
const words: Target = {
  name: 'words',
  make(draw) {
    const seed = draw.pick([
      "(('->', ('telling-truth', 1), ('lying', 0)), ('not', ('lying', 0)))",
      "(('and', ('lying', 0), ('or', ('lying', 1), ('<=>', ('lying', 0), ('lying', 1)))), ('lying', 1))",
      'suboptimal=0.5,none=0.5@10;none',
      'people=2,3,4@0.8',
      'template:a b.txt=0.3,none',
      "('not', ".repeat(draw.pick([1, 20, 10_000])),
    ]);
    return { text: draw.chance(0.1) ? hostileText(draw) : mutateText(draw, seed) };
  },
  run(input) {
    const text = textOf(input, 'text');
    for (const parse of [parseMotivation, parseCurriculum]) {
      try {
        parse(text);
      } catch (error) {
        if ((error as Error).name !== 'MerfError') throw error;
      }
    }
    try {
      return parseStatements(text).length;
    } catch (error) {
      // Reading a row's columns fails with a plain Error, which becomes the row's problem.
      if (error instanceof Error && error.constructor === Error) return error.message;
      throw error;
    }
  },
};

export const answerTargets: readonly Target[] = [tags, countdown, math, words];
