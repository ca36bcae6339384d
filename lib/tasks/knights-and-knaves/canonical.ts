import type { Claim } from './claim.js';

/** Most people that a puzzle, generated or published, has; a truth table has 2^people bits a person. */
export const maxTablePeople = 8;

/**
 * Bits of a truth table, 32 in a word: bit `a` is the claim's truth where bit i of `a` says that person i is
 * a knight.
 */
type Table = Uint32Array;

/**
 * A text that two puzzles share exactly when one becomes the other by renaming people and putting them in
 * another order: the truth tables of what each person says, in the order of people that makes them least
 * among the orders tried. Names, wording and the shape of a formula don't count: "A and B" says what "B and
 * A" says.
 *
 * Which orders are tried depends on nothing but what all orders share. People are told apart by such
 * invariants first (colour refinement), and each of those that stay alike is put first in turn
 * (individualisation and refinement: McKay and Piperno 2014, "Practical graph isomorphism, II").
 *
 * @param statements `statements[i]` is what person i says, of at most `maxTablePeople` people
 */
export function canonicalForm(statements: readonly Claim[]): string {
  const people = statements.length;
  const tables = statements.map((claim) => tableOf(claim, people));
  const relations = relationsOf(tables);
  let best: Table[] | undefined;
  const search = (coarse: readonly number[]): void => {
    const colours = refine(coarse, relations);
    const alike = firstAlike(colours);
    if (alike === undefined) {
      const order = new Array<number>(people);
      for (const [person, colour] of colours.entries()) order[colour] = person;
      const leaf = reordered(tables, order);
      if (best === undefined || compareTables(leaf, best) < 0) best = leaf;
      return;
    }
    const tried: number[] = [];
    for (const person of alike) {
      // Where two people can change places without a difference, one of them stands for both.
      if (tried.some((other) => areInterchangeable(tables, other, person))) continue;
      tried.push(person);
      search(
        colours.map((colour, i) =>
          colour < (colours[person] as number) || i === person ? colour : colour + 1,
        ),
      );
    }
  };
  search(new Array<number>(people).fill(0));
  const digits = Math.max(1, 2 ** people / 4);
  return `${people}:${(best as Table[]).map((table) => hexOf(table, digits)).join(',')}`;
}

/** Bit a of word w of the table of "person is a knight". */
const lowMasks = [0xaaaaaaaa, 0xcccccccc, 0xf0f0f0f0, 0xff00ff00, 0xffff0000] as const;

function knightMask(person: number, word: number): number {
  return person < 5 ? (lowMasks[person] as number) : (word >> (person - 5)) & 1 ? 0xffffffff : 0;
}

const wordsOf = (people: number): number => (people <= 5 ? 1 : 2 ** (people - 5));

/** The bits of a word that are assignments: all, unless there are fewer than 32. */
const usedBits = (people: number): number => (people < 5 ? 2 ** (2 ** people) - 1 : 0xffffffff);

function tableOf(claim: Claim, people: number): Table {
  const used = usedBits(people);
  return Uint32Array.from({ length: wordsOf(people) }, (_, word) => truthOf(claim, word) & used);
}

/** 32 truth values at once. */
function truthOf(claim: Claim, word: number): number {
  switch (claim.kind) {
    case 'knight':
      return knightMask(claim.person, word);
    case 'knave':
      return ~knightMask(claim.person, word);
    case 'not':
      return ~truthOf(claim.claim, word);
    case 'and':
      return truthOf(claim.left, word) & truthOf(claim.right, word);
    case 'or':
      return truthOf(claim.left, word) | truthOf(claim.right, word);
    case 'if':
      return ~truthOf(claim.left, word) | truthOf(claim.right, word);
    case 'iff':
      return ~(truthOf(claim.left, word) ^ truthOf(claim.right, word));
  }
}

/**
 * `[i * people + j]`: numbers about what person i says and person j that no order changes, mixed into one:
 * how often the claim is true, alone and with i, j or both as knights, and how often it changes with j.
 */
function relationsOf(tables: readonly Table[]): Int32Array {
  const people = tables.length;
  const relations = new Int32Array(people * people);
  for (let i = 0; i < people; i++) {
    const table = tables[i] as Table;
    const alone = countWith(table, i, i);
    for (let j = 0; j < people; j++) {
      const counts = mix(
        mix(mix(alone, countWith(table, j, j)), countWith(table, i, j)),
        influence(table, j),
      );
      relations[i * people + j] = mix(counts, i === j ? 1 : 0);
    }
  }
  return relations;
}

/**
 * How many assignments make the claim true and both persons knights, and in the upper bits, how many make it
 * true.
 */
