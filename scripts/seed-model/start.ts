import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import type { ModelConfig, TokenizerFiles } from '../../lib/policy/index.js';
import { Policy } from '../../lib/policy/index.js';

/**
 * Standard deviations to begin with. Tokens begin large and what layers add small, so that which token stands where
 * reaches the upper layers: where both begin alike, looking things up takes a small model ten times as long to learn.
 */
const deviations: readonly { readonly of: RegExp; readonly deviation: number }[] = [
  { of: /embed_tokens/, deviation: 0.3 },
  { of: /lm_head/, deviation: 0.02 },
  { of: /(o_proj|down_proj)/, deviation: 0.006 },
  { of: /(q|k|v|gate|up)_proj/, deviation: 0.088 },
];

/** A trainable policy in float32 whose weights are drawn with these deviations. */
export async function startingPolicy(
  config: ModelConfig,
  files: TokenizerFiles,
  options: { readonly seed: number; readonly threads: number },
): Promise<Policy> {
  const folder = mkdtempSync(join(tmpdir(), 'merf-seed-'));
  try {
    const even = await Policy.create(config, files, { ...options, standardDeviation: 1, dtype: 'f32' });
    await even.save(folder, { dtype: 'f32' });
    even.dispose();
    const path = join(folder, 'model.safetensors');
    const bytes = readFileSync(path);
    const headerBytes = Number(bytes.readBigUInt64LE(0));
    const header = JSON.parse(bytes.toString('utf8', 8, 8 + headerBytes)) as Record<
      string,
      { data_offsets?: [number, number] }
    >;
    for (const [name, { data_offsets: offsets }] of Object.entries(header)) {
      const deviation = deviations.find(({ of }) => of.test(name))?.deviation;
      if (deviation === undefined || offsets === undefined) continue;
      for (let at = 8 + headerBytes + offsets[0]; at < 8 + headerBytes + offsets[1]; at += 4) {
        bytes.writeFloatLE(deviation * bytes.readFloatLE(at), at);
      }
    }
    writeFileSync(path, bytes);
    return await Policy.load(folder, { dtype: 'f32', threads: options.threads });
  } finally {
    rmSync(folder, { recursive: true, force: true });
  }
}
