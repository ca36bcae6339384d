/**
 * How a model's turn ended: with an end token, for want of room (`maxTokens`, or the context), at a stop string, or not
 * yet.
 */
export type FinishReason = 'stop' | 'length' | 'stop_string' | 'pending';

/** A stretch of an episode after its prompt, by who wrote it. */
export interface TurnText {
  readonly role: 'model' | 'environment';
  readonly text: string;
}

/** A completion as verifiers receive it. What is judged is what the model wrote, never what its environment did. */
export interface ParsedCompletion {
  /** The response that is judged: `raw`, with a `<think>` in front where the prompt ended in an opened one. */
  readonly text: string;
  /** What the model wrote, unchanged; its turns after one another where there are several. */
  readonly raw: string;
  /** Between the first `<think>` and the `</think>` after it, or to the end where it was never closed; trimmed. */
  readonly thinking?: string;
  /** Inside the last complete `<answer>` … `</answer>`, trimmed; it may be empty. */
  readonly answer?: string;
  /** How the last turn of the model ended. */
  readonly finishReason: FinishReason;
  /** Tokens that the model wrote, end tokens included. */
  readonly tokenCount: number;
  /** All that follows the prompt, by who wrote it. */
  readonly turns: readonly TurnText[];
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
  /** Default: one turn of the model, `raw`. */
  readonly turns?: readonly TurnText[];
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
    turns: input.turns ?? [{ role: 'model', text: input.raw }],
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
