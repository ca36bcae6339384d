import { describe, expect, test } from '@jest/globals';
import { duration, evaluationLine, sparkline, stepLine, trainingView } from '../../lib/cli/terminal.js';

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