function countWith(table: Table, one: number, other: number): number {
  let all = 0;
  let both = 0;
  for (let w = 0; w < table.length; w++) {
    const bits = table[w] as number;
    all += popcount(bits);
    both += popcount(bits & knightMask(one, w) & knightMask(other, w));
  }
  return (all << 16) | both;
}

/** The number of pairs of assignments that differ in `person` alone and in the claim's truth. */
function influence(table: Table, person: number): number {
  let count = 0;
  if (person < 5) {
    const mask = lowMasks[person] as number;
    const shift = 1 << person;
    for (let w = 0; w < table.length; w++) {
      const bits = table[w] as number;
      count += popcount(((bits & mask) >>> shift) ^ (bits & ~mask));
    }
  } else {
    const step = 1 << (person - 5);
    for (let w = 0; w < table.length; w++) {
      if ((w & step) === 0) count += popcount((table[w] as number) ^ (table[w + step] as number));
    }
  }
  return count;
}

/**
 * Colours (0, 1, ... without gaps in the order, equal where people can't be told apart) split as far as
 * relations to people of other colours split them. Equal hashes of different things would only leave people
 * to be tried that needn't be.
 */
function refine(coarse: readonly number[], relations: Int32Array): number[] {
  const people = coarse.length;
  let colours = ranks(coarse.map((colour) => [colour, 0]));
  for (let count = 0; ; ) {
    const distinct = new Set(colours).size;
    if (distinct === people || distinct === count) return colours;
    count = distinct;
    const before = colours;
    colours = ranks(
      before.map((colour, i) => {
        let sum = 0;
        for (let j = 0; j < people; j++) {
          const pair = mix(relations[i * people + j] as number, relations[j * people + i] as number);
          sum = (sum + mix(before[j] as number, pair)) | 0;
        }
        return [colour, sum];
      }),
    );
  }
}

/** How many keys are less than each. */
function ranks(keys: readonly (readonly [number, number])[]): number[] {
  return keys.map(([colour, hash]) => {
    let less = 0;
    for (const [otherColour, otherHash] of keys) {
      if (otherColour < colour || (otherColour === colour && otherHash < hash)) less++;
    }
    return less;
  });
}

/** The people of the first colour that several have. */
function firstAlike(colours: readonly number[]): number[] | undefined {
  for (let colour = 0; colour < colours.length; colour++) {
    const people = [...colours.keys()].filter((person) => colours[person] === colour);
    if (people.length > 1) return people;
  }
  return undefined;
}

/** The tables where `order[k]` becomes person k, as speaker and in what is said. */
function reordered(tables: readonly Table[], order: readonly number[]): Table[] {
  const size = 2 ** tables.length;
  const source = new Uint8Array(size);
  for (let k = 0; k < order.length; k++) {
    const person = 1 << (order[k] as number);
    for (let a = 0; a < 1 << k; a++) source[a | (1 << k)] = (source[a] as number) | person;
  }
  return order.map((person) => {
    const from = tables[person] as Table;
    const to = new Uint32Array(from.length);
    for (let w = 0, a = 0; w < to.length; w++) {
      let bits = 0;
      for (let bit = 0; bit < 32 && a < size; bit++, a++) {
        const b = source[a] as number;
        bits |= (((from[b >> 5] as number) >>> (b & 31)) & 1) << bit;
      }
      to[w] = bits;
    }
    return to;
  });
}

function areInterchangeable(tables: readonly Table[], one: number, other: number): boolean {
  const order = [...tables.keys()];
  order[one] = other;
  order[other] = one;
  return compareTables(reordered(tables, order), tables) === 0;
}

function compareTables(a: readonly Table[], b: readonly Table[]): number {
  for (let i = 0; i < a.length; i++) {
    const one = a[i] as Table;
    const other = b[i] as Table;
    for (let w = 0; w < one.length; w++) {
      const difference = (one[w] as number) - (other[w] as number);
      if (difference !== 0) return difference;
    }
  }
  return 0;
}

function hexOf(table: Table, digits: number): string {
  const text = [...table]
    .map((bits) => bits.toString(16).padStart(8, '0'))
    .reverse()
    .join('');
  return text.slice(-digits);
}

function popcount(bits: number): number {
  let x = bits - ((bits >>> 1) & 0x55555555);
  x = (x & 0x33333333) + ((x >>> 2) & 0x33333333);
  return Math.imul((x + (x >>> 4)) & 0x0f0f0f0f, 0x01010101) >>> 24;
}

/** A hash of two 32-bit integers that depends on their order. */
function mix(a: number, b: number): number {
  let x = Math.imul(a ^ 0x9e3779b9, 0x85ebca6b) ^ b;
  x = Math.imul(x ^ (x >>> 15), 0xc2b2ae35);
  return x ^ (x >>> 13);
}
