import { type ChildProcess, fork } from 'node:child_process';
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { typeScriptLoader } from '../../../lib/reward/worker.js';
import { parsePuzzle } from '../../../lib/tasks/countdown/dataset.js';
import { type Fields, firstFields, identityOf, loadRows, readRows } from '../../../lib/tasks/dataset.js';
import { readParquet } from '../../../lib/tasks/files/parquet.js';
import type { FromReader, ToReader } from '../../../lib/tasks/files/parquet-process.js';
import { parsePublishedRow } from '../../../lib/tasks/knights-and-knaves/dataset.js';
import { solve } from '../../../lib/tasks/knights-and-knaves/solver.js';
import { parseMathRow } from '../../../lib/tasks/math/dataset.js';
import { parseQuestion } from '../../../lib/tasks/search/dataset.js';
import { readCorpus } from '../../../lib/tasks/search/passages.js';
import { holdsExample, readExamples } from '../../../lib/train/examples.js';
import { fixturePath } from '../../support/fixtures.js';
import type { Draw } from '../draw.js';
import { mutateBytes, mutatedJsonText, mutateText } from '../mutate.js';
import { type Target, writeInput } from '../target.js';

const rows: readonly Fields[] = [
  { nums: [3, 5, 7, 11], target: 26 },
  { numbers: [1, 2, 3], target: 2 ** 53, id: 1e19 },
  {
    quiz: 'A very special island is inhabited only by knights and knaves.',
    names: ['Zoey', 'Oliver'],
    solution: [true, false],
    statements: "(('->', ('telling-truth', 1), ('lying', 0)), ('and', ('not', ('lying', 1)), ('lying', 0)))",
    solution_text_format: '(1) Zoey is a knight',
  },
  { problem: 'What is 1 + 1?', question: 'What?', answer: '#### 2', solution: '\\boxed{2}', level: 5 },
  { question: 'Who?', golden_answers: ['x', 'y'], reward_model: { ground_truth: { target: ['z'] } } },
  { id: 'a', title: 'Rivers', text: 'The Nile flows north.', contents: '"Nile"\nIt flows.' },
  { prompt: 'Say hi', completion: 'hi' },
  { prompt: [{ role: 'user', content: 'Say hi' }], completion: [{ role: 'assistant', content: 'hi' }] },
  {
    messages: [
      { role: 'user', content: 'q', weight: 0 },
      { role: 'assistant', content: [{ type: 'text', text: 'a' }], tool_calls: [{ id: 1 }] },
    ],
  },
  {
    conversations: [
      { from: 'human', value: 'q' },
      { from: 'gpt', value: 'a' },
    ],
  },
];

const parsers: readonly ((fields: Fields) => unknown)[] = [
  parsePuzzle,
  (fields) => {
    const row = parsePublishedRow(fields);
    return row.names.length <= 12 ? solve(row.statements) : row;
  },
  parseMathRow,
  parseQuestion,
  holdsExample,
  identityOf,
];

/** Does with a data file all that a command may, each reader on its own; how many of them could read it. */
async function readAll(file: string): Promise<number> {
  let done = 0;
  let refused: unknown;
  for (const read of [
    ...parsers.map((parse) => () => readRows(file, parse)),
    () => loadRows(file, identityOf),
    () => readExamples(file),
    () => readCorpus(file, 200),
    () => firstFields(file),
  ]) {
    try {
      await read();
      done += 1;
    } catch (error) {
      if ((error as Error).name !== 'MerfError') throw error;
      refused = error;
    }
  }
  if (done === 0) throw refused;
  return done;
}

const jsonl: Target = {
  name: 'jsonl',
  make(draw) {
    const lines = Array.from({ length: 1 + draw.below(4) }, () => {
      const row = draw.pick(rows);
      return draw.chance(0.6) ? mutatedJsonText(draw, row) : JSON.stringify(row);
    });
    const text = Buffer.from(
      draw.pick(['', '', '\ufeff', '\n\n']) + lines.join(draw.pick(['\n', '\r\n', '\n\n', '\r'])),
    );
    return { 'data.jsonl': draw.chance(0.3) ? mutateBytes(draw, text) : text };
  },
  run(input, folder) {
    writeInput(folder, input);
    return readAll(join(folder, 'data.jsonl'));
  },
};

