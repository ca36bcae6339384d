import { readFileSync } from 'node:fs';
import { ChatTemplate } from '../../../lib/prompt/chat-template.js';
import { tokenizerFiles } from '../../policy/tiny-model.js';
import type { Draw } from '../draw.js';
import { hostileText, mutatedJsonText, mutateText } from '../mutate.js';
import { type Target, textOf } from '../target.js';

const seeds = [
  tokenizerFiles().chatTemplate,
  readFileSync(new URL('../../../models/merf-mini/chat_template.jinja', import.meta.url), 'utf8'),
  `{%- if tools %}{{- '# Tools' }}{%- for tool in tools %}{{- tool | tojson }}{%- endfor %}{%- endif %}
{%- set ns = namespace(last=messages|length - 1, found=false) %}
{%- for message in messages[::-1] %}{%- if not ns.found and message.role == "user" and not(message.content.startswith('<tool>')) %}
{%- set ns.found = true %}{%- endif %}{%- endfor %}
{%- for message in messages %}{%- if '</think>' in message.content %}
{%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}{%- else %}{%- set content = message.content | trim %}
{%- endif %}{{- '<|im_start|>' ~ message.role + '\\n' ~ content ~ '<|im_end|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}`,
  `{% macro line(m, n=2) %}{{ m['role'] | upper }}: {{ m['content'] | replace('a', 'b') | indent(n) }}
{% endmacro %}{% for m in messages if m.role != 'tool' %}{{ loop.index0 }}/{{ loop.length }} {{ line(m) }}
{% if loop.index % 2 == 0 %}{% continue %}{% else %}{% break %}{% endif %}{% endfor %}{{ strftime_now('%d %b %Y') }}`,
];

const names = [
  'messages',
  'message',
  'm',
  'x',
  'ns',
  'loop',
  'add_generation_prompt',
  'bos_token',
  'tools',
  'caller',
  'self',
];
const filters = [
  'trim',
  'upper',
  'lower',
  'title',
  'capitalize',
  'length',
  'list',
  'first',
  'last',
  'reverse',
  'sort',
  'unique',
  'join',
  "join(', ')",
  'tojson',
  'tojson(indent=2)',
  'tojson(indent=999999999)',
  'indent(4)',
  'indent(1e9)',
  'int',
  'float',
  'abs',
  'string',
  'items',
  'dictsort',
  'safe',
  "map(attribute='role')",
  "map('upper')",
  "selectattr('role', 'equalto', 'user')",
  "rejectattr('content')",
  "replace('', 'aaaaaaaaaa')",
  "replace('a', x)",
  'default(1)',
  'batch(3)',
  'sum',
  'groupby',
  'e',
  'count',
  'max',
  'random',
];
const methods = [
  'strip()',
  "split('')",
  "split(' ', 1)",
  'upper()',
  'title()',
  "replace('a', 'aaaaaaaa')",
  'join(messages)',
  'items()',
  'keys()',
  'values()',
  "get('role')",
  "get('__proto__')",
  "startswith('a')",
  "endswith(['a'])",
  "lstrip('a')",
  'rstrip(None)',
  'splitlines()',
  'constructor',
  '__class__',
  'format(1)',
  'append(x)',
  'update({})',
  'pop()',
  'length',
];

function expression(draw: Draw, depth: number): string {
  const inner = () => expression(draw, depth - 1);
  if (depth <= 0) {
    return draw.pick<() => string>([
      () => draw.pick(names),
      () => draw.pick(['0', '1', '-1', '2.5', '9007199254740993', '1e9', '999999999999999999999']),
      () =>
        draw.pick([
          "''",
          "'a'",
          "'role'",
          "'é\\n'",
          `'${'ab'.repeat(50)}'`,
          'true',
          'none',
          '[]',
          '{}',
          '[1, 2]',
        ]),
    ])();
  }
  return draw.pick<() => string>([
    () => draw.pick(names),
    () => `${inner()} | ${draw.pick(filters)}`,
    () => `${inner()} | ${draw.pick(filters)}`,
    () => `(${inner()}).${draw.pick(methods)}`,
    () =>
      `${inner()} ${draw.pick(['+', '-', '*', '/', '//', '%', '**', '~', '==', '<', 'in', 'not in', 'and', 'or'])} ${inner()}`,
    () => `${inner()}[${inner()}]`,
    () => `${inner()}[${inner()}:${inner()}:${inner()}]`,
    () =>
      `${inner()} is ${draw.pick(['defined', 'string', 'mapping', 'iterable', 'none', 'sequence', 'odd', 'divisibleby', 'wat'])}`,
    () => `range(${inner()}, ${draw.pick(['3', '100', '99999', '1000000000', '-5'])})`,
    () => `namespace(a=${inner()})`,
    () => `strftime_now(${draw.pick(["'%d %b %Y'", "'%'", "'%Q'", inner(), `'${'%c'.repeat(99)}'`])})`,
    () => `(${inner()} if ${inner()} else ${inner()})`,
    () => `[${inner()}, ${inner()}]`,
    () => `{'a': ${inner()}, ${inner()}: 1}`,
    () => `raise_exception(${inner()})`,
    () => `f(${inner()}, x=${inner()})`,
    () => `not ${inner()}`,
  ])();
}

