import { z } from 'zod';
import { MerfError } from '../../errors.js';
import { type DataOptions, defineTask, type TaskParts } from '../define.js';
import { type MathRow, parseMathRow } from './dataset.js';
import { whyUnreadable } from './equivalence.js';
import { generateProblem } from './generator.js';
import { mathReward } from './reward.js';

const options = {
  problemColumn: z.string().min(1).optional().meta({
    description: 'column of the problem (default: prompt, problem or question)',
  }),
  answerColumn: z.string().min(1).optional().meta({
    description: 'column of the answer or of a solution that ends in it (default: answer or solution)',
  }),
  problemSteps: z.int().min(1).max(8).default(2).meta({
    description: 'how many steps a generated word problem has',
  }),
};

export type MathOptions = z.input<z.ZodObject<typeof options>> & DataOptions;

const thinkFirst = 'Solve the problem. First think between <think> and </think>. Then ';

/** The system message without a motivation. */
export const mathInstruction =
  `${thinkFirst}put the final answer within \\boxed{}, like this:\n` +
  '<think>\nyour reasoning\n</think>\n\\boxed{42}';

/** The system message where the problem itself asks to box the answer, as published prompts do. */
export const mathInstructionBesidesBox = `${thinkFirst}answer.`;

/**
 * Mathematics with a final answer in `\boxed{}`: any file of problems and answers, such as MATH500, AIME, AMC
 * or GSM8K, or generated word problems. Answers count where they say the same as the known one, in whatever
 * notation.
 */
export const math = defineTask({
  name: 'math',
  summary: 'mathematics problems with a final answer in \\boxed{}',
  options,
  create: ({ problemColumn, answerColumn, problemSteps }): TaskParts<MathRow> => ({
    spec: mathReward,
    messages: ({ problem }) => [
      { role: 'system', content: problem.includes('\\boxed') ? mathInstructionBesidesBox : mathInstruction },
      { role: 'user', content: problem },
    ],
    data: (random) => generateProblem(random, problemSteps),
    parse: (fields) => parseMathRow(fields, { problemColumn, answerColumn }),
    identity: ({ problem }) => problem,
    reference: ({ answer }) => completionOf('', answer),
    demonstrate({ problem, answer, reasoning }) {
      if (reasoning !== undefined) return completionOf(reasoning, answer);
      throw new MerfError(
        'INVALID_ARGUMENT',
        `Expected a row with a worked solution to demonstrate but received ${problem.slice(0, 80)}`,
      );
    },
    check: {
      name: 'answer is read',
      async find({ answer }) {
        const reason = await whyUnreadable(answer);
        return reason && `its answer ${JSON.stringify(answer)} cannot be read: ${reason}`;
      },
    },
  }),
});

function completionOf(thinking: string, answer: string): string {
  return `<think>\n${thinking}\n</think>\n\\boxed{${answer}}`;
}
