import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, describe, expect, test } from '@jest/globals';
import { placeOf } from '../../lib/tasks/dataset.js';
import { examplesOf, holdsExample, readExamples } from '../../lib/train/examples.js';
import { fixturePath } from '../support/fixtures.js';

const folder = mkdtempSync(join(tmpdir(), 'merf-examples-'));
afterAll(() => rmSync(folder, { recursive: true }));

const system = { role: 'system', content: 'Be brief.' };
const user = { role: 'user', content: '1 + 1?' };
const assistant = { role: 'assistant', content: '2' };

describe('the formats of TRL', () => {
  test('prompt and completion as text', () => {
    expect(examplesOf({ prompt: '1 + 1 =', completion: ' 2', id: 7 })).toEqual([
      { prompt: '1 + 1 =', completion: ' 2' },
    ]);
  });

  test('prompt and completion as messages', () => {
    const expected = [{ messages: [system, user], completion: '2' }];
    expect(examplesOf({ prompt: [system, user], completion: [assistant] })).toEqual(expected);
    expect(examplesOf({ prompt: [system, user], completion: [assistant], messages: null })).toEqual(expected);
    expect(examplesOf({ messages: [system, user], completion: '2' })).toEqual(expected);
  });

  test('messages, in which every reply is learned after what stands before it', () => {
    const more = { role: 'user', content: 'And 2 + 2?' };
    const messages = [system, user, assistant, more, { role: 'assistant', content: '4' }, more];
    expect(examplesOf({ messages })).toEqual([
      { messages: [system, user], completion: '2' },
      { messages: [system, user, assistant, more], completion: '4' },
    ]);
    const first = { ...assistant, weight: 0 };
    expect(examplesOf({ messages: messages.with(2, first) })).toEqual([
      { messages: [system, user, first, more], completion: '4' },
    ]);
    const prompt = [user, assistant, more];
    expect(examplesOf({ prompt, completion: [{ role: 'assistant', content: '4' }] })).toEqual([
      { messages: prompt, completion: '4' },
    ]);
  });

  test('conversations of from and value, nulls of a table, parts of text', () => {
    const conversations = [
      { from: 'human', value: '1 + 1?' },
      { from: 'gpt', value: '2' },
    ];
    expect(examplesOf({ conversations })).toEqual([{ messages: [user], completion: '2' }]);
    const table = [
      { ...user, tool_calls: null, name: null },
      { ...assistant, tool_calls: null, name: null },
    ];
    expect(examplesOf({ messages: table, tools: null, images: [] })).toEqual([
      { messages: [user], completion: '2' },
    ]);
    const parts = [
      { type: 'text', text: '1 + ' },
      { type: 'text', text: '1?' },
    ];
    expect(examplesOf({ messages: [{ role: 'user', content: parts }, assistant] })).toEqual([
      { messages: [user], completion: '2' },
    ]);
  });

  test.each<[string, Record<string, unknown>, RegExp]>([
    ['neither', { text: 'a', label: 1 }, /"prompt" and a "completion".*values are text, label$/],
    ['nothing', { prompt: null }, /values are none$/],
    ['no completion', { prompt: 'x' }, /values are prompt$/],
    ['an empty completion', { prompt: 'x', completion: '' }, /Expected text for completion but found ""/],
    [
      'bytes',
      { prompt: new Uint8Array(3), completion: 'x' },
      /text for prompt but found Uint8Array of length 3/,
    ],
    [
      'a text before messages',
      { prompt: 'x', completion: [assistant] },
      /text for completion but found array/,
    ],
    ['no reply', { messages: [user] }, /a message of the assistant in messages but found none/],
    [
      'a reply to nothing',
      { messages: [assistant] },
      /message before the first of the assistant in messages/,
    ],
    ['no role', { messages: [{ content: 'x' }] }, /message 1 is object of type Object without a role/],
    ['a picture', { messages: [{ role: 'user', content: [{ type: 'image' }] }, assistant] }, /type "image"/],
    ['tools', { messages: [user, assistant], tools: [{}] }, /Expected no tools/],
    [
      'a call',
      { messages: [user, { ...assistant, content: null, tool_calls: [{}] }] },
      /message 2 has tool_calls/,
    ],
    [
      'no text',
      { messages: [user, { role: 'assistant', content: null }] },
      /a reply in messages but found null/,
    ],
  ])('%s is refused', (_, fields, message) => {
    expect(() => examplesOf(fields)).toThrow(message);
  });
});

describe('readExamples', () => {
  test('skips blank lines, knows the place of every example and names the line that does not fit', async () => {
    const file = join(folder, 'some.JSONL');
    const lines = [
      '',
      JSON.stringify({ messages: [user, assistant, user, assistant] }),
      '{"prompt":"a","completion":"b"}',
    ];
    writeFileSync(file, lines.join('\n'));
    const examples = await readExamples(file);
    expect(examples.map(placeOf)).toEqual([2, 2, 3].map((line) => `${file}, line ${line}`));
    writeFileSync(file, [...lines, '{"prompt":"a"}'].join('\n'));
    await expect(readExamples(file)).rejects.toMatchObject({
      code: 'MALFORMED_FILE',
      message: expect.stringContaining(`${file}, line 4: Expected a "prompt"`),
    });
  });

  test('reads Parquet', async () => {
    await expect(readExamples(fixturePath('parquet/zstd.parquet'))).rejects.toMatchObject({
      code: 'MALFORMED_FILE',
      message: expect.stringContaining(
        'zstd.parquet, row 1: Expected a message of the assistant in messages',
      ),
    });
    const examples = await readExamples(fixturePath('parquet/chats.parquet'));
    expect(examples).toEqual([
      { messages: [user], completion: '2' },
      { messages: [system, user], completion: '2' },
    ]);
  });
});

test('a row of examples has a completion or a reply', () => {
  expect(holdsExample({ completion: 'x' })).toBe(true);
  expect(holdsExample({ messages: [user, assistant] })).toBe(true);
  expect(holdsExample({ messages: [user], completion: null })).toBe(false);
  expect(holdsExample({ question: 'x' })).toBe(false);
});
