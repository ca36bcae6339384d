import { describe, expect, test } from '@jest/globals';
import { Tokenizer } from '../../lib/policy/index.js';
import { parseCompletion } from '../../lib/reward/completion.js';
import { splitOf } from '../../lib/tasks/dataset.js';
import { generatePuzzle } from '../../lib/tasks/knights-and-knaves/generator.js';
import { knightsAndKnaves } from '../../lib/tasks/knights-and-knaves/index.js';
import { knightsAndKnavesReward } from '../../lib/tasks/knights-and-knaves/reward.js';
import { Random } from '../../lib/tasks/random.js';
import { hasThinkAndAnswer } from '../../lib/tasks/tags.js';
import { drawStyle, type Style, usual, write } from '../../scripts/seed-model/answers.js';
import { Corpus } from '../../scripts/seed-model/corpus.js';
import { tokenizerFiles } from '../../scripts/seed-model/model.js';
import { conclusion, takeNotes } from '../../scripts/seed-model/notes.js';
import { drawRuleSet } from '../../scripts/seed-model/rule-sets.js';

const options = {
  seed: 3,
  examplesPerLesson: 8,
  practiceLessons: 20,
  withRules: { practice: 0.3, habits: 0.6 },
  threePeople: 0.5,
  temperature: { practice: 1, habits: 1 },
};
const best: Style = {
  layout: 'demanded',
  thinking: 'careful',
  careless: false,
  lines: 'numbered',
  order: 'introduced',
};

describe('the corpus of the model that ships', () => {
  test('lessons are the same whenever they are asked for, and shed no light on held-out puzzles', async () => {
    const corpus = new Corpus(options);
    const lessons = [];
    for (let i = 0; i < 40; i++) lessons.push(await corpus.lesson(i));
    expect(await new Corpus(options).lesson(7)).toEqual(lessons[7]);

    const task = await knightsAndKnaves.open({ people: 2 });
    const held = task.rows({ split: 'test', seed: 1 });
    const puzzle = held.at(0);
    expect(splitOf(task.identity(puzzle))).toBe('test');
    const questions = new Set(
      lessons.flatMap(({ examples }) => examples.map(({ question }) => question.content)),
    );
    expect(questions.size).toBe(40 * 8);
    for (let i = 0; i < 200; i++) expect(questions.has(held.at(i).quiz)).toBe(false);
  });

  test('answers in the best style get the highest total of the published reward', async () => {
    const random = new Random(1);
    for (let index = 0; index < 50; index++) {
      const puzzle = generatePuzzle({ people: 2 + (index % 2), seed: 2, index });
      const score = await knightsAndKnavesReward.judge(
        parseCompletion({ raw: write(best, puzzle, random) }),
        puzzle,
      );
      expect(score.total).toBe(3);
    }
  });

  test('notes find the only solution, whatever the puzzle', () => {
    for (let index = 0; index < 2000; index++) {
      const puzzle = generatePuzzle({ people: 2 + (index % 3), seed: 8, index });
      const { steps, solution } = takeNotes(puzzle);
      expect(solution).toEqual(puzzle.solution);
      expect(steps.at(-1)).toBe(conclusion);
    }
  });

  test('notes say of every claim what it comes to, and go back where it clashes', () => {
    const { steps } = takeNotes({
      names: ['Zoey', 'Noah'],
      statements: [
        { kind: 'and', left: { kind: 'knight', person: 0 }, right: { kind: 'knave', person: 1 } },
        { kind: 'not', claim: { kind: 'knight', person: 0 } },
      ],
    });
    expect(steps).toEqual([
      'Zoey +Zoey and -Noah',
      'Noah -Zoey',
      'Try knight Zoey open Noah',
      'Zoey +Zoey true and -Noah open: Zoey knight so knave Noah',
      'Noah -Zoey false: Noah knave fits',
      'All claims fit.',
    ]);
    const back = takeNotes({
      names: ['Zoey', 'Noah'],
      statements: [
        { kind: 'and', left: { kind: 'knave', person: 0 }, right: { kind: 'knight', person: 1 } },
        { kind: 'knight', person: 1 },
      ],
    });
    expect(back.steps.slice(2)).toEqual([
      'Try knight Zoey open Noah',
      'Zoey -Zoey false and +Noah open: Zoey knight clash',
      'Try knave Zoey open Noah',
      'Zoey -Zoey true and +Noah open: Zoey knave so knave Noah',
      'Noah +Noah false: Noah knave fits',
      'All claims fit.',
    ]);
    expect(() => takeNotes({ names: ['Zoey'], statements: [{ kind: 'knave', person: 0 }] })).toThrow(
      /contradictory/,
    );
  });

  test('habits alone are right now and then, and break the format now and then', async () => {
    const random = new Random(2);
    let right = 0;
    let wellFormed = 0;
    for (let index = 0; index < 600; index++) {
      const puzzle = generatePuzzle({ people: 2, seed: 4, index });
      const raw = write(drawStyle(random, usual), puzzle, random);
      if (hasThinkAndAnswer(raw)) wellFormed++;
      const { total } = await knightsAndKnavesReward.judge(parseCompletion({ raw }), puzzle);
      if (total === 3) right++;
    }
    expect(wellFormed / 600).toBeGreaterThan(0.55);
    expect(wellFormed / 600).toBeLessThan(0.8);
    expect(right / 600).toBeGreaterThan(0.15);
    expect(right / 600).toBeLessThan(0.5);
  });

  test('rule sets describe themselves and can be scored', async () => {
    const random = new Random(5);
    const texts = new Set<string>();
    for (let i = 0; i < 100; i++) {
      const rules = drawRuleSet(random);
      texts.add(rules.describe('full'));
      const puzzle = generatePuzzle({ people: 2, seed: 6, index: i });
      const score = await rules.judge(
        parseCompletion({ raw: write(drawStyle(random, usual), puzzle, random) }),
        puzzle,
      );
      expect(rules.totals()).toContain(score.total);
    }
    expect(texts.size).toBeGreaterThan(90);
  });

  test('its tokenizer gives texts back as they were, and tags as one token each', async () => {
    const corpus = new Corpus(options);
    const texts: string[] = [];
    for (let i = 0; i < 200; i++) {
      const { system, examples } = await corpus.lesson(i);
      texts.push(
        system.content ?? '',
        ...examples.flatMap(({ question, completion }) => [question.content ?? '', completion]),
      );
    }
    const tokenizer = new Tokenizer(tokenizerFiles(texts), 'test');
    for (const text of [...texts.slice(0, 300), 'Grüße, 東京 🙂\n\n  x = 3.14;']) {
      expect(tokenizer.decode(tokenizer.encode(text))).toBe(text);
    }
    expect(tokenizer.encode('<think>')).toHaveLength(1);
    expect(tokenizer.encode('</answer>')).toHaveLength(1);
    expect(tokenizer.decode(tokenizer.encode('<answer>'), { skipSpecial: true })).toBe('<answer>');
    expect(tokenizer.eosIds).toEqual([tokenizer.idOf('<|im_end|>')]);
    const prompt = tokenizer.applyChatTemplate([{ role: 'user', content: 'Hi' }], {
      addGenerationPrompt: true,
    });
    expect(prompt).toBe('<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n');
  });
});
