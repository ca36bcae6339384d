// Rotary position embedding, in place: a block has the heads of one token, whose cosines and sines are computed once for
// all of them. Angles are float32 products, their sines float64 as on the CPU, to the same bits: what a rollout caches
// on one device is what training computes on another.
#include "backend/cuda/cuda_backend.h"
#include "backend/cuda/launch.h"
#include "backend/cuda/primitives/convert.h"
#include "backend/cuda/primitives/shared.h"
#include "backend/cuda/primitives/warp.h"
#include "backend/cuda/rotation.h"
#include "backend/cuda/widths.h"

namespace merf::cuda {

namespace {

constexpr int kThreads = 128;

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
    rotation_at(position, inverse_frequencies[i], cosine_scale, sine_scale, cosines[i], sines[i]);
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
    for (int j = 0; j < N; ++j) rotate(first[j], second[j], c[j], s[j], first_out[j], second_out[j]);
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
