/** How a completion ended; the words that `Policy.sample` uses. */
export type FinishReason = 'stop' | 'length' | 'stop_string' | 'aborted';

/** A completion as verifiers receive it. */
export interface ParsedCompletion {
  /** The response that is judged: `raw`, with a `<think>` in front where the prompt ended in an opened one. */
  readonly text: string;
  /** What the model wrote, unchanged. */
  readonly raw: string;
  /** Between the first `<think>` and the `</think>` after it, or to the end where it was never closed; trimmed. */
  readonly thinking?: string;
  /** Inside the last complete `<answer>` … `</answer>`, trimmed; it may be empty. */
  readonly answer?: string;
  readonly finishReason: FinishReason;
  /** Length of the completion in tokens, the end token included. */
  readonly tokenCount: number;
}

export interface CompletionInput {
  /** The decoded completion, without the end token's text. */
  readonly raw: string;
  /** The prompt as text, so that a `<think>` opened at its end counts as part of the response. */
  readonly prompt?: string;
  /** Default `stop`. */
  readonly finishReason?: FinishReason;
  /** Default 0. */
  readonly tokenCount?: number;
}

/** Finds the thinking and the answer in a completion. Never fails: what is not there is left out. */
export function parseCompletion(input: CompletionInput): ParsedCompletion {
  const opened = input.prompt?.trimEnd().endsWith('<think>') ?? false;
  const text = opened ? `<think>${input.raw}` : input.raw;
  const thinking = thinkingOf(text);
  const answer = answerOf(text);
  return {
    text,
    raw: input.raw,
    ...(thinking === undefined ? {} : { thinking }),
    ...(answer === undefined ? {} : { answer }),
    finishReason: input.finishReason ?? 'stop',
    tokenCount: input.tokenCount ?? 0,
  };
}

function thinkingOf(text: string): string | undefined {
  const start = text.indexOf('<think>');
  if (start < 0) return undefined;
  const from = start + '<think>'.length;
  const end = text.indexOf('</think>', from);
  return text.slice(from, end < 0 ? undefined : end).trim();
}

/** The last match of `<answer>(.*?)</answer>`, matched from left to right. */
function answerOf(text: string): string | undefined {
  let answer: string | undefined;
  let position = 0;
  for (;;) {
    const start = text.indexOf('<answer>', position);
    if (start < 0) return answer;
    const from = start + '<answer>'.length;
    const end = text.indexOf('</answer>', from);
    if (end < 0) return answer;
    answer = text.slice(from, end).trim();
    position = end + '</answer>'.length;
  }
}
