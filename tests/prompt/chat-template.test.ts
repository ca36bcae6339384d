import { describe, expect, test } from '@jest/globals';
import { MerfError } from '../../lib/errors.js';
import { type ChatMessage, ChatTemplate } from '../../lib/prompt/chat-template.js';
import { strftime } from '../../lib/prompt/strftime.js';
import { readJson } from '../support/fixtures.js';

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

  // What Jinja2 3.1.6 writes for the template with any of the three line ends, under trim_blocks and
  // lstrip_blocks.
  test.each(['\n', '\r\n', '\r'])('means a new line by the line end %j', (end) => {
    const lines = [
      '{%- for m in messages %}',
      '    {% if m.role == "user" %}',
      '<{{ m.role }}>',
      '{{ m.content }}{{ "\\r\\n" }}',
      '    {% endif %}',
      '{%- endfor %}',
      '',
    ];
    const rendered = new ChatTemplate(lines.join(end), {}).render([{ role: 'user', content: 'a\r\nb' }]);
    expect(rendered).toBe('<user>\na\r\nb\r\n\n');
  });

  // transformers 5.24 keeps the white space before a generation block apart from that inside it.
  test('keeps the white space at both sides of a generation block', () => {
    const text =
      'a\n\n{% generation %}\n\n{%- if true %}b{% endif %}\n{% endgeneration %}\n\n{%- if true %}c{% endif %}';
    expect(new ChatTemplate(text, {}).render(messages)).toBe('a\n\nbc');
  });

  const dates = readJson<{ date: number[]; texts: Record<string, string> }[]>('strftime.json');
  test.each(dates)("writes dates as Python's strftime does: $date", ({ date, texts }) => {
    const [year, month, day, hour, minute, second, millisecond] = date as [
      number,
      number,
      number,
      number,
      number,
      number,
      number,
    ];
    const when = new Date(year, month - 1, day, hour, minute, second, millisecond);
    for (const [format, text] of Object.entries(texts)) {
      expect({ format, text: strftime(when, format) }).toEqual({ format, text });
    }
  });

  test('writes today with strftime_now, and refuses a directive that Python has not', () => {
    const today = new ChatTemplate("{{ strftime_now('%Y') }}", {});
    expect(today.render(messages)).toBe(String(new Date().getFullYear()));
    for (const directive of ['%Q', '%', '%-', '%Ed', '%:z']) {
      const error = refusal(() =>
        new ChatTemplate(`{{ strftime_now('${directive}') }}`, {}).render(messages),
      );
      expect(error).toMatchObject({
        code: 'INVALID_ARGUMENT',
        message: expect.stringContaining('directive'),
      });
    }
  });

  const loop = (count: number, body: string) => `{% for i in range(${count}) %}${body}{% endfor %}`;
  const doubled = (times: number) =>
    `{% set ns = namespace(s='x', l=[1]) %}${loop(times, '{% set ns.s = ns.s + ns.s %}')}`;
  test.each([
    ['a long range', '{% for i in range(1000000000) %}{% endfor %}'],
    ['nested loops', loop(100_000, loop(100_000, 'x'))],
    ['nested empty loops', loop(100_000, loop(100_000, ''))],
    ['nested loops that go on at once', loop(100_000, loop(100_000, '{% continue %}'))],
    ['nested loops that end at once', loop(100_000, loop(100, '{% break %}'))],
    ['a text that doubles', `${doubled(40)}{{ ns.s }}`],
    ['a list that doubles', `${doubled(1)}${loop(40, '{% set ns.l = ns.l + ns.l %}')}`],
    ['lists in lists', `${doubled(1)}${loop(40, '{% set ns.l = [ns.l, ns.l] %}')}{{ ns.l | tojson }}`],
    [
      'a list of nothing but depth',
      `${doubled(1)}${loop(50_000, '{% set ns.l = [ns.l] %}')}{{ ns.l | tojson }}`,
    ],
    ['a replacement', `${doubled(20)}{{ ns.s | replace('x', ns.s) | length }}`],
    ['an indentation', "{{ 'a\\nb' | indent(500000000) | length }}"],
    ['JSON with an indentation', '{{ [1] | tojson(indent=100000000) | length }}'],
    ['a join', `${doubled(19)}{{ range(100000) | join(ns.s) | length }}`],
    ['many copies', `${doubled(19)}${loop(100_000, '{% set ns.l = ns.l + [ns.s | upper] %}')}`],
    ['a macro that calls itself', '{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}'],
    [
      'a macro that calls itself twice',
      '{% macro f(n) %}{% if n > 0 %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}',
    ],
    ['white space without end', ' '.repeat(1_000_000)],
    ['brackets without end', `{{ ${'('.repeat(100_000)}1${')'.repeat(100_000)} }}`],
    ['a source without end', 'x'.repeat(2_000_000)],
  ])('ends with an error, soon and in little memory, for %s', (_, text) => {
    const before = process.memoryUsage().rss;
    const error = refusal(() => new ChatTemplate(text, {}).render(messages));
    expect(['UNSUPPORTED', 'INVALID_ARGUMENT']).toContain(error.code);
    expect(process.memoryUsage().rss - before).toBeLessThan(1 << 30);
  });

  test('writes a long conversation all the same', () => {
    const long = Array.from({ length: 400 }, (_, i) => ({
      role: i % 2 === 0 ? 'user' : 'assistant',
      content: 'word '.repeat(500),
    }));
    expect(template.render(long)).toHaveLength(
      3 + 200 * ('[user] \n'.length + '[assistant] \n'.length) + 400 * 2503,
    );
  });
});
