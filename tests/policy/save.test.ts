import { expect, test } from '@jest/globals';
import { toBfloat16 } from '../../lib/policy/save.js';
import { random } from './helpers.js';

/** The bfloat16 nearest to a float32, ties to the even mantissa, found by trying both neighbours. */
function nearest(value: number): number {
  const bits = new Uint32Array(Float32Array.of(value).buffer)[0] as number;
  const below = bits >>> 16;
  const asNumber = (half: number) => new Float32Array(Uint32Array.of((half << 16) >>> 0).buffer)[0] as number;
  const [low, high] = [asNumber(below), asNumber(below + 1)];
  const toLow = Math.abs(value - low);
  // The neighbour above the largest finite number is infinity; its distance is that to 2^128.
  const toHigh = Math.abs(value - (Number.isFinite(high) ? high : Math.sign(value) * 2 ** 128));
  if (toLow === toHigh) return below % 2 === 0 ? below : below + 1;
  return toLow < toHigh ? below : below + 1;
}

test('bfloat16 is rounded to nearest even', () => {
  const draw = random(11);
  const values = Float32Array.from([
    0,
    -0,
    1,
    1.00390625,
    1.01171875,
    -3.4e38,
    3.3e38,
    1e-40,
    2 ** -126,
    65504,
  ]);
  const drawn = Float32Array.from(
    { length: 5000 },
    () => (draw() - 0.5) * 2 ** Math.floor(draw() * 200 - 100),
  );
  for (const list of [values, drawn]) {
    const rounded = toBfloat16(list);
    for (const [i, value] of list.entries()) {
      expect({ value, bits: rounded[i] }).toEqual({ value, bits: nearest(value) });
    }
  }
});

test('bfloat16 keeps what is not finite', () => {
  const [nan, infinity, negative] = toBfloat16(
    Float32Array.of(Number.NaN, Number.POSITIVE_INFINITY, Number.NEGATIVE_INFINITY),
  );
  expect((nan as number) & 0x7fff).toBeGreaterThan(0x7f80);
  expect(infinity).toBe(0x7f80);
  expect(negative).toBe(0xff80);
});
