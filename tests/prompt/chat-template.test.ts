import { describe, expect, test } from '@jest/globals';
import { MerfError } from '../../lib/errors.js';
import { type ChatMessage, ChatTemplate } from '../../lib/prompt/chat-template.js';

const source = `{{ bos_token }}{% for message in messages %}{% if message.role not in ['system', 'user', 'assistant'] %}{{ raise_exception('no such role: ' + message.role) }}{% endif %}[{{ message['role'] }}] {{ message['content'] | trim }}{{ eos_token }}
{% endfor %}{% if add_generation_prompt %}[assistant]{% if thinking is defined %} <think>{% endif %}{% endif %}`;
const template = new ChatTemplate(source, { bos_token: '<s>', eos_token: '</s>' });
const messages: ChatMessage[] = [
  { role: 'system', content: ' be brief ' },
  { role: 'user', content: '{{ not a template }}' },
];

function refusal(run: () => unknown): MerfError {
  try {
    run();
  } catch (error) {
    expect(error).toBeInstanceOf(MerfError);
    return error as MerfError;
  }
  throw new Error('expected a MerfError');
}

describe('a chat template', () => {
  test('writes the conversation with its tokens, whatever stands in the messages', () => {
    expect(template.render(messages)).toBe('<s>[system] be brief</s>\n[user] {{ not a template }}</s>\n');
  });

  test('opens the turn of the assistant where asked to, with variables of its own', () => {
    expect(template.render(messages, { addGenerationPrompt: true })).toMatch(/\n\[assistant\]$/);
    const thinking = template.render(messages, { addGenerationPrompt: true, variables: { thinking: true } });
    expect(thinking).toMatch(/\n\[assistant\] <think>$/);
  });

  test('passes its own refusals on', () => {
    const error = refusal(() => template.render([{ role: 'tool', content: 'x' }]));
    expect(error).toMatchObject({
      code: 'INVALID_ARGUMENT',
      message: expect.stringContaining('no such role: tool'),
    });
  });

  test.each([
    ['no messages', []],
    ['no list', 'text'],
    ['a message without a role', [{ content: 'x' }]],
    ['a content that is no text', [{ role: 'user', content: 5 }]],
    ['null', [null]],
  ])('refuses %s', (_, value) => {
    expect(refusal(() => template.render(value as ChatMessage[])).code).toBe('INVALID_ARGUMENT');
  });

  test('receives tool calls, names and roles as they are, and the tools', () => {
    const calls = new ChatTemplate(
      '{% for t in tools %}<tool>{{ t.function.name }}</tool>{% endfor %}{% for m in messages %}[{{ m.role }}' +
        '{% if m.name %} {{ m.name }}{% endif %}] {% if m.tool_calls %}{% for call in m.tool_calls %}' +
        '{{ call.function.name }}{{ call.function.arguments | tojson }}#{{ call.id }}{% endfor %}' +
        '{% else %}{{ m.content }}{% endif %}{% if m.tool_call_id %} for {{ m.tool_call_id }}{% endif %};{% endfor %}',
      {},
    );
    const conversation: ChatMessage[] = [
      { role: 'user', content: 'Weather?' },
      {
        role: 'assistant',
        content: null,
        tool_calls: [
          {
            id: 'c1',
            type: 'function',
            function: { name: 'weather', arguments: { city: 'Rome', days: [1, 2.5] } },
          },
        ],
      },
      { role: 'tool', name: 'weather', tool_call_id: 'c1', content: 'sunny' },
    ];
    const before = JSON.stringify(conversation);
    const tools = [{ type: 'function', function: { name: 'weather' } }];
    expect(calls.render(conversation, { variables: { tools } })).toBe(
      '<tool>weather</tool>[user] Weather?;[assistant] weather{"city": "Rome", "days": [1, 2.5]}#c1;' +
        '[tool weather] sunny for c1;',
    );
    expect(JSON.stringify(conversation)).toBe(before);
  });

  test('is refused where it is no Jinja', () => {
    expect(refusal(() => new ChatTemplate('{% for %}', {})).code).toBe('UNSUPPORTED');
  });
});
