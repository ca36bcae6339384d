import { MerfError } from '../errors.js';

/** Rotary position embedding; `theta` is the base of the frequencies, positions are in tokens. */
export type RopeConfig =
  | { type: 'default'; theta: number }
  | { type: 'linear'; theta: number; factor: number }
  | {
      type: 'llama3';
      theta: number;
      factor: number;
      lowFrequencyFactor: number;
      highFrequencyFactor: number;
      originalMaxPositions: number;
    };

/**
 * Radians a position for each pair of a head's components, [headSize / 2], with the scaling in them.
 * `default`: theta^(-2i / headSize) (RoFormer, arXiv:2104.09864); `linear`: those divided by `factor`;
 * `llama3`: wavelengths longer than originalMaxPositions / lowFrequencyFactor are divided by `factor`, those shorter
 * than originalMaxPositions / highFrequencyFactor are kept, between them it is interpolated (Llama 3.1).
 */
export function inverseFrequencies(rope: RopeConfig, headSize: number): Float32Array {
  if (!Number.isInteger(headSize) || headSize <= 0 || headSize % 2 !== 0) {
    throw new MerfError(
      'INVALID_ARGUMENT',
      `Expected an even positive integer for headSize but received ${headSize}`,
    );
  }
  const frequencies = new Float32Array(headSize / 2);
  for (let i = 0; i < frequencies.length; ++i) {
    frequencies[i] = scaled(rope, rope.theta ** ((-2 * i) / headSize));
  }
  return frequencies;
}

function scaled(rope: RopeConfig, frequency: number): number {
  switch (rope.type) {
    case 'default':
      return frequency;
    case 'linear':
      return frequency / rope.factor;
    case 'llama3': {
      const turns = (rope.originalMaxPositions * frequency) / (2 * Math.PI);
      if (turns < rope.lowFrequencyFactor) return frequency / rope.factor;
      if (turns > rope.highFrequencyFactor) return frequency;
      const smooth = (turns - rope.lowFrequencyFactor) / (rope.highFrequencyFactor - rope.lowFrequencyFactor);
      return ((1 - smooth) * frequency) / rope.factor + smooth * frequency;
    }
  }
}

/**
 * GGUF files hold Llama 3's scaling only as its result, one divisor a frequency. The parameters that Llama 3.1 and
 * later were trained with (1, 4 and 8192 positions) and the largest divisor give it back; undefined where they don't.
 */
export function llama3FromDivisors(theta: number, divisors: ArrayLike<number>): RopeConfig | undefined {
  const factor = Math.max(...Array.from(divisors));
  const rope: RopeConfig = {
    type: 'llama3',
    theta,
    factor,
    lowFrequencyFactor: 1,
    highFrequencyFactor: 4,
    originalMaxPositions: 8192,
  };
  if (!(factor >= 1)) return undefined;
  const headSize = divisors.length * 2;
  const plain = inverseFrequencies({ type: 'default', theta }, headSize);
  const recovered = inverseFrequencies(rope, headSize);
  for (let i = 0; i < divisors.length; ++i) {
    const expected = (plain[i] as number) / (divisors[i] as number);
    if (!(Math.abs((recovered[i] as number) - expected) <= 1e-4 * expected)) return undefined;
  }
  return rope;
}
