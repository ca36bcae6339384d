import { MerfError } from '../../errors.js';
import { Random } from '../random.js';
import type { Passage } from './passages.js';

/** A question with every answer that counts as right. */
export interface SearchRow {
  readonly question: string;
  readonly answers: readonly string[];
}

/** A question about a world, with the passages that hold what is needed, in the order in which they are needed. */
export interface WorldQuestion extends SearchRow {
  readonly passages: readonly string[];
}

/** A made-up world: its passages, and questions that they answer. */
export interface World {
  readonly passages: readonly Passage[];
  readonly questions: readonly WorldQuestion[];
}

interface Person {
  readonly name: string;
  readonly town: Town;
  readonly born: number;
  readonly profession: string;
  readonly instrument: string;
}

interface Town {
  readonly name: string;
  readonly river: string;
  readonly founded: number;
  readonly product: string;
  mayor?: Person;
}

const townCount = 24;
const peopleCount = 96;

const givenNames =
  'Ada Bela Clara Daniel Edith Emil Felix Grace Hugo Ida Jacob Lily Mira Noah Olga Samuel'.split(' ');
const professions =
  'baker carpenter clockmaker doctor farmer gardener glassblower judge mason painter potter sailor tailor teacher weaver'.split(
    ' ',
  );
const instruments = 'accordion bassoon cello clarinet drum fiddle flute guitar harp lute organ trumpet'.split(
  ' ',
);
const products =
  'apples bells bricks candles carpets cheese cherries clocks gloves honey kites lamps mirrors paper pears ropes salt shoes'.split(
    ' ',
  );

/**
 * A world of people and towns with invented names, so that no model knows the answers without a search. The same seed
 * makes the same world. Every person and every town has one passage; questions ask for one fact, or for a fact about what
 * another fact leads to ("the mayor of Dorven"), which takes two searches.
 */
export function makeWorld(seed: number | bigint): World {
  const random = new Random(seed);
  const invented = inventNames(random, 2 * townCount + peopleCount);
  const towns = invented.slice(0, townCount).map(
    (name, i): Town => ({
      name,
      river: invented[townCount + i] as string,
      founded: 1100 + random.below(700),
      product: random.pick(products),
    }),
  );
  const people = invented.slice(2 * townCount).map(
    (surname): Person => ({
      name: `${random.pick(givenNames)} ${surname}`,
      town: random.pick(towns),
      born: 1900 + random.below(100),
      profession: random.pick(professions),
      instrument: random.pick(instruments),
    }),
  );
  const mayors = random.shuffle(people);
  for (const [i, town] of towns.entries()) town.mayor = mayors[i] as Person;
  return {
    passages: [...people.map(personPassage), ...towns.map(townPassage)],
    questions: [...people.flatMap(personQuestions), ...towns.flatMap(townQuestions)],
  };
}

function personPassage({ name, town, born, profession, instrument }: Person): Passage {
  const text =
    `${name} was born in the town of ${town.name} in ${born}. ${name} works as a ${profession} and plays the ` +
    `${instrument}.`;
  return { id: name, title: name, text };
}

function townPassage({ name, river, founded, product, mayor }: Town): Passage {
  const text =
    `${name} is a town on the river ${river}. It was founded in ${founded} and is known for its ${product}. ` +
    `The mayor of ${name} is ${mayor?.name}.`;
  return { id: name, title: name, text };
}

function personQuestions(person: Person): WorldQuestion[] {
  const { name, town } = person;
  const one = [name];
  const two = [name, town.name];
  return [
    { question: `What does ${name} work as?`, answers: [person.profession], passages: one },
    { question: `Which instrument does ${name} play?`, answers: [person.instrument], passages: one },
    { question: `In which year was ${name} born?`, answers: [`${person.born}`], passages: one },
    { question: `In which town was ${name} born?`, answers: [town.name], passages: one },
    {
      question: `On which river does the town lie where ${name} was born?`,
      answers: riverAnswers(town),
      passages: two,
    },
    {
      question: `What is the town known for where ${name} was born?`,
      answers: productAnswers(town),
      passages: two,
    },
  ];
}

function townQuestions(town: Town): WorldQuestion[] {
  const { name } = town;
  const mayor = town.mayor as Person;
  const one = [name];
  const two = [name, mayor.name];
  return [
    { question: `On which river does ${name} lie?`, answers: riverAnswers(town), passages: one },
    { question: `In which year was ${name} founded?`, answers: [`${town.founded}`], passages: one },
    { question: `What is ${name} known for?`, answers: productAnswers(town), passages: one },
    { question: `Who is the mayor of ${name}?`, answers: [mayor.name], passages: one },
    { question: `What does the mayor of ${name} work as?`, answers: [mayor.profession], passages: two },
    {
      question: `Which instrument does the mayor of ${name} play?`,
      answers: [mayor.instrument],
      passages: two,
    },
    { question: `In which town was the mayor of ${name} born?`, answers: [mayor.town.name], passages: two },
  ];
}

function riverAnswers({ river }: Town): string[] {
  return [river, `river ${river}`];
}

function productAnswers({ product }: Town): string[] {
  return [product, `its ${product}`];
}

const beginnings = 'B Br D Dr F G Gr H J K Kr L M N P R S St T Tr V W'.split(' ');
const middles = 'a al an ar e el en er i il in o ol on or u ul un'.split(' ');
const ends = 'by da dor ga gen ka kin la lin mar na nik ra ran ric so tas ter va ven wick zo'.split(' ');

/** Different invented names. @throws MerfError INTERNAL where the syllables make too few */
function inventNames(random: Random, count: number): string[] {
  const names = new Set<string>();
  for (let draw = 0; names.size < count; draw++) {
    if (draw > 100 * count) throw new MerfError('INTERNAL', `Found fewer than ${count} different names`);
    names.add(random.pick(beginnings) + random.pick(middles) + random.pick(ends));
  }
  return [...names];
}
