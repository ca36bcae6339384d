// Elements of either storage type as float32 in registers.
#pragma once

#include <bit>

#include "backend/cuda/primitives/copy.h"
#include "backend/cuda/primitives/math.h"

namespace merf::cuda {

// `N` neighbouring elements, in the widest accesses that an address aligned to 16 bytes (or to all N) allows.
template <int N, typename T>
__device__ inline void load_floats(float (&to)[N], const T* from) {
  constexpr int kStep = N < kVector<T> ? N : kVector<T>;
#pragma unroll
  for (int i = 0; i < N; i += kStep) {
    const Vector<T, kStep> part = load_vector<kStep>(from + i);
#pragma unroll
    for (int j = 0; j < kStep; ++j) to[i + j] = to_f32(part.at[j]);
  }
}

template <int N, typename T>
__device__ inline void store_floats(T* to, const float (&from)[N]) {
  constexpr int kStep = N < kVector<T> ? N : kVector<T>;
#pragma unroll
  for (int i = 0; i < N; i += kStep) {
    Vector<T, kStep> part;
    if constexpr (sizeof(T) == 2 && kStep % 2 == 0) {
#pragma unroll
      for (int j = 0; j < kStep; j += 2) {
        const auto pair = std::bit_cast<Vector<T, 2>>(pack_bf16(from[i + j], from[i + j + 1]));
        part.at[j] = pair.at[0];
        part.at[j + 1] = pair.at[1];
      }
    } else {
#pragma unroll
      for (int j = 0; j < kStep; ++j) part.at[j] = from_f32<T>(from[i + j]);
    }
    store_vector<kStep>(to + i, part);
  }
}

}  // namespace merf::cuda
