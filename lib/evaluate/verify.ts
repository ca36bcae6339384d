import { throwIfAborted } from '../errors.js';
import type { MotivationView } from '../prompt/motivation.js';
import { formatScore } from '../reward/describe.js';
import {
  collect,
  type RolloutPolicy,
  type RolloutTokenizer,
  renderCompletion,
  renderPrompt,
} from '../rollout/index.js';
import { identityOf } from '../tasks/dataset.js';
import type { Task } from '../tasks/index.js';

export interface VerifyOptions {
  /** The model's, so that prompts are measured in its tokens (default: characters, of the messages' texts alone). */
  readonly tokenizer?: RolloutTokenizer;
  /** The longest prompt that leaves room for a completion, in tokens; needs `tokenizer`. */
  readonly maxPromptTokens?: number;
  /** The view of the motivation that the prompts show (default `full`, the longest). */
  readonly motivation?: MotivationView;
  /** A file of rows to evaluate on: none of them may be the same, to the task, as a row of the data. */
  readonly testFile?: string;
  readonly signal?: AbortSignal;
}

export interface RowProblem {
  /** 1 for the first row of its file. */
  readonly row: number;
  /** The file and the line or row, as in "a.jsonl, line 3". */
  readonly where: string;
  readonly reason: string;
}

export interface VerifyReport {
  readonly task: string;
  readonly file: string;
  readonly rows: number;
  /** Absent where the task cannot write reference answers. */
  readonly references?: {
    readonly highest: number;
    /** How many references get it. */
    readonly atHighest: number;
    /** How many references came to each case, by component. */
    readonly cases: Readonly<Record<string, Readonly<Record<string, number>>>>;
  };
  readonly promptLengths: {
    readonly unit: 'tokens' | 'characters';
    readonly least: number;
    readonly median: number;
    readonly greatest: number;
    readonly limit?: number;
    readonly overLimit: number;
  };
  /**
   * How many rows' prompts name special tokens of the model, and which these are. They stay text in the
   * prompt unless the tokenizer makes them tokens. Absent where there is none.
   */
  readonly specialTokens?: { readonly rows: number; readonly names: readonly string[] };
  /** Rows whose prompt an earlier row has. */
  readonly duplicates: number;
  /** How many rows differ by the task's identity: rows of other names and wording may be the same puzzle. */
  readonly distinct: number;
  /** Present where a file of test rows was given. */
  readonly test?: {
    readonly file: string;
    readonly rows: number;
    readonly distinct: number;
    /** Test rows that are the same, by the task's identity, as a row of the data. */
    readonly leaked: number;
  };
  /** The task's own check (for knights and knaves, the solver against the solution). */
  readonly check?: { readonly name: string; readonly passed: number };
  /** What is off, in the order of the rows; empty where nothing is. */
  readonly problems: readonly RowProblem[];
}

/**
 * Checks a data set row by row: that it can be read, that its reference answer gets the highest total, that
 * its prompt fits, that it is there once, and what the task itself knows to check. Of test rows, that they
 * can be read and that none is the same as a row of the data.
 *
 * @throws MerfError FILE_NOT_FOUND, UNSUPPORTED, EMPTY_DATASET or MALFORMED_FILE where the file as a whole cannot be
 * read, ABORTED; what is wrong with single rows is in the report
 */
