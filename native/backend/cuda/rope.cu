// Rotary position embedding, in place: a block has the heads of one token, whose cosines and sines are computed once for
// all of them. Angles are float32 products, their sines float64 as on the CPU, to the same bits: what a rollout caches
// on one device is what training computes on another.
#include "backend/cuda/cuda_backend.h"
#include "backend/cuda/launch.h"
#include "backend/cuda/primitives/convert.h"
#include "backend/cuda/primitives/shared.h"
#include "backend/cuda/primitives/warp.h"
#include "backend/cuda/widths.h"

namespace merf::cuda {

namespace {

constexpr int kThreads = 128;

// Within 1e-11 for |x| < 1e6: x is reduced to [-pi/4, pi/4] by a product exact enough there, then Taylor.
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

// x [tokens, heads, head_size] in rows of `row_stride`, positions [tokens], inverse_frequencies [head_size / 2]; a
// thread rotates N neighbouring pairs at a time.
template <typename T, int N>
__global__ void __launch_bounds__(kThreads)
    rope_kernel(T* x, const int32_t* positions, const float* inverse_frequencies, int heads, int half,
                int64_t row_stride, double cosine_scale, double sine_scale) {
  SharedMemory shared;
  float* cosines = shared.take<float>(half);
  float* sines = shared.take<float>(half);
  const int64_t token = blockIdx.x;
  const float position = static_cast<float>(positions[token]);
  for (int i = thread_index(); i < half; i += thread_count()) {
    double sine, cosine;
    sine_cosine(static_cast<double>(position * inverse_frequencies[i]), sine, cosine);
    cosines[i] = static_cast<float>(cosine * cosine_scale);
    sines[i] = static_cast<float>(sine * sine_scale);
  }
  sync_block();
  x += token * row_stride;
  const int steps = half / N;  // in a head
  for (int step = thread_index(); step < heads * steps; step += thread_count()) {
    const int i = step % steps * N;
    T* head = x + int64_t{step / steps} * 2 * half;
    float first[N], second[N], c[N], s[N], first_out[N], second_out[N];
    load_floats(first, head + i);
    load_floats(second, head + half + i);
    load_floats(c, cosines + i);
    load_floats(s, sines + i);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      first_out[j] = fmaf(-second[j], s[j], first[j] * c[j]);
      second_out[j] = fmaf(first[j], s[j], second[j] * c[j]);
    }
    store_floats(head + i, first_out);
    store_floats(head + half + i, second_out);
  }
}

}  // namespace

void CudaBackend::rope(const HeadsView& x, const Tensor& positions, const Tensor& inverse_frequencies,
                       bool inverse, float attention_scale) {
  const int half = static_cast<int>(x.head_size / 2), heads = static_cast<int>(x.heads);
  const double scale = static_cast<double>(attention_scale);
  with_type(x.dtype, [&](auto type) {
    using T = decltype(type);
    const bool wide = vectors_fit(half, kVector<T>, {x.data}) && x.row_stride % kVector<T> == 0;
    with_width<kVector<T>>(wide, [&](auto width) {
      launch(gpu(), "rope", rope_kernel<T, decltype(width)::value>,
             {blocks(x.tokens), kThreads, 2 * shared_bytes<float>(half)}, static_cast<T*>(x.data),
             positions.as<const int32_t>(), inverse_frequencies.as<const float>(), heads, half, x.row_stride,
             scale, inverse ? -scale : scale);
    });
  });
}

}  // namespace merf::cuda
