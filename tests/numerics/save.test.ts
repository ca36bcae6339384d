import { execFileSync } from 'node:child_process';
import { mkdtempSync, readdirSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, describe, expect, test } from '@jest/globals';
import { Policy } from '../../lib/policy/index.js';
import { readSafetensorsHeader } from '../../lib/policy/safetensors.js';
import { largestGap } from '../support/compare.js';
import { fixturePath, readJson, readTensors } from '../support/fixtures.js';

const python = process.env.MERF_PYTHON;
const scratch = mkdtempSync(join(tmpdir(), 'merf-save-'));
afterAll(() => rmSync(scratch, { recursive: true }));

describe.each(['llama', 'qwen2'])('a saved %s', (name) => {
  const { tokens, text } = readJson<{ tokens: number[]; text: string }>(`${name}/expected.json`);
  const saved = join(scratch, name);

  test('has the tensors, the config and the tokenizer that it was loaded with, and loads again', async () => {
    const policy = await Policy.load(fixturePath(name), { dtype: 'f32' });
    await policy.save(saved);
    const logits = await policy.logits(tokens);
    policy.dispose();

    const original = readTensors(join(fixturePath(name), 'model.safetensors'));
    const written = readdirSync(saved)
      .filter((file) => file.endsWith('.safetensors'))
      .flatMap((file) => [...readTensors(join(saved, file))]);
    expect(new Map(written.map(([key, { shape, data }]) => [key, { shape, data }]))).toEqual(
      new Map([...original].map(([key, { shape, data }]) => [key, { shape, data }])),
    );

    const again = await Policy.load(saved, { dtype: 'f32' });
    expect(await again.logits(tokens)).toEqual(logits);
    expect(again.tokenizer.encode(text)).toEqual(tokens);
    again.dispose();
  });

  test('computes the same logits again where norms and biases went beyond bfloat16', async () => {
    const policy = await Policy.load(fixturePath(name), { dtype: 'bf16' });
    for (let step = 0; step < 3; ++step) {
      await policy.forwardBackward([{ tokens, train: {} }], { type: 'cross_entropy' });
      await policy.optimStep({ learningRate: 1e-3 });
    }
    const trained = join(scratch, `${name}-bf16`);
    await policy.save(trained);
    const logits = await policy.logits(tokens);
    const norms = await policy.readParameter('model.norm.weight');
    policy.dispose();
    const header = await readSafetensorsHeader(join(trained, 'model.safetensors'));
    const types = new Set([...header.values()].map(({ dtype, shape }) => `${dtype} of rank ${shape.length}`));
    expect([...types].sort()).toEqual(['BF16 of rank 2', 'F32 of rank 1']);
    const again = await Policy.load(trained, { dtype: 'bf16' });
    expect(await again.readParameter('model.norm.weight')).toEqual(norms);
    expect(await again.logits(tokens)).toEqual(logits);
    again.dispose();
  });

  test('has norms in bfloat16 where that has all their bits', async () => {
    const policy = await Policy.load(fixturePath(name), { dtype: 'bf16' });
    const rounded = join(scratch, `${name}-rounded`);
    const exact = join(scratch, `${name}-exact`);
    await policy.save(rounded, { dtype: 'bf16' });
    policy.dispose();
    // The fixture's norms are not those of bfloat16; ones are.
    const created = await Policy.create(policy.config, policy.tokenizer.files, { dtype: 'bf16' });
    await created.save(exact);
    created.dispose();
    const typesOf = async (folder: string) => {
      const header = await readSafetensorsHeader(join(folder, 'model.safetensors'));
      return header.get('model.norm.weight')?.dtype;
    };
    expect([await typesOf(rounded), await typesOf(exact)]).toEqual(['F32', 'BF16']);
  });

  (python ? test : test.skip)(
    'is read by transformers with the same logits [needs python]',
    async () => {
      const policy = await Policy.load(fixturePath(name), { dtype: 'f32' });
      await policy.forwardBackward([{ tokens, train: {} }], { type: 'cross_entropy' });
      await policy.optimStep({ learningRate: 1e-2 });
      const trained = join(scratch, `${name}-trained`);
      await policy.save(trained);
      const logits = await policy.logits(tokens);
      policy.dispose();
      const script = fixturePath('read_back.py');
      const printed = execFileSync(python as string, [script, trained, JSON.stringify(tokens)], {
        encoding: 'utf8',
      });
      const read = JSON.parse(printed) as { text: string; logits: number[][] };
      expect(read.text).toBe(text);
      expect(largestGap(logits, read.logits.flat())).toBeLessThan(1e-5);
    },
    120_000,
  );
});
