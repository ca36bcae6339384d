import { MerfError } from '../../errors.js';
import type { Retriever } from './passage-index.js';
import { type Passage, parsePassage } from './passages.js';

/**
 * How an endpoint is spoken to, always by POST with JSON:
 * - `query`: `{ query, k }`, answered by `{ passages: [{ title, text }, …] }` or that list alone;
 * - `search-r1`: `{ queries: [query], topk, return_scores: true }`, answered by
 *   `{ result: [[{ document: { contents }, score }, …]] }`, as the retrieval servers of Search-R1 do.
 */
export type EndpointFormat = 'query' | 'search-r1';

export interface EndpointOptions {
  readonly url: string;
  readonly format: EndpointFormat;
  /** How long one request may take, the reading of its answer included. */
  readonly timeoutSeconds: number;
}

/** Greater answers are refused, in characters. */
const maxAnswer = 4_000_000;

/** Passages from a retrieval server. */
export class Endpoint implements Retriever {
  readonly #options: EndpointOptions;

  constructor(options: EndpointOptions) {
    this.#options = options;
  }

  /** @throws MerfError ENVIRONMENT_FAILED that names the endpoint and what went wrong, ABORTED where `signal` fired */
  async search(query: string, count: number, signal?: AbortSignal): Promise<Passage[]> {
    const { url, format, timeoutSeconds } = this.#options;
    const timeout = AbortSignal.timeout(timeoutSeconds * 1000);
    const body =
      format === 'query' ? { query, k: count } : { queries: [query], topk: count, return_scores: true };
    let answer: string;
    try {
      const response = await fetch(url, {
        method: 'POST',
        headers: { 'content-type': 'application/json', accept: 'application/json' },
        body: JSON.stringify(body),
        signal: signal ? AbortSignal.any([signal, timeout]) : timeout,
      });
      answer = await textOf(response);
      if (!response.ok) throw this.#failure(`answered with status ${response.status}${beginningOf(answer)}`);
    } catch (cause) {
      if (cause instanceof MerfError) throw cause;
      if (signal?.aborted) throw new MerfError('ABORTED', 'searching was aborted', { cause });
      if (timeout.aborted) throw this.#failure(`did not answer within ${timeoutSeconds} s`, cause);
      throw this.#failure(`cannot be reached: ${reasonOf(cause)}`, cause);
    }
    try {
      return passagesOf(JSON.parse(answer), format).slice(0, count);
    } catch (cause) {
      throw this.#failure(`answered with what is no list of passages: ${(cause as Error).message}`, cause);
    }
  }

  #failure(what: string, cause?: unknown): MerfError {
    return new MerfError('ENVIRONMENT_FAILED', `The search endpoint ${this.#options.url} ${what}`, { cause });
  }
}

async function textOf(response: Response): Promise<string> {
  let text = '';
  const decoder = new TextDecoder();
  for await (const chunk of response.body ?? []) {
    text += decoder.decode(chunk as Uint8Array, { stream: true });
    if (text.length > maxAnswer) throw new Error(`its answer has more than ${maxAnswer} characters`);
  }
  return text + decoder.decode();
}

function passagesOf(answer: unknown, format: EndpointFormat): Passage[] {
  const list =
    format === 'query' ? (Array.isArray(answer) ? answer : fieldOf(answer, 'passages')) : resultOf(answer);
  if (!Array.isArray(list)) {
    throw new Error(
      format === 'query' ? 'Expected a list, alone or as passages' : 'Expected a list of lists as result',
    );
  }
  return list.map((item: unknown) => {
    const passage = format === 'search-r1' ? (fieldOf(item, 'document') ?? item) : item;
    if (typeof passage !== 'object' || passage === null) throw new Error('Expected an object for a passage');
    return parsePassage(passage as Record<string, unknown>);
  });
}

function resultOf(answer: unknown): unknown {
  const results = fieldOf(answer, 'result');
  return Array.isArray(results) ? results[0] : undefined;
}

function fieldOf(value: unknown, name: string): unknown {
  return typeof value === 'object' && value !== null ? (value as Record<string, unknown>)[name] : undefined;
}

function beginningOf(answer: string): string {
  const text = answer.replace(/\s+/g, ' ').trim();
  return text === '' ? '' : `: ${text.slice(0, 200)}`;
}

/** Node's fetch says "fetch failed" and why in the cause. */
function reasonOf(error: unknown): string {
  const { message, cause } = error as { message?: string; cause?: { code?: string; message?: string } };
  return cause?.message || cause?.code || message || String(error);
}