// ---- Parquet

const parquetFiles = ['none', 'snappy', 'gzip', 'brotli', 'zstd', 'lz4', 'chats'].map((name) =>
  readFileSync(fixturePath(`parquet/${name}.parquet`)),
);

function parquetWith(draw: Draw): Uint8Array {
  const file = draw.pick(parquetFiles);
  const footer = file.length - 8 - file.readUInt32LE(file.length - 8);
  return draw.pick<() => Uint8Array>([
    () => mutateBytes(draw, file, footer, file.length),
    () => mutateBytes(draw, file, footer, file.length),
    () => mutateBytes(draw, file, 0, footer),
    () => mutateBytes(draw, file),
  ])();
}

/** The reader's process, which serves file after file here; starting one for each would take most of the time. */
let reader: ChildProcess | undefined;

const bounds = { rows: 100_000, bytes: 1 << 28, valueBytes: 1 << 28 };
const readerSeconds = 5;

async function readerProcess(): Promise<ChildProcess> {
  if (reader?.connected) return reader;
  const module = new URL('../../../lib/tasks/files/parquet-process.ts', import.meta.url);
  const child = fork(fileURLToPath(module), [], {
    serialization: 'advanced',
    stdio: ['ignore', 'ignore', 'ignore', 'ipc'],
    execArgv: ['--max-old-space-size=256', '--import', typeScriptLoader()],
  });
  child.channel?.unref();
  child.unref();
  reader = child;
  await answerOf(child, undefined, 120);
  return child;
}

/** What the reader says next; undefined where it ends, or is ended after too long, which the library reports. */
async function answerOf(
  child: ChildProcess,
  message: ToReader | undefined,
  seconds: number,
): Promise<FromReader | undefined> {
  const answered = new Promise<FromReader | undefined>((resolve) => {
    child.once('message', (answer) => resolve(answer as FromReader));
    child.once('exit', () => resolve(undefined));
  });
  child.channel?.ref();
  const timer = setTimeout(() => child.kill('SIGKILL'), seconds * 1000);
  if (message !== undefined) child.send(message, () => undefined);
  const answer = await answered;
  clearTimeout(timer);
  child.removeAllListeners();
  child.channel?.unref();
  if (answer === undefined) reader = undefined;
  return answer;
}

const parquet: Target = {
  name: 'parquet',
  make: (draw) => ({ 'data.parquet': parquetWith(draw), how: draw.chance(1 / 64) ? 'alone' : 'shared' }),
  async run(input, folder) {
    writeInput(folder, input);
    const file = join(folder, 'data.parquet');
    if (input.how === 'alone') {
      for await (const some of readParquet(file, { seconds: readerSeconds })) some.forEach(identityOf);
      return;
    }
    const child = await readerProcess();
    let answer = await answerOf(child, { file, ...bounds }, readerSeconds);
    while (answer?.type === 'rows') {
      for (const row of answer.rows) {
        identityOf(row);
        for (const parse of parsers) {
          try {
            parse(row);
          } catch (error) {
            if (!(error instanceof Error)) throw error;
          }
        }
      }
      answer = await answerOf(child, 'next', readerSeconds);
    }
    if (answer !== undefined && answer.type !== 'end' && answer.type !== 'failure') {
      throw new TypeError(`the reader says ${JSON.stringify(answer)}`);
    }
  },
};

/** Folders of texts, as a corpus of passages. */
const corpus: Target = {
  name: 'corpus',
  make: (draw) => ({
    'corpus/a.md': mutateText(
      draw,
      '# Rivers\n\nThe Nile flows north. It is long!\n\nThe Danube flows east.',
    ),
    'corpus/b/c.txt': mutateBytes(draw, Buffer.from(`Bridges cross rivers. ${'word '.repeat(100)}`)),
  }),
  run(input, folder) {
    writeInput(folder, input);
    return readCorpus(join(folder, 'corpus'), 100);
  },
};

export const dataTargets: readonly Target[] = [jsonl, parquet, corpus];
