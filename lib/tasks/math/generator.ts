import type { Random } from '../random.js';
import type { MathRow } from './dataset.js';

const names = [
  'Ada',
  'Ben',
  'Carla',
  'Dmitri',
  'Elif',
  'Farid',
  'Grace',
  'Hiro',
  'Ines',
  'Jonas',
  'Kira',
  'Liam',
];
const things = ['apples', 'books', 'coins', 'marbles', 'pencils', 'shells', 'stamps', 'stickers'];

interface Step {
  readonly sentence: string;
  /** The operation as a worked solution writes it, such as `+ 3`. */
  readonly operation: string;
  readonly result: number;
}

/** The largest number that a problem comes to. */
const largest = 1000;

/**
 * A word problem about a number of things that changes step by step, with its solution worked out.
 *
 * @param steps how often the number changes
 */
export function generateProblem(random: Random, steps: number): MathRow {
  const name = random.pick(names);
  const thing = random.pick(things);
  let count = 2 + random.below(59);
  const sentences = [`${name} has ${count} ${thing}.`];
  const reasoning = [`${name} has ${count} ${thing} at first.`];
  for (let i = 0; i < steps; i++) {
    const step = drawStep(random, name, count);
    sentences.push(step.sentence);
    reasoning.push(`${step.sentence} ${count} ${step.operation} = ${step.result}.`);
    count = step.result;
  }
  sentences.push(`How many ${thing} does ${name} have now?`);
  return { problem: sentences.join(' '), answer: String(count), reasoning: reasoning.join('\n') };
}

function drawStep(random: Random, name: string, count: number): Step {
  const factors = [2, 3, 4, 5].filter((factor) => count * factor <= largest);
  const divisors = [2, 3, 4, 5].filter((divisor) => count % divisor === 0 && count > divisor);
  const kinds = ['buy', ...(count > 2 ? ['give'] : []), ...(factors.length > 0 ? ['grow'] : [])];
  if (divisors.length > 0) kinds.push('share');
  const kind = random.pick(kinds);
  if (kind === 'give') {
    const some = 1 + random.below(Math.min(count - 1, 40));
    return { sentence: `${name} gives ${some} of them away.`, operation: `- ${some}`, result: count - some };
  }
  if (kind === 'grow') {
    const factor = random.pick(factors);
    const sentence = `Then a friend brings so many that ${name} has ${factor} times as many.`;
    return { sentence, operation: `* ${factor}`, result: count * factor };
  }
  if (kind === 'share') {
    const divisor = random.pick(divisors);
    const sentence = `${name} parts them into ${divisor} equal heaps and keeps one of these.`;
    return { sentence, operation: `/ ${divisor}`, result: count / divisor };
  }
  const some = 1 + random.below(40);
  return { sentence: `${name} buys ${some} more.`, operation: `+ ${some}`, result: count + some };
}