function program(draw: Draw, depth: number): string {
  const minus = () => (draw.chance(0.3) ? '-' : '');
  const tag = (text: string) => `{%${minus()} ${text} ${minus()}%}`;
  const value = () => expression(draw, draw.below(4));
  const body = () => (depth <= 0 ? 'text ' : program(draw, depth - 1));
  const statement = () =>
    draw.pick<() => string>([
      () => `{{${minus()} ${value()} ${minus()}}}`,
      () => `{{ ${value()} }}`,
      () => draw.pick(['text', '\n', '  \r\n', '{# note #}', hostileText(draw).slice(0, 3000)]),
      () =>
        `${tag(`for ${draw.pick(['m', 'x', 'm, x', 'messages'])} in ${value()}`)}${body()}${tag('endfor')}`,
      () => `${tag('for x in range(99999)')}${body()}${tag('endfor')}`,
      () => `${tag('for m in messages')}${body()}${tag('else')}${body()}${tag('endfor')}`,
      () =>
        `${tag(`if ${value()}`)}${body()}${tag(`elif ${value()}`)}${body()}${tag('else')}${body()}${tag('endif')}`,
      () => tag(`set ${draw.pick(['x', 'ns.a', 'x, m', 'messages'])} = ${value()}`),
      () => `${tag('set x')}${body()}${tag('endset')}`,
      () => `${tag('set x = x + x')}`,
      () =>
        `${tag('set ns = namespace(a=[])')}${tag('set ns.a = ns.a + [ns]')}{{ ns | tojson }}{{ ns.a | string }}`,
      () => `${tag(`macro f(a, x=${value()})`)}${body()}${tag('endmacro')}`,
      () => `${tag('macro f(a)')}{{ f(a) }}${tag('endmacro')}{{ f(1) }}`,
      () => `${tag(`call f(${value()})`)}${body()}${tag('endcall')}`,
      () => `${tag(`filter ${draw.pick(filters)}`)}${body()}${tag('endfilter')}`,
      () => `${tag('generation')}${body()}${tag('endgeneration')}`,
      () => tag(draw.pick(['break', 'continue', 'endif', 'endfor', 'wat'])),
    ])();
  return Array.from({ length: 1 + draw.below(4) }, statement).join('');
}

const conversation = {
  messages: [
    { role: 'system', content: 'Be kind.' },
    { role: 'user', content: 'What is 2 + 2?' },
    {
      role: 'assistant',
      content: '<think>\n2 + 2\n</think>\n4',
      tool_calls: [{ function: { name: 'f', arguments: { a: 1 } } }],
    },
    { role: 'user', content: 'Thanks, café!' },
  ],
  tools: [{ type: 'function', function: { name: 'f', parameters: { type: 'object', properties: {} } } }],
};

const template: Target = {
  name: 'template',
  make: (draw) => ({
    'template.jinja': draw.chance(0.5)
      ? program(draw, 3)
      : draw.chance(0.5)
        ? mutateText(draw, program(draw, 2))
        : mutateText(draw, draw.pick(seeds)),
    'conversation.json': draw.chance(0.2)
      ? mutatedJsonText(draw, conversation)
      : JSON.stringify(conversation),
  }),
  run(input) {
    let given: Partial<typeof conversation>;
    try {
      given = JSON.parse(textOf(input, 'conversation.json')) as Partial<typeof conversation>;
    } catch {
      given = conversation;
    }
    const { messages, ...variables } = given ?? {};
    const read = new ChatTemplate(textOf(input, 'template.jinja'), { bos_token: '<s>', eos_token: '</s>' });
    return read.render(messages as never, { addGenerationPrompt: true, variables }).length;
  },
};

export const templateTargets: readonly Target[] = [template];
