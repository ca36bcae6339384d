// The angles of rotary position embedding.
#pragma once

#include <cmath>

#include "backend/cuda/primitives/device.h"

namespace merf::cuda {

// Sine and cosine within 1e-11 for |x| < 1e6. x is reduced to [-pi/4, pi/4], by a product exact enough there,
// for a Taylor series.
__device__ inline void sine_cosine(double x, double& sine, double& cosine) {
  const double turns = rint(x * 0.63661977236758134308);
  double r = fma(-turns, 1.57079632679489655800, x);
  r = fma(-turns, 6.12323399573676603587e-17, r);
  const double r2 = r * r;

  double s = 1.0 / 6227020800.0;
  s = fma(s, r2, -1.0 / 39916800.0);
  s = fma(s, r2, 1.0 / 362880.0);
  s = fma(s, r2, -1.0 / 5040.0);
  s = fma(s, r2, 1.0 / 120.0);
  s = fma(s, r2, -1.0 / 6.0);
  s = fma(s * r2, r, r);
  double c = 1.0 / 479001600.0;
  c = fma(c, r2, -1.0 / 3628800.0);
  c = fma(c, r2, 1.0 / 40320.0);
  c = fma(c, r2, -1.0 / 720.0);
  c = fma(c, r2, 1.0 / 24.0);
  c = fma(c, r2, -0.5);
  c = fma(c, r2, 1.0);

  // Quarter turns: 0 (s, c), 1 (c, -s), 2 (-s, -c), 3 (-c, s).
  const int quarter = static_cast<int>(turns) & 3;
  sine = quarter % 2 == 1 ? c : s;
  cosine = quarter % 2 == 1 ? s : c;
  if (quarter >= 2) sine = -sine;
  if (quarter == 1 || quarter == 2) cosine = -cosine;
}

// Cosine and sine by which a pair of elements is rotated at a position: float32 angles, their sines float64 as on the
// CPU, to the same bits.
__device__ inline void rotation_at(float position, float inverse_frequency, double cosine_scale,
                                   double sine_scale, float& cosine, float& sine) {
  double c, s;
  sine_cosine(static_cast<double>(position * inverse_frequency), s, c);
  cosine = static_cast<float>(c * cosine_scale);
  sine = static_cast<float>(s * sine_scale);
}

// The two elements of a pair, rotated.
__device__ inline void rotate(float first, float second, float cosine, float sine, float& first_out,
                              float& second_out) {
  first_out = fmaf(-second, sine, first * cosine);
  second_out = fmaf(first, sine, second * cosine);
}

}  // namespace merf::cuda
