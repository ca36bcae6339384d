import { cpSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { readSafetensorsHeader, safetensorsHeader } from '../../lib/policy/safetensors.js';

/** Makes `to` a copy of a Hugging Face model with its first layers alone. */
export async function cutModel(from: string, to: string, layers: number): Promise<string> {
  cpSync(from, to, { recursive: true });
  const configPath = join(to, 'config.json');
  const config = JSON.parse(readFileSync(configPath, 'utf8'));
  writeFileSync(configPath, JSON.stringify({ ...config, num_hidden_layers: layers }));

  const weightsPath = join(to, 'model.safetensors');
  const file = readFileSync(weightsPath);
  const isKept = (name: string) => Number(/^model\.layers\.(\d+)\./.exec(name)?.[1] ?? 0) < layers;
  const kept = [...(await readSafetensorsHeader(weightsPath))]
    .filter(([name]) => isKept(name))
    .map(([name, tensor]) => ({ name, ...tensor }));
  const data = kept.map(({ offset, byteLength }) => file.subarray(offset, offset + byteLength));
  writeFileSync(weightsPath, Buffer.concat([safetensorsHeader(kept, { format: 'pt' }).bytes, ...data]));
  return to;
}
