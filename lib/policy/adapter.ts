import { join } from 'node:path';
import { writeFolderAtomically } from '../atomic-files.js';
import type { NativeModel } from '../native.js';
import type { ModelConfig } from './config.js';
import { type TensorToWrite, writeJson, writeSafetensors } from './save.js';

/** The modules, as Hugging Face names them, that each product stands for, with their rows. */
function modulesOf(product: string, config: ModelConfig): [name: string, rows: number][] {
  const { heads, kvHeads, headSize, hiddenSize, mlpSize } = config;
  switch (product) {
    case 'qkv_proj':
      return [
        ['q_proj', heads * headSize],
        ['k_proj', kvHeads * headSize],
        ['v_proj', kvHeads * headSize],
      ];
    case 'gate_up_proj':
      return [
        ['gate_proj', mlpSize],
        ['up_proj', mlpSize],
      ];
    default:
      return [[product, hiddenSize]];
  }
}

const adapterName = /^(.*\.)([a-z_]+)\.lora_([AB])\.weight$/;

/**
 * A directory that PEFT reads. PEFT has an A for each module; the modules of one product get the same one, and each its
 * rows of B.
 */
export async function saveAdapter(
  directory: string,
  {
    model,
    config,
    base,
    rank,
  }: { model: NativeModel; config: ModelConfig; base: string | undefined; rank: number },
  signal?: AbortSignal,
): Promise<void> {
  const tensors: TensorToWrite[] = [];
  const targets = new Set<string>();
  for (const { name, shape } of model.parameters()) {
    const [, parent, product, which] = adapterName.exec(name) ?? [];
    if (parent === undefined || product === undefined) continue;
    const columns = shape[1] as number;
    let first = 0;
    for (const [module, rows] of modulesOf(product, config)) {
      targets.add(module);
      const begin = first;
      tensors.push({
        name: `base_model.model.${parent}${module}.lora_${which}.weight`,
        dtype: 'F32',
        shape: which === 'A' ? shape : [rows, columns],
        read: async () => {
          const values = await model.readTensor(name, 'value');
          return which === 'A' ? values : values.subarray(begin * columns, (begin + rows) * columns);
        },
      });
      first += rows;
    }
  }
  await writeFolderAtomically(
    directory,
    async (beside) => {
      await writeSafetensors(join(beside, 'adapter_model.safetensors'), tensors, { format: 'pt' }, signal);
      await writeJson(join(beside, 'adapter_config.json'), {
        peft_type: 'LORA',
        task_type: 'CAUSAL_LM',
        base_model_name_or_path: base ?? null,
        r: rank,
        lora_alpha: rank,
        lora_dropout: 0,
        bias: 'none',
        fan_in_fan_out: false,
        inference_mode: true,
        target_modules: [...targets],
      });
    },
    () => true,
  );
}
