import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, expect } from '@jest/globals';
import type { Task } from '../../lib/tasks/index.js';
import type { CompletionRecord } from '../../lib/train/completions.js';
import { readMetrics } from '../../lib/train/metrics.js';
import { type GrpoMetrics, Trainer, type TrainerOptions } from '../../lib/train/trainer.js';
import { FakePolicy } from './fake-policy.js';
import type { FakeRow } from './fake-task.js';

export type FakeRunOptions = Partial<TrainerOptions<FakeRow>> & { task: Task<FakeRow> };

/** Runs of a fake policy in a folder that lasts as long as a test. */
export class FakeRuns {
  folder = '';

  constructor() {
    beforeEach(() => {
      this.folder = mkdtempSync(join(tmpdir(), 'merf-train-'));
    });
    afterEach(() => rmSync(this.folder, { recursive: true, force: true }));
  }

  trainer(policy: FakePolicy, { out = 'run', ...options }: FakeRunOptions): Trainer<FakeRow> {
    return new Trainer<FakeRow>({
      policy: policy.asPolicy,
      out: join(this.folder, out),
      steps: 6,
      promptsPerStep: 4,
      groupSize: 4,
      maxTokens: 6,
      learningRate: 0.5,
      ...options,
    });
  }

  metrics(run = 'run'): GrpoMetrics[] {
    return readMetrics(join(this.folder, run, 'metrics.jsonl')) as unknown as GrpoMetrics[];
  }

  records(step: number, run = 'run'): CompletionRecord[] {
    const name = `step-${String(step).padStart(6, '0')}.jsonl`;
    return readFileSync(join(this.folder, run, 'completions', name), 'utf8')
      .trim()
      .split('\n')
      .map((line) => JSON.parse(line) as CompletionRecord);
  }

  /** Runs six steps at once, and three and then three more, and expects the same of both to the last bit. */
  async expectExactResume(options: FakeRunOptions): Promise<void> {
    const unbroken = new FakePolicy();
    await this.trainer(unbroken, { ...options, out: 'unbroken' }).run();
    const first = this.trainer(new FakePolicy(), {
      ...options,
      out: 'broken',
      onEvent: (event) => {
        if (event.type === 'step' && event.step === 3) first.stop();
      },
    });
    expect(await first.run()).toMatchObject({ step: 3, stopped: true });
    const second = new FakePolicy();
    await this.trainer(second, { ...options, out: 'broken', resume: true }).run();
    expect(second.logits).toEqual(unbroken.logits);
    expect(withoutTimes(this.metrics('broken'))).toEqual(withoutTimes(this.metrics('unbroken')));
    for (let step = 1; step <= 6; step++) {
      expect(this.records(step, 'broken')).toEqual(this.records(step, 'unbroken'));
    }
  }
}

/** The records of each prompt of a step. */
export function byPrompt(records: readonly CompletionRecord[]): CompletionRecord[][] {
  const groups: CompletionRecord[][] = [];
  for (const record of records) {
    const group = groups[record.promptIndex] ?? [];
    groups[record.promptIndex] = group;
    group.push(record);
  }
  return groups;
}

function withoutTimes(rows: GrpoMetrics[]) {
  return rows.map((row) =>
    Object.fromEntries(Object.entries(row).filter(([key]) => !/[sS]econds?$/.test(key))),
  );
}
