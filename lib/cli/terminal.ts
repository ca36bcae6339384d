import { withControlsShown } from '../control-characters.js';
import type { Evaluation } from '../evaluate/index.js';
import type { TrainingEvent } from '../train/loop.js';
import type { MetricsRow } from '../train/metrics.js';

const blocks = '▁▂▃▄▅▆▇█';

/** The last `width` values as bars, each the mean of a stretch where there are more. */
export function sparkline(values: readonly number[], width: number): string {
  const finite = values.filter((value) => Number.isFinite(value));
  if (finite.length === 0) return '';
  const count = Math.min(width, finite.length);
  const means = Array.from({ length: count }, (_, i) => {
    const from = Math.floor((i * finite.length) / count);
    const to = Math.max(from + 1, Math.floor(((i + 1) * finite.length) / count));
    const stretch = finite.slice(from, to);
    return stretch.reduce((sum, value) => sum + value, 0) / stretch.length;
  });
  const low = Math.min(...means);
  const span = Math.max(...means) - low;
  return means.map((value) => blocks[span === 0 ? 0 : Math.round(((value - low) / span) * 7)]).join('');
}

export function duration(seconds: number): string {
  if (!Number.isFinite(seconds)) return '-';
  const s = Math.max(0, Math.round(seconds));
  if (s < 60) return `${s}s`;
  if (s < 3600) return `${Math.floor(s / 60)}m${String(s % 60).padStart(2, '0')}s`;
  return `${Math.floor(s / 3600)}h${String(Math.floor((s % 3600) / 60)).padStart(2, '0')}m`;
}

/** A step in one line. */
export function stepLine(metrics: MetricsRow, steps: number): string {
  const width = String(steps).length;
  const parts = [`step ${String(metrics.step).padStart(width)}/${steps}`];
  const add = (name: string, value: unknown, digits: number) => {
    if (typeof value === 'number') parts.push(`${name} ${value.toFixed(digits)}`);
  };
  add('reward', metrics.reward, 3);
  if (typeof metrics.correct === 'number') parts.push(`correct ${percent(metrics.correct)}`);
  if ('reward' in metrics) {
    add('length', metrics.length, 1);
    add('entropy', metrics.entropy, 3);
    if (typeof metrics.kl === 'number' && metrics.kl !== 0) add('kl', metrics.kl, 4);
  } else add('loss', metrics.loss, 4);
  add('grad', metrics.gradientNorm, 3);
  if (typeof metrics.rolloutTokensPerSecond === 'number') {
    parts.push(`rollout ${rate(metrics.rolloutTokensPerSecond)}`);
  }
  if (typeof metrics.trainingTokensPerSecond === 'number') {
    parts.push(`training ${rate(metrics.trainingTokensPerSecond)}`);
  }
  if (typeof metrics.seconds === 'number') parts.push(`${metrics.seconds.toFixed(1)}s`);
  return parts.join('  ');
}

export function evaluationLine(evaluation: Evaluation): string {
  const passes = Object.entries(evaluation.passAt)
    .filter(([k]) => k !== '1')
    .map(([k, share]) => `pass@${k} ${percent(share)}`);
  return [
    `motivation ${evaluation.motivation}:`,
    `accuracy ${percent(evaluation.accuracy)} ± ${percent(evaluation.accuracyError)}`,
    `rows ${evaluation.rows}, ${evaluation.clusters} distinct`,
    ...passes,
    `reward ${evaluation.reward.toFixed(3)}`,
    `length ${evaluation.length.toFixed(1)}`,
  ].join('  ');
}

export function percent(share: number): string {
  return `${(100 * share).toFixed(1)}%`;
}

function rate(tokensPerSecond: number): string {
  return `${Math.round(tokensPerSecond)} tok/s`;
}

export interface View {
  event(event: TrainingEvent): void;
  close(): void;
}

type Output = Pick<NodeJS.WriteStream, 'write' | 'columns' | 'isTTY'>;

/** One line a step; on a terminal, also a line at the bottom that shows what is going on. */
export function trainingView(output: Output = process.stdout): View {
  const live = output.isTTY === true;
  const curve: number[] = [];
  const seconds: number[] = [];
  let status = '';
  let timer: NodeJS.Timeout | undefined;
  let phase = '';
  let phaseStarted = 0;
  let step = 0;
  let steps = 0;

  const clear = () => {
    if (live && status !== '') output.write('\r\x1b[2K');
    status = '';
  };
  const draw = () => {
    if (!live || steps === 0) return;
    const width = (output.columns ?? 80) - 1;
    const share = step / steps;
    const bar = 16;
    const filled = Math.round(share * bar);
    const mean =
      seconds.slice(-20).reduce((sum, s) => sum + s, 0) / Math.max(1, Math.min(20, seconds.length));
    const left = seconds.length > 0 ? `  ${duration(mean * (steps - step))} left` : '';
    const spark = sparkline(curve, 24);
    const text =
      `[${'#'.repeat(filled)}${'.'.repeat(bar - filled)}] ${step}/${steps}` +
      `${spark && `  ${spark}`}  ${phase} ${duration((performance.now() - phaseStarted) / 1000)}${left}`;
    clear();
    status = text.slice(0, width);
    output.write(status);
  };
  const print = (line: string) => {
    clear();
    output.write(`${withControlsShown(line)}\n`);
    draw();
  };
  if (live) timer = setInterval(draw, 500).unref();

  return {
    event(event) {
      switch (event.type) {
        case 'start':
          step = event.step;
          steps = event.steps;
          if (event.resumedFrom) print(`Resuming after step ${event.step} from ${event.resumedFrom}`);
          break;
        case 'phase':
          phase = event.phase;
          phaseStarted = performance.now();
          draw();
          break;
        case 'step': {
          step = event.step;
          const { reward, loss, seconds: took } = event.metrics;
          const value = reward ?? loss;
          if (typeof value === 'number') curve.push(value);
          if (typeof took === 'number') seconds.push(took);
          print(stepLine(event.metrics, event.steps));
          break;
        }
        case 'evaluation':
          for (const evaluation of Object.values(event.results)) print(`  ${evaluationLine(evaluation)}`);
          break;
        case 'notice':
          print(event.message);
          break;
        case 'checkpoint':
          break;
      }
    },
    close() {
      clearInterval(timer);
      clear();
    },
  };
}
