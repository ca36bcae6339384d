import { z } from 'zod';
import { MerfError } from '../../errors.js';
import { type DataOptions, defineTask, type TaskParts } from '../define.js';
import { parseQuestion } from './dataset.js';
import { Endpoint } from './endpoint.js';
import { searchEnvironment } from './environment.js';
import { normalizeAnswer } from './normalize.js';
import { PassageIndex, type Retriever } from './passage-index.js';
import { readCorpus } from './passages.js';
import { searchReward } from './reward.js';
import { makeWorld, type SearchRow } from './world.js';

const options = {
  corpus: z
    .string()
    .optional()
    .meta({
      description:
        'what is searched: a folder of .txt and .md files, or a .jsonl or .parquet file of passages ' +
        '(default: a made-up world)',
      path: true,
    }),
  endpoint: z
    .url({ protocol: /^https?$/, error: 'expected an http or https address' })
    .optional()
    .meta({
      description: 'address of a retrieval server that is asked instead',
    }),
  endpointFormat: z.enum(['query', 'search-r1']).default('query').meta({
    description: 'what the server takes: {query, k}, or the {queries, topk, return_scores} of Search-R1',
  }),
  endpointSeconds: z.number().positive().max(3600).default(10).meta({
    description: 'seconds that the server may take to answer',
  }),
  passages: z.int().min(1).max(100).default(3).meta({ description: 'passages that a search shows at most' }),
  passageCharacters: z.int().min(50).max(100_000).default(600).meta({
    description: 'characters of a passage at most; longer texts of a folder are divided, others are cut',
  }),
  searches: z.int().min(1).max(100).default(3).meta({
    description: 'searches in an episode at most, each of which ends a turn',
  }),
  hops: z.enum(['1', '2', '1-2']).default('1-2').meta({
    description: 'searches that a question about the made-up world needs',
  }),
  world: z.int().default(1).meta({ description: 'seed of the made-up world' }),
};

export type SearchOptions = z.input<z.ZodObject<typeof options>> & DataOptions;

/**
 * A search agent as in Search-R1 (arXiv 2503.09516): the model writes queries in its turn, reads what is
 * found, and answers a question. Questions come from files with `question` and golden answers, and are then
 * looked up in a corpus or at an endpoint; without any of these they are about a made-up world, whose
 * passages are the corpus.
 */
export const search = defineTask({
  name: 'search',
  summary: 'answer questions with the help of a search engine, in several turns',
  options,
  async create(chosen, reading): Promise<TaskParts<SearchRow>> {
    const { corpus, endpoint, passages, passageCharacters, searches } = chosen;
    if (corpus !== undefined && endpoint !== undefined) {
      throw new MerfError(
        'INVALID_ARGUMENT',
        'Expected either corpus or endpoint for the task search but received both',
      );
    }
    const madeUp = corpus === undefined && endpoint === undefined;
    if (madeUp && chosen.data !== undefined) {
      throw new MerfError(
        'INVALID_ARGUMENT',
        'Expected a corpus or an endpoint for the task search, in which the questions of data can be ' +
          'looked up',
      );
    }
    const world = madeUp ? makeWorld(chosen.world) : undefined;
    let retriever: Retriever;
    if (endpoint !== undefined) {
      const { endpointFormat: format, endpointSeconds: timeoutSeconds } = chosen;
      retriever = new Endpoint({ url: endpoint, format, timeoutSeconds });
    } else {
      retriever = new PassageIndex(
        world ? world.passages : await readCorpus(corpus as string, passageCharacters, reading),
      );
    }
    const instruction = instructionFor(searches);
    return {
      spec: searchReward,
      messages: (row) => [
        { role: 'system', content: instruction },
        { role: 'user', content: row.question },
      ],
      ...(world && {
        data: world.questions
          .filter((question) => chosen.hops.includes(String(question.passages.length)))
          .map(({ question, answers }) => ({ question, answers })),
      }),
      parse: parseQuestion,
      identity: (row) => row.question,
      reference: (row) => {
        const answer = row.answers.find((one) => normalizeAnswer(one) !== '');
        return `<think>\n\n</think>\n<answer>\n${answer}\n</answer>`;
      },
      environment: searchEnvironment({
        retriever,
        topK: passages,
        passageCharacters,
        maxTurns: searches + 1,
        // The endpoint's own limit comes first, as its message says more.
        timeoutSeconds: chosen.endpointSeconds + 5,
      }),
    };
  },
});

/** The system message without a motivation. @param searches how many the model may do */
export function instructionFor(searches: number): string {
  const often = searches === 1 ? 'once' : `up to ${searches} times`;
  return (
    'Answer the question. First think between <think> and </think>. Where you need to know more, write a ' +
    'query between <search> and </search>; what is found then follows between <information> and ' +
    `</information>, and you think again. You can search ${often}. In the end answer between <answer> and ` +
    '</answer> with a few words, like this:\n' +
    '<think>\nyour reasoning\n</think>\n<search>\na query\n</search>\n' +
    '<information>\nwhat is found\n</information>\n' +
    '<think>\nyour reasoning\n</think>\n<answer>\nyour answer\n</answer>'
  );
}