export async function verifyDataset<Row>(
  task: Task<Row>,
  file: string,
  options: VerifyOptions = {},
): Promise<VerifyReport> {
  const loaded = await task.read(file);
  const { highest } = task.spec;
  const { tokenizer = characters, motivation = 'full', signal } = options;
  const cases: Record<string, Record<string, number>> = {};
  for (const component of task.spec.components) {
    const names = 'cases' in component ? component.cases.map((option) => option.name) : ['measured'];
    cases[component.name] = Object.fromEntries(names.map((name) => [name, 0]));
  }
  const problems: RowProblem[] = [];
  const lengths: number[] = [];
  const firstWith = new Map<string, string>();
  const firstLike = new Map<string, string>();
  let atHighest = 0;
  let duplicates = 0;
  let overLimit = 0;
  let passed = 0;
  let naming = 0;
  const names = new Set<string>();

  for (const entry of loaded) {
    throwIfAborted(signal, 'verifying');
    const { number, where } = entry;
    const report = (reason: string) => problems.push({ row: number, where, reason });
    if ('problem' in entry) {
      report(entry.problem);
      continue;
    }
    const { row } = entry;
    try {
      const identity = task.identity(row);
      if (!firstLike.has(identity)) firstLike.set(identity, where);
      const [group] = task.reference
        ? await collect(referencePolicy(tokenizer, task.reference(row)), task, [row], {
            motivation,
            labels: [String(number)],
            signal,
          })
        : [{ episodes: [] }];
      const { episodes } = group as NonNullable<typeof group>;
      const prompt =
        episodes[0]?.prompt ??
        renderPrompt(tokenizer, task.messages(row, motivation), task.environment?.tools);
      const { length } = prompt.tokens;
      lengths.push(length);
      if (options.tokenizer && length > (options.maxPromptTokens ?? Number.POSITIVE_INFINITY)) {
        overLimit++;
        report(`its prompt has ${length} tokens, ${options.maxPromptTokens} fit`);
      }
      if (prompt.named) {
        naming++;
        for (const name of prompt.named) names.add(name);
        if (tokenizer.splitSpecialTokens === false) {
          report(
            `it names ${[...new Set(prompt.named)].join(', ')}, which becomes a special token in its prompt`,
          );
        }
      }
      const key = identityOf(prompt.messages);
      const earlier = firstWith.get(key);
      if (earlier !== undefined) {
        duplicates++;
        report(`it has the prompt of ${earlier}`);
      } else firstWith.set(key, where);
      for (const { reward } of episodes) {
        for (const [name, part] of Object.entries(reward.parts)) {
          const counts = cases[name] as Record<string, number>;
          counts[part.case] = (counts[part.case] ?? 0) + 1;
        }
        if (task.spec.isHighest(reward)) atHighest++;
        else {
          const parts = Object.entries(reward.parts).map(([name, part]) => `${name} ${part.case}`);
          report(
            `its reference answer gets ${formatScore(reward.total)} (${parts.join(', ')}), not ${formatScore(highest)}`,
          );
        }
      }
      const wrong = await task.check?.find(row);
      if (wrong === undefined) passed++;
      else report(wrong);
    } catch (error) {
      throwIfAborted(signal, 'verifying');
      report(error instanceof Error ? error.message : String(error));
    }
  }

  const test =
    options.testFile === undefined
      ? undefined
      : await verifyTestRows(task, options.testFile, { firstLike, problems, signal });
  lengths.sort((a, b) => a - b);
  return {
    task: task.name,
    file,
    rows: loaded.length,
    ...(task.reference ? { references: { highest, atHighest, cases } } : {}),
    promptLengths: {
      unit: options.tokenizer ? 'tokens' : 'characters',
      least: lengths[0] ?? 0,
      median: lengths[lengths.length >> 1] ?? 0,
      greatest: lengths.at(-1) ?? 0,
      ...(options.maxPromptTokens === undefined ? {} : { limit: options.maxPromptTokens }),
      overLimit,
    },
    ...(naming > 0 && { specialTokens: { rows: naming, names: [...names] } }),
    duplicates,
    distinct: firstLike.size,
    ...(test && { test }),
    ...(task.check ? { check: { name: task.check.name, passed } } : {}),
    problems,
  };
}

/** @param options.firstLike where the first row of the data with an identity stands */
async function verifyTestRows<Row>(
  task: Task<Row>,
  file: string,
  options: {
    firstLike: ReadonlyMap<string, string>;
    problems: RowProblem[];
    signal: AbortSignal | undefined;
  },
): Promise<NonNullable<VerifyReport['test']>> {
  const { firstLike, problems, signal } = options;
  const loaded = await task.read(file);
  const identities = new Set<string>();
  let leaked = 0;
  for (const entry of loaded) {
    throwIfAborted(signal, 'verifying');
    const report = (reason: string) => problems.push({ row: entry.number, where: entry.where, reason });
    if ('problem' in entry) {
      report(entry.problem);
      continue;
    }
    try {
      const identity = task.identity(entry.row);
      identities.add(identity);
      const twin = firstLike.get(identity);
      if (twin === undefined) continue;
      leaked++;
      report(`it is the same as ${twin}, a row of the data`);
    } catch (error) {
      report(error instanceof Error ? error.message : String(error));
    }
  }
  return { file, rows: loaded.length, distinct: identities.size, leaked };
}

