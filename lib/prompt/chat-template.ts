import { Template } from '@huggingface/jinja';
import { MerfError } from '../errors.js';

/** One turn of a conversation; the roles that a template knows are mostly system, user and assistant. */
export interface ChatTurn {
  readonly role: string;
  readonly content: string;
}

export interface ChatTemplateOptions {
  /** Ends the text where the assistant is to speak. Default false. */
  addGenerationPrompt?: boolean;
  /** Further variables of the template, such as `enable_thinking`. */
  variables?: Readonly<Record<string, unknown>>;
}

/** A model's chat template: a Jinja program that writes a conversation as the text the model was trained on. */
export class ChatTemplate {
  readonly #template: Template;

  /**
   * @param source the Jinja text
   * @param tokens variables that templates expect, `bos_token` and `eos_token` among them
   * @throws MerfError UNSUPPORTED where the text is not Jinja that @huggingface/jinja understands
   */
  constructor(
    readonly source: string,
    private readonly tokens: Readonly<Record<string, string>>,
  ) {
    try {
      this.#template = new Template(source);
    } catch (error) {
      throw new MerfError('UNSUPPORTED', `The chat template cannot be read: ${(error as Error).message}`, {
        cause: error,
      });
    }
  }

  /**
   * @throws MerfError INVALID_ARGUMENT where the template refuses the conversation, for instance its order of roles
   */
  render(messages: readonly ChatTurn[], options: ChatTemplateOptions = {}): string {
    checkMessages(messages);
    try {
      return this.#template.render({
        ...this.tokens,
        ...options.variables,
        messages: messages.map(({ role, content }) => ({ role, content })),
        add_generation_prompt: options.addGenerationPrompt ?? false,
      });
    } catch (error) {
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

function checkMessages(messages: readonly ChatTurn[]): void {
  if (!Array.isArray(messages) || messages.length === 0) {
    throw new MerfError(
      'INVALID_ARGUMENT',
      'Expected at least one message of a role and a content for messages',
    );
  }
  for (const [i, message] of messages.entries()) {
    if (typeof message?.role !== 'string' || typeof message.content !== 'string') {
      throw new MerfError(
        'INVALID_ARGUMENT',
        `Expected a role and a content, both strings, for messages[${i}]`,
      );
    }
  }
}
