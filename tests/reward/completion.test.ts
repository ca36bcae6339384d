import { expect, test } from '@jest/globals';
import { parseCompletion } from '../../lib/reward/completion.js';

test('finds the thinking and the answer', () => {
  const raw = 'Well. <think> a\nb </think>\n<answer>\n 42 \n</answer> done';
  expect(parseCompletion({ raw, finishReason: 'stop', tokenCount: 9 })).toEqual({
    raw,
    text: raw,
    thinking: 'a\nb',
    answer: '42',
    finishReason: 'stop',
    tokenCount: 9,
    turns: [{ role: 'model', text: raw }],
  });
});

test('a <think> that ends the prompt belongs to the response', () => {
  for (const prompt of ['<|im_start|>assistant\n<think>', 'Assistant: <think>\n']) {
    const completion = parseCompletion({ raw: 'so</think><answer>1</answer>', prompt });
    expect(completion.text).toBe('<think>so</think><answer>1</answer>');
    expect(completion.raw).toBe('so</think><answer>1</answer>');
    expect(completion.thinking).toBe('so');
  }
  const mentioned = parseCompletion({ raw: 'so</think>', prompt: 'Use <think> tags.\nassistant\n' });
  expect(mentioned.text).toBe('so</think>');
  expect(mentioned.thinking).toBeUndefined();
});

test('leaves out what is not there', () => {
  expect(parseCompletion({ raw: 'hello' })).toEqual({
    raw: 'hello',
    text: 'hello',
    finishReason: 'stop',
    tokenCount: 0,
    turns: [{ role: 'model', text: 'hello' }],
  });
  expect(parseCompletion({ raw: '<think>cut off' }).thinking).toBe('cut off');
  expect(parseCompletion({ raw: '<answer>cut off' }).answer).toBeUndefined();
  expect(parseCompletion({ raw: '<answer></answer>' }).answer).toBe('');
});

test('the last complete answer counts', () => {
  expect(parseCompletion({ raw: '<answer>1</answer><answer>2</answer><answer>3' }).answer).toBe('2');
  expect(parseCompletion({ raw: '<answer><answer>1</answer>' }).answer).toBe('<answer>1');
  expect(parseCompletion({ raw: '</answer><answer>1</answer></answer>' }).answer).toBe('1');
});
