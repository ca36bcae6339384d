import { MerfError } from '../errors.js';
import type { Tokenizer } from '../policy/index.js';
import type { ChatMessage } from '../prompt/chat-template.js';
import type { RenderedPrompt } from './episode.js';

/** What a rollout asks of a tokenizer. `Tokenizer` has it. */
export type RolloutTokenizer = Pick<
  Tokenizer,
  'applyChatTemplate' | 'encode' | 'encodePrompt' | 'encodeContinuation' | 'decode' | 'eosIds'
>;

/** A prompt's text and tokens: of a conversation by the chat template, which opens the assistant's turn; of text as it stands. */
export function renderPrompt(
  tokenizer: RolloutTokenizer,
  prompt: string | readonly ChatMessage[],
  tools?: readonly object[],
): RenderedPrompt {
  if (typeof prompt === 'string') {
    return { messages: undefined, text: prompt, tokens: tokenizer.encodePrompt(prompt) };
  }
  const text = tokenizer.applyChatTemplate(prompt, {
    addGenerationPrompt: true,
    ...(tools && { variables: { tools } }),
  });
  return { messages: prompt, text, tokens: tokenizer.encode(text) };
}

// A text that no template changes and no message holds.
const marker = 'merf:the-assistant-spoke-here';

/**
 * What the chat template writes after a turn of the assistant's when `messages` follow, up to where the assistant is to
 * speak again. The template sees a stand-in for the conversation before them, so that nothing the model drew is written
 * a second time: templates that leave earlier thinking out of the history change nothing here.
 *
 * @param lastToken the text of the token that ended the turn, which the template's text then does not repeat
 * @throws MerfError UNSUPPORTED where the template does not write an assistant's words as they are, INVALID_ARGUMENT
 *   where it refuses the messages
 */
export function continuationOf(
  tokenizer: RolloutTokenizer,
  messages: readonly ChatMessage[],
  lastToken: string,
  tools?: readonly object[],
): string {
  const standIn: ChatMessage[] = [
    { role: 'user', content: 'question' },
    { role: 'assistant', content: marker },
  ];
  const text = tokenizer.applyChatTemplate([...standIn, ...messages], {
    addGenerationPrompt: true,
    ...(tools && { variables: { tools } }),
  });
  const at = text.indexOf(marker);
  if (at < 0) {
    throw new MerfError(
      'UNSUPPORTED',
      "The chat template does not write an assistant's message as it is, so messages cannot follow a sampled turn",
    );
  }
  const rest = text.slice(at + marker.length);
  return lastToken !== '' && rest.startsWith(lastToken) ? rest.slice(lastToken.length) : rest;
}
