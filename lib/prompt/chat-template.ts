import { MerfError } from '../errors.js';
import {
  compileTemplate,
  type Program,
  renderTemplate,
  TemplateLimitExceeded,
} from './template-interpreter.js';

/**
 * A message of a conversation, as the model's chat template receives it: whatever it has beside role and content (a
 * name, `tool_calls`, `tool_call_id`, ...) reaches the template unharmed.
 */
export interface ChatMessage {
  /** Mostly system, user, assistant or tool; the template decides which it knows. */
  readonly role: string;
  /** Text, or null for a message that has none, such as one of tool calls alone. */
  readonly content: string | null;
  readonly [key: string]: unknown;
}

export interface ChatTemplateOptions {
  /** Ends the text where the assistant is to speak. Default false. */
  addGenerationPrompt?: boolean;
  /** Further variables of the template, such as `enable_thinking` or `tools`. */
  variables?: Readonly<Record<string, unknown>>;
}

/** A model's chat template: a Jinja program that writes a conversation as the text the model was trained on. */
export class ChatTemplate {
  readonly #program: Program;

  /**
   * @param source the Jinja text
   * @param tokens variables that templates expect, `bos_token` and `eos_token` among them
   * @throws MerfError UNSUPPORTED where the text is not Jinja that @huggingface/jinja understands, or too
   *   long
   */
  constructor(
    readonly source: string,
    private readonly tokens: Readonly<Record<string, string>>,
  ) {
    try {
      this.#program = compileTemplate(source);
    } catch (error) {
      throw new MerfError('UNSUPPORTED', `The chat template cannot be read: ${(error as Error).message}`, {
        cause: error,
      });
    }
  }

  /**
   * @throws MerfError INVALID_ARGUMENT where the template refuses the conversation, for instance its order of
   *   roles, UNSUPPORTED where it computes more than templates may
   */
  render(messages: readonly ChatMessage[], options: ChatTemplateOptions = {}): string {
    checkMessages(messages);
    try {
      return renderTemplate(this.#program, {
        ...this.tokens,
        ...options.variables,
        messages,
        add_generation_prompt: options.addGenerationPrompt ?? false,
      });
    } catch (error) {
      if (error instanceof TemplateLimitExceeded) {
        throw new MerfError('UNSUPPORTED', `The chat template goes too far: ${error.message}`, {
          cause: error,
        });
      }
      throw new MerfError(
        'INVALID_ARGUMENT',
        `The chat template refuses these messages: ${(error as Error).message}`,
        {
          cause: error,
        },
      );
    }
  }
}

function checkMessages(messages: readonly ChatMessage[]): void {
  if (!Array.isArray(messages) || messages.length === 0) {
    throw new MerfError(
      'INVALID_ARGUMENT',
      'Expected at least one message of a role and a content for messages',
    );
  }
  for (const [i, message] of messages.entries()) {
    const { role, content } = (message ?? {}) as Partial<ChatMessage>;
    if (typeof role !== 'string' || (typeof content !== 'string' && content !== null)) {
      throw new MerfError(
        'INVALID_ARGUMENT',
        `Expected a role of text, and a content of text or null, for messages[${i}]`,
      );
    }
  }
}