// The end of a prompt, in tokens, that its completion goes on from.
const promptEnd = 32;

/** A policy that has nothing to draw: its one completion of any prompt is `answer`. */
function referencePolicy(tokenizer: RolloutTokenizer, answer: string): RolloutPolicy {
  return {
    tokenizer,
    contextLength: Number.MAX_SAFE_INTEGER,
    async sample(prompts) {
      return prompts.map((prompt) => {
        const last = Array.from(prompt as ArrayLike<number>).slice(-promptEnd);
        const asked = { text: tokenizer.decode(last) };
        const completion = renderCompletion(tokenizer, asked, answer, tokenizer.eosIds[0]);
        const certain = new Float32Array(completion.tokens.length);
        return {
          promptTokens: [],
          completions: [
            {
              text: completion.text,
              tokens: Int32Array.from(completion.tokens),
              logprobs: certain,
              samplingLogprobs: certain,
              entropies: certain,
              finishReason: 'stop' as const,
            },
          ],
        };
      });
    },
  };
}

const utf16 = (text: string) => Array.from({ length: text.length }, (_, i) => text.charCodeAt(i));

/** A tokenizer whose tokens are the characters of the messages' texts. */
const characters: RolloutTokenizer = {
  applyChatTemplate: (messages) => messages.map(({ content }) => content ?? '').join(''),
  encode: utf16,
  encodePrompt: utf16,
  encodeContinuation: utf16,
  decode: (ids: ArrayLike<number>) => String.fromCharCode(...Array.from(ids)),
  eosIds: [],
};

/** The report in words. @param maxProblems how many offending rows are listed (default 20) */
export function formatVerifyReport(report: VerifyReport, maxProblems = 20): string {
  const { promptLengths: lengths, references, problems } = report;
  const lines = [`${report.file}: ${report.rows} rows for ${report.task}`];
  const line = (name: string, text: string) => lines.push(`  ${name.padEnd(18)} ${text}`);
  if (references) {
    const { atHighest, highest, cases } = references;
    line(
      'reference answers',
      `${atHighest} of ${report.rows} get the highest total, ${formatScore(highest)}`,
    );
    for (const [component, counts] of Object.entries(cases)) {
      const text = Object.entries(counts).map(([name, count]) => `${name} ${count}`);
      line(`  ${component}`, text.join(', '));
    }
  } else line('reference answers', 'the task has none');
  if (report.check) line(report.check.name, `${report.check.passed} of ${report.rows}`);
  const limit =
    lengths.limit === undefined ? '' : `; ${lengths.limit} fit, ${lengths.overLimit} rows are longer`;
  line(
    'prompt length',
    `${lengths.least} to ${lengths.greatest} ${lengths.unit}, median ${lengths.median}${limit}`,
  );
  if (report.specialTokens) {
    const { rows, names } = report.specialTokens;
    const whose = rows === 1 ? "1 row's prompt names" : `${rows} rows' prompts name`;
    line('special tokens', `${whose} ${names.join(', ')}`);
  }
  line('duplicates', String(report.duplicates));
  line('distinct rows', `${report.distinct}, whatever the wording`);
  if (report.test) {
    const { file, rows, distinct, leaked } = report.test;
    line(
      'test rows',
      `${rows} in ${file}, ${distinct} distinct; ${leaked} are the same as a row of the data`,
    );
  }
  if (problems.length === 0) return [...lines, 'Nothing is off.'].join('\n');
  const rows = new Set(problems.map((problem) => problem.where)).size;
  lines.push(`${rows} ${rows === 1 ? 'row is' : 'rows are'} off:`);
  for (const problem of problems.slice(0, maxProblems)) lines.push(`  ${problem.where}: ${problem.reason}`);
  if (problems.length > maxProblems) lines.push(`  and ${problems.length - maxProblems} more`);
  return lines.join('\n');
}
