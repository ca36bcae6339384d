import { describe, expect, test } from '@jest/globals';
import { duration, evaluationLine, sparkline, stepLine, trainingView } from '../../lib/cli/terminal.js';
import { jsonWithControlsShown, withControlsShown } from '../../lib/control-characters.js';
import { describeValue, MerfError } from '../../lib/errors.js';

const metrics = {
  step: 3,
  reward: -0.5,
  correct: 0.25,
  length: 40,
  entropy: 1.5,
  gradientNorm: 0.125,
  seconds: 2,
};

describe('sparkline', () => {
  test('spans from the least to the greatest', () => {
    expect(sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8)).toBe('▁▂▃▄▅▆▇█');
    expect(sparkline([5, 5], 8)).toBe('▁▁');
    expect(sparkline([], 8)).toBe('');
  });

  test('averages where there are more values than columns', () => {
    expect(sparkline([0, 0, 0, 0, 9, 9, 9, 9], 2)).toBe('▁█');
    expect(
      sparkline(
        Array.from({ length: 1000 }, (_, i) => i),
        24,
      ),
    ).toHaveLength(24);
  });
});

test('duration', () => {
  expect([4, 65, 3599, 7260].map(duration)).toEqual(['4s', '1m05s', '59m59s', '2h01m']);
});

test('stepLine shows what there is', () => {
  const line = stepLine(metrics, 20);
  expect(line).toMatch(/^step {2}3\/20 {2}reward -0\.500 {2}correct 25\.0% {2}length 40\.0/);
  expect(line).not.toContain('loss');
  expect(stepLine({ step: 1, loss: 2, seconds: 1 }, 5)).toMatch(/^step 1\/5 {2}loss 2\.0000 {2}1\.0s$/);
});

test('evaluationLine shows how many distinct rows the standard error is over', () => {
  const line = evaluationLine({
    motivation: 'none',
    rows: 256,
    clusters: 135,
    samples: 2,
    accuracy: 0.1875,
    accuracyError: 0.0231,
    reward: -0.5,
    parts: {},
    cases: {},
    passAt: { 1: 0.1875, 2: 0.25 },
    length: 40,
    truncated: 0,
    entropy: 0.2,
    seconds: 1,
  });
  expect(line).toBe(
    'motivation none:  accuracy 18.8% ± 2.3%  rows 256, 135 distinct  pass@2 25.0%  reward -0.500  length 40.0',
  );
});

describe('trainingView', () => {
  function record(isTTY: boolean) {
    let text = '';
    const view = trainingView({
      isTTY,
      columns: 60,
      write: (piece: string | Uint8Array) => {
        text += piece;
        return true;
      },
    });
    view.event({ type: 'start', step: 0, steps: 4 });
    view.event({ type: 'phase', phase: 'rollout', step: 1 });
    view.event({ type: 'step', step: 1, steps: 4, metrics: { ...metrics, step: 1 } });
    view.event({ type: 'notice', message: 'Something was skipped' });
    view.event({ type: 'step', step: 2, steps: 4, metrics: { ...metrics, step: 2, reward: 1 } });
    view.close();
    return text;
  }

  test('writes plain lines where nobody watches', () => {
    const text = record(false);
    expect(text).not.toContain('\x1b');
    expect(
      text
        .trimEnd()
        .split('\n')
        .map((line) => line.slice(0, 9)),
    ).toEqual(['step 1/4 ', 'Something', 'step 2/4 ']);
  });

  test('keeps a line of progress below them on a terminal', () => {
    const text = record(true);
    expect(text).toContain('[########........] 2/4  ▁█');
    expect(text).toContain('4s left');
    // What is left on the screen ends with the last step's line.
    expect(text.endsWith('\r\x1b[2K')).toBe(true);
    for (const piece of text.split(/\r|\n/)) expect(piece.replaceAll('\x1b[2K', '').length).toBeLessThan(140);
  });
});

describe('control characters', () => {
  const clipboard = '\x1b]52;c;Y3VybCBldmlsfHNo\x07';

  test('are written out, all that a terminal obeys and nothing else', () => {
    expect(withControlsShown(clipboard)).toBe('\\x1b]52;c;Y3VybCBldmlsfHNo\\x07');
    expect(withControlsShown('\x1b[2J\x1b[H\r\b\x7f\x9b2J\0')).toBe(
      '\\x1b[2J\\x1b[H\\x0d\\x08\\x7f\\x9b2J\\x00',
    );
    expect(withControlsShown('a\u202eb\u2066c\u2028d')).toBe('a\\u202eb\\u2066c\\u2028d');
    const kept = 'tab\tline\nä 漢字 👩‍🔬 \u00a0 \\x1b';
    expect(withControlsShown(kept)).toBe(kept);
    for (let code = 0; code < 0x100; code++) {
      const shown = withControlsShown(String.fromCharCode(code));
      const isControl = (code < 0x20 && code !== 9 && code !== 10) || (code >= 0x7f && code < 0xa0);
      expect(shown.length > 1).toBe(isControl);
    }
  });

  test('of JSON stay what they are for a program', () => {
    const value = { text: `${clipboard}\x9b2J\u202e` };
    const text = jsonWithControlsShown(JSON.stringify(value));
    expect(withControlsShown(text)).toBe(text);
    expect(JSON.parse(text)).toEqual(value);
  });

  test('of errors are written out whoever prints them, and the error is one of any copy of the library', () => {
    const error = new MerfError('FILE_NOT_FOUND', `No model at ${clipboard}`);
    expect(error.message).toBe(`No model at ${withControlsShown(clipboard)}`);
    expect({ name: 'MerfError', code: 'BUSY' }).toBeInstanceOf(MerfError);
    expect(new Error('x')).not.toBeInstanceOf(MerfError);
    expect(null).not.toBeInstanceOf(MerfError);
    expect(describeValue(clipboard)).not.toContain('\x1b');
  });

  test('of notices and paths do not reach the terminal', () => {
    let text = '';
    const view = trainingView({
      isTTY: false,
      columns: 60,
      write: (piece: string | Uint8Array) => {
        text += piece;
        return true;
      },
    });
    view.event({ type: 'start', step: 2, steps: 4, resumedFrom: clipboard });
    view.event({ type: 'notice', message: `About ${clipboard}` });
    view.close();
    expect(text.split('\n')).toHaveLength(3);
    expect(text).not.toContain('\x1b');
  });
});
