import { describeValue } from '../errors.js';
import type { ChatMessage } from '../prompt/chat-template.js';
import { type Fields, loadRows, notePlace, placeOf } from '../tasks/dataset.js';

/** A prompt, as messages or as text that is encoded as it stands, and what the model should write after it. */
export type Example =
  | { messages: readonly ChatMessage[]; completion: string }
  | { prompt: string; completion: string };

/**
 * Examples from a .jsonl or .parquet file, whose rows may be any of
 * - a `prompt` and a `completion`, both text or both messages;
 * - `messages`, or `conversations`, in which every message of the assistant is learned after those before it, but for
 *   one with a `weight` of 0;
 * - `messages` and a `completion` of text.
 *
 * @throws MerfError FILE_NOT_FOUND, UNSUPPORTED, EMPTY_DATASET, MALFORMED_FILE naming the first line that does not fit
 */
export async function readExamples(file: string): Promise<Example[]> {
  const rows = await loadRows(file, examplesOf);
  for (const examples of rows) {
    for (const example of examples) notePlace(example, placeOf(examples));
  }
  return rows.flat();
}

/** Whether a row holds an example rather than the columns of some task. */
export function holdsExample(fields: Fields): boolean {
  if (isGiven(fields.completion)) return true;
  const messages = fields.messages ?? fields.conversations;
  return Array.isArray(messages) && messages.some((message) => isAssistant(roleOf(message)));
}

// What a row says beyond these would be left out in silence.
const unknownInputs = ['tools', 'images', 'image', 'chat_template_kwargs'];

/** The examples of a row. @throws Error that says what does not fit */
export function examplesOf(fields: Fields): Example[] {
  const { prompt, completion } = fields;
  const messages = fields.messages ?? fields.conversations;
  const unknown = unknownInputs.find((column) => isGiven(fields[column]));
  if (unknown !== undefined) throw new Error(`Expected no ${unknown}, which examples cannot have`);
  if (isGiven(messages) && !isGiven(prompt)) {
    const conversation = messagesOf(messages, fields.messages === undefined ? 'conversations' : 'messages');
    if (!isGiven(completion)) return repliesOf(conversation, 0, 'messages');
    return completionsOf(conversation, completion);
  }
  if (isGiven(prompt) && isGiven(completion) && !isGiven(messages)) {
    if (Array.isArray(prompt)) return completionsOf(messagesOf(prompt, 'prompt'), completion);
    return [{ prompt: textOf(prompt, 'prompt'), completion: textOf(completion, 'completion') }];
  }
  const given = Object.keys(fields).filter((column) => isGiven(fields[column]));
  throw new Error(
    'Expected a "prompt" and a "completion", both text or both messages, or "messages" with replies of the assistant ' +
      `or a "completion" of text, but the columns with values are ${given.join(', ') || 'none'}`,
  );
}

/** What follows a conversation: one reply, or messages of which those of the assistant are learned. */
function completionsOf(conversation: readonly ChatMessage[], completion: unknown): Example[] {
  if (conversation.length === 0) throw new Error('Expected at least one message before the completion');
  if (!Array.isArray(completion)) {
    return [{ messages: conversation, completion: textOf(completion, 'completion') }];
  }
  const all = [...conversation, ...messagesOf(completion, 'completion')];
  return repliesOf(all, conversation.length, 'completion');
}

/** An example for each message of the assistant from the one at `first` on. */
function repliesOf(conversation: readonly ChatMessage[], first: number, column: string): Example[] {
  const examples = conversation.flatMap((message, i): Example[] => {
    if (i < first || !isAssistant(message.role) || message.weight === 0) return [];
    if (i === 0) throw new Error(`Expected a message before the first of the assistant in ${column}`);
    if (message.tool_calls !== undefined) {
      throw new Error(
        `Expected text from the assistant in ${column} but message ${i - first + 1} has tool_calls`,
      );
    }
    return [
      { messages: conversation.slice(0, i), completion: textOf(message.content, `a reply in ${column}`) },
    ];
  });
  if (examples.length === 0)
    throw new Error(`Expected a message of the assistant in ${column} but found none`);
  return examples;
}

function messagesOf(value: unknown, column: string): ChatMessage[] {
  if (!Array.isArray(value))
    throw new Error(`Expected messages in ${column} but found ${describeValue(value)}`);
  return value.map((message: unknown, i) => {
    const role = roleOf(message);
    if (typeof role !== 'string') {
      throw new Error(
        `Expected messages in ${column} but message ${i + 1} is ${describeValue(message)} without a role`,
      );
    }
    const { from: _, value: said, content = said ?? null, ...others } = message as Record<string, unknown>;
    // A table has every column in every message; a null is none.
    const kept = Object.entries(others).filter(([, other]) => isGiven(other));
    return {
      ...Object.fromEntries(kept),
      role,
      content: contentOf(content, `message ${i + 1} of ${column}`),
    };
  });
}

/** The role of a message in ChatML's names, or in ShareGPT's. */
function roleOf(message: unknown): unknown {
  if (typeof message !== 'object' || message === null) return undefined;
  const { role, from } = message as { role?: unknown; from?: unknown };
  if (isGiven(role) || typeof from !== 'string') return role;
  return { human: 'user', gpt: 'assistant' }[from] ?? from;
}

function isAssistant(role: unknown): boolean {
  return role === 'assistant';
}

/** The text of a message, whose parts may stand one by one. */
function contentOf(content: unknown, where: string): string | null {
  if (content === null || typeof content === 'string') return content;
  if (!Array.isArray(content))
    throw new Error(`Expected text in ${where} but found ${describeValue(content)}`);
  return content
    .map((part: { type?: unknown; text?: unknown } | null) => {
      if (part?.type === 'text' && typeof part.text === 'string') return part.text;
      throw new Error(
        `Expected parts of text in ${where} but found one of type ${describeValue(part?.type)}`,
      );
    })
    .join('');
}

function textOf(value: unknown, what: string): string {
  if (typeof value === 'string' && value !== '') return value;
  throw new Error(`Expected text for ${what} but found ${describeValue(value)}`);
}

/** Tables have a null, or an empty list, where a row has nothing in a column. */
function isGiven(value: unknown): boolean {
  return value !== undefined && value !== null && !(Array.isArray(value) && value.length === 0);
}
