// Rotary position embedding, alone and with what stands around it behind a projection: a block has the heads of one token,
// whose cosines and sines are computed once for all of them. Angles are float32 products, their sines float64 as on the CPU, to the same bits: what a rollout caches
// on one device is what training computes on another.
#include "backend/cuda/cache_rows.h"
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

// What place_heads_kernel reads and writes. qkv [tokens, heads + 2 kv_heads, 2 half]; sums, of qkv's shape, and bias may be
// null; keys and values [pages, kv_heads, kPageTokens, 2 half] may be null.
template <typename T>
struct PlacedHeads {
  const float* sums;
  const float* bias;
  T* qkv;
  const int32_t* positions;
  const float* inverse_frequencies;
  const int32_t* slots;
  T* keys;
  T* values;
  int heads, kv_heads, half;
  double scale;
};

// qkv = sums + bias where there are sums, else as it stands; rotates queries and keys; stores keys and values in the
// cache. All is rounded where the operators round that this is made of.
template <typename T, int N>
__global__ void __launch_bounds__(kThreads) place_heads_kernel(PlacedHeads<T> p) {
  SharedMemory shared;
  float* cosines = shared.take<float>(p.half);
  float* sines = shared.take<float>(p.half);
  const int64_t token = blockIdx.x;
  const float position = static_cast<float>(p.positions[token]);
  for (int i = thread_index(); i < p.half; i += thread_count()) {
    rotation_at(position, p.inverse_frequencies[i], p.scale, p.scale, cosines[i], sines[i]);
  }
  sync_block();
  const int heads = p.heads + 2 * p.kv_heads, steps = p.half / N;  // in a head
  const int64_t row = token * heads * 2 * p.half;
  const int slot = p.keys == nullptr ? -1 : p.slots[token];
  for (int step = thread_index(); step < heads * steps; step += thread_count()) {
    const int head = step / steps, i = step % steps * N;
    const int64_t at = row + int64_t{head} * 2 * p.half + i;
    float first[N], second[N];
    if (p.sums != nullptr) {
      load_floats(first, p.sums + at);
      load_floats(second, p.sums + at + p.half);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const float* bias = p.bias == nullptr ? nullptr : p.bias + head * 2 * p.half + i + j;
        first[j] = to_f32(from_f32<T>(first[j] + (bias == nullptr ? 0.0f : bias[0])));
        second[j] = to_f32(from_f32<T>(second[j] + (bias == nullptr ? 0.0f : bias[p.half])));
      }
    } else {
      load_floats(first, p.qkv + at);
      load_floats(second, p.qkv + at + p.half);
    }
    if (head < p.heads + p.kv_heads) {
      float c[N], s[N];
      load_floats(c, cosines + i);
      load_floats(s, sines + i);
#pragma unroll
      for (int j = 0; j < N; ++j) rotate(first[j], second[j], c[j], s[j], first[j], second[j]);
    }
    store_floats(p.qkv + at, first);
    store_floats(p.qkv + at + p.half, second);
    if (head < p.heads || slot < 0) continue;
    const int kv_head = (head - p.heads) % p.kv_heads;
    T* const to = (head < p.heads + p.kv_heads ? p.keys : p.values) +
                  cached_head(slot, p.kv_heads, kv_head, 2 * p.half) + i;
    store_floats(to, first);
    store_floats(to + p.half, second);
  }
}

}  // namespace

void CudaBackend::place_heads(const Tensor& sums, const Tensor& bias, const ProjectedHeads& out) {
  with_type(out.qkv.dtype, [&](auto type) {
    using T = decltype(type);
    PlacedHeads<T> placed{};
    placed.sums = sums.as<const float>();
    placed.bias = bias.as<const float>();
    placed.qkv = out.qkv.as<T>();
    placed.positions = out.positions.as<const int32_t>();
    placed.inverse_frequencies = out.inverse_frequencies.as<const float>();
    if (out.cache != nullptr) {
      placed.slots = out.slots.as<const int32_t>();
      placed.keys = out.cache->keys.as<T>();
      placed.values = out.cache->values.as<T>();
    }
    placed.heads = static_cast<int>(out.heads);
    placed.kv_heads = static_cast<int>(out.kv_heads);
    placed.half = static_cast<int>(out.head_size / 2);
    placed.scale = static_cast<double>(out.rope_scale);
    with_width<kVector<T>>(
        vectors_fit(placed.half, kVector<T>, {placed.sums, placed.qkv, placed.keys, placed.values}),
        [&](auto width) {
          launch(gpu(), "place_heads", place_heads_kernel<T, decltype(width)::value>,
                 {blocks(out.qkv.shape[0]), kThreads, 2 * shared_bytes<float>(placed.half)}, placed);
        });
  });
}

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
