import { describe, expect, test } from '@jest/globals';
import { inverseFrequencies, llama3FromDivisors, type RopeConfig } from '../../lib/policy/rope.js';

const llama3: RopeConfig = {
  type: 'llama3',
  theta: 500_000,
  factor: 8,
  lowFrequencyFactor: 1,
  highFrequencyFactor: 4,
  originalMaxPositions: 8192,
};

/** `transformers` 5.23, ROPE_INIT_FUNCTIONS['llama3'] for the settings above and head size 64. */
const transformersLlama3: number[] = [
  1.0, 0.663601279, 0.440366626, 0.292227834, 0.193922758, 0.128687382, 0.0853971019, 0.0566696189,
  0.0376060307, 0.0249554086, 0.0165604409, 0.0109895291, 0.00729266508, 0.00483942125, 0.00321144611,
  0.00137189368, 0.000524846022, 0.000178507791, 7.78465546e-5, 5.16590699e-5, 3.42810235e-5, 2.2748929e-5,
  1.50962178e-5, 1.00178686e-5, 6.64786967e-6, 4.41153452e-6, 2.92749974e-6, 1.94269251e-6, 1.28917316e-6,
  8.55496921e-7, 5.6770881e-7, 3.7673226e-7,
];

describe('inverse frequencies', () => {
  test('default: theta^(-2i/d)', () => {
    const frequencies = inverseFrequencies({ type: 'default', theta: 10_000 }, 8);
    for (const [i, value] of [1, 0.1, 0.01, 0.001].entries()) expect(frequencies[i]).toBeCloseTo(value, 8);
  });

  test('linear: divided by the factor', () => {
    const plain = inverseFrequencies({ type: 'default', theta: 10_000 }, 64);
    const scaled = inverseFrequencies({ type: 'linear', theta: 10_000, factor: 4 }, 64);
    for (const [i, value] of scaled.entries()) expect(value).toBe(Math.fround((plain[i] as number) / 4));
  });

  test('llama3: as transformers computes them', () => {
    const frequencies = inverseFrequencies(llama3, 64);
    expect(frequencies).toHaveLength(transformersLlama3.length);
    frequencies.forEach((value, i) => {
      const expected = transformersLlama3[i] as number;
      expect(Math.abs(value - expected)).toBeLessThan(3e-7 * expected);
    });
  });

  test('llama3 is found again from the divisors that a GGUF file holds', () => {
    const plain = inverseFrequencies({ type: 'default', theta: 500_000 }, 64);
    const divisors = inverseFrequencies(llama3, 64).map((value, i) => (plain[i] as number) / value);
    expect(llama3FromDivisors(500_000, divisors)).toMatchObject({ ...llama3, factor: expect.closeTo(8, 4) });
    divisors[10] = 3;
    expect(llama3FromDivisors(500_000, divisors)).toBeUndefined();
  });
});
