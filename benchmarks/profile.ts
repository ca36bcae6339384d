// Measures where the time of a GRPO step goes, operator by operator.
import type { CompletionGroup, OperatorTime, Policy } from 'merf';
import { say } from './paths.js';
import { forestWith } from './step.js';
import { type Dtype, promptsOf, randomPolicy, type Workload } from './workloads.js';

export interface Phase {
  name: string;
  seconds: number;
  operators: OperatorTime[];
}

/**
 * Profiles one step after two to warm up, of which the first finds out how much memory a step takes and the
 * second touches it.
 */
export async function profileStep(workload: Workload, dtype: Dtype, threads: number): Promise<Phase[]> {
  say(`${workload.title}, ${dtype}: two steps to warm up, then the one that is shown`);
  const policy = await randomPolicy(workload, { dtype, threads, profile: true });
  try {
    await phasesOf(policy, workload, 1);
    await phasesOf(policy, workload, 2);
    return await phasesOf(policy, workload, 3);
  } finally {
    policy.dispose();
  }
}

async function phasesOf(policy: Policy, workload: Workload, seed: number): Promise<Phase[]> {
  const { group, completionTokens } = workload.sizes;
  const prompts = promptsOf(workload);
  const phases: Phase[] = [];
  policy.takeProfile();
  const timed = async <T>(name: string, run: () => Promise<T>): Promise<T> => {
    const start = performance.now();
    const result = await run();
    phases.push({ name, seconds: (performance.now() - start) / 1000, operators: policy.takeProfile() });
    return result;
  };
  const groups: CompletionGroup[] = await timed('rollout', () =>
    policy.sample(prompts, { n: group, maxTokens: completionTokens, seed }),
  );
  await timed('forward and backward', () => policy.forwardBackward(forestWith(groups), { type: 'grpo' }));
  await timed('update', () => policy.optimStep({ learningRate: 1e-6, maxGradNorm: 1 }));
  return phases;
}

/** A table of each phase: the operators' calls, seconds, rates and shares of the phase, their sum, and the rest. */
export function profileText(phases: readonly Phase[]): string {
  const whole = phases.reduce((sum, { seconds }) => sum + seconds, 0);
  const head = ['', 'calls', 'seconds', 'rate', 'share'];
  const blocks = phases.map(({ name, seconds, operators }) => {
    const share = (part: number) => `${((100 * part) / seconds).toFixed(1)}%`;
    const sum = operators.reduce((total, each) => total + each.seconds, 0);
    const sums = (part: 'calls' | 'operations') => operators.reduce((total, each) => total + each[part], 0);
    const total = { calls: sums('calls'), seconds: sum, operations: sums('operations'), bytes: 0 };
    return [
      [`${name}, ${seconds.toFixed(3)} s (${((100 * seconds) / whole).toFixed(1)}% of the step)`],
      head,
      ...operators.map((each) => [
        each.name,
        String(each.calls),
        each.seconds.toFixed(3),
        rateOf(each),
        share(each.seconds),
      ]),
      ['sum of operators', String(total.calls), sum.toFixed(3), rateOf(total), share(sum)],
      ['outside operators', '', (seconds - sum).toFixed(3), '', share(seconds - sum)],
    ];
  });
  const rows = blocks.flat().filter((cells) => cells.length > 1);
  const widths = head.map((_, column) => Math.max(...rows.map((cells) => cells[column]?.length ?? 0)));
  const line = (cells: readonly string[]) =>
    cells.length === 1
      ? (cells[0] as string)
      : cells
          .map((cell, i) => (i === 0 ? cell.padEnd(widths[i] as number) : cell.padStart(widths[i] as number)))
          .join('  ')
          .trimEnd();
  return `${blocks.map((block) => block.map(line).join('\n')).join('\n\n')}\n`;
}

function rateOf({
  seconds,
  operations,
  bytes,
}: Pick<OperatorTime, 'seconds' | 'operations' | 'bytes'>): string {
  if (seconds <= 0) return '';
  if (operations > 0) return `${(operations / seconds / 1e9).toFixed(1)} GFLOP/s`;
  return bytes > 0 ? `${(bytes / seconds / 1e9).toFixed(1)} GB/s` : '';
}
