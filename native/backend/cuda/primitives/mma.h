// Products of small matrices by one warp: D[16, 8] += A[16, depth] * B[depth, 8], accumulated in float32. bfloat16 goes
// through tensor cores (mma.sync), float32 through ordinary fused multiply-adds, since tensor cores would round it to
// TF32; kernels are written once for both.
//
// In lane l, with g = l / 4 and t = l % 4:
//   accumulator: at[0], at[1] are D[g][2t], D[g][2t + 1]; at[2], at[3] the same columns of row g + 8
//   A bfloat16:  at[0], at[1] are A[g], A[g + 8] at columns 2t, 2t + 1; at[2], at[3] the same rows 8 columns further
//   B bfloat16:  at[0] is B[2t, 2t + 1][g]; at[1] the same 8 rows further
//   A float32:   at[0][k], at[1][k] are A[g][k], A[g + 8][k];  B float32: at[0][k], at[1][k] are B[k][2t], B[k][2t + 1]
// (PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type").
#pragma once

#include <type_traits>

#include "backend/cuda/primitives/copy.h"
#include "backend/cuda/primitives/math.h"
#include "backend/cuda/primitives/warp.h"

namespace merf::cuda {

template <typename T>
constexpr int kDepth = sizeof(T) == 2 ? 16 : 8;

struct Accumulator {
  float at[4];
};
template <typename T>
struct FragmentA;
template <typename T>
struct FragmentB;
template <>
struct FragmentA<bf16> {
  uint32_t at[4];
};
template <>
struct FragmentB<bf16> {
  uint32_t at[2];
};
template <>
struct FragmentA<float> {
  float at[2][8];
};
template <>
struct FragmentB<float> {
  float at[2][8];
};

// The row (of two: second = 0, 1) and first column that this lane's accumulator elements stand at.
__device__ inline int accumulator_row(int second) { return lane_index() / 4 + 8 * second; }
__device__ inline int accumulator_column() { return 2 * (lane_index() % 4); }

#if defined(MERF_CUDA_EMULATION)
using emulation::mma_bf16;
#else
__device__ inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#endif

__device__ inline void mma(Accumulator& d, const FragmentA<bf16>& a, const FragmentB<bf16>& b) {
  mma_bf16(d.at, a.at, b.at);
}
__device__ inline void mma(Accumulator& d, const FragmentA<float>& a, const FragmentB<float>& b) {
#pragma unroll
  for (int k = 0; k < 8; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) d.at[i] = fmaf(a.at[i / 2][k], b.at[i % 2][k], d.at[i]);
  }
}

// Fragments from row-major tiles in shared memory; `stride` is in elements, rows are 16-byte aligned. For bfloat16 a
// stride of 16 bytes more than a multiple of 128 has no bank conflicts.

// A[16, depth] stored as it is.
__device__ inline void load_a(FragmentA<bf16>& a, const bf16* tile, int stride) {
  const int matrix = lane_index() / 8, row = lane_index() % 8;
  load_matrices(a.at, tile + (matrix % 2 * 8 + row) * stride + matrix / 2 * 8);
}
__device__ inline void load_a(FragmentA<float>& a, const float* tile, int stride) {
#pragma unroll
  for (int second = 0; second < 2; ++second) {
    const float* from = tile + accumulator_row(second) * stride;
#pragma unroll
    for (int k = 0; k < 8; k += 4) {
      const Vector<float, 4> four = load_vector<4>(from + k);
#pragma unroll
      for (int i = 0; i < 4; ++i) a.at[second][k + i] = four.at[i];
    }
  }
}
// A[16, depth] stored as its transpose [depth, 16].
__device__ inline void load_a_transposed(FragmentA<bf16>& a, const bf16* tile, int stride) {
  const int matrix = lane_index() / 8, row = lane_index() % 8;
  load_matrices_transposed(a.at, tile + (matrix / 2 * 8 + row) * stride + matrix % 2 * 8);
}
__device__ inline void load_a_transposed(FragmentA<float>& a, const float* tile, int stride) {
#pragma unroll
  for (int k = 0; k < 8; ++k) {
#pragma unroll
    for (int second = 0; second < 2; ++second) a.at[second][k] = tile[k * stride + accumulator_row(second)];
  }
}
// Two neighbouring blocks B[depth, 8], stored as the transpose [16, depth]: rows are columns of B.
__device__ inline void load_b_transposed(FragmentB<bf16> (&b)[2], const bf16* tile, int stride) {
  const int matrix = lane_index() / 8, row = lane_index() % 8;
  uint32_t four[4];
  load_matrices(four, tile + (matrix / 2 * 8 + row) * stride + matrix % 2 * 8);
  b[0] = {{four[0], four[1]}};
  b[1] = {{four[2], four[3]}};
}
__device__ inline void load_b_transposed(FragmentB<float> (&b)[2], const float* tile, int stride) {
#pragma unroll
  for (int block = 0; block < 2; ++block) {
#pragma unroll
    for (int column = 0; column < 2; ++column) {
      const float* from = tile + (8 * block + accumulator_column() + column) * stride;
#pragma unroll
      for (int k = 0; k < 8; k += 4) {
        const Vector<float, 4> four = load_vector<4>(from + k);
#pragma unroll
        for (int i = 0; i < 4; ++i) b[block].at[column][k + i] = four.at[i];
      }
    }
  }
}
// Loads b from a tile that is stored as it is multiplied: [depth, 16].
__device__ inline void load_b(FragmentB<bf16> (&b)[2], const bf16* tile, int stride) {
  const int matrix = lane_index() / 8, row = lane_index() % 8;
  uint32_t four[4];
  load_matrices_transposed(four, tile + (matrix % 2 * 8 + row) * stride + matrix / 2 * 8);
  b[0] = {{four[0], four[1]}};
  b[1] = {{four[2], four[3]}};
}
__device__ inline void load_b(FragmentB<float> (&b)[2], const float* tile, int stride) {
#pragma unroll
  for (int block = 0; block < 2; ++block) {
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      const Vector<float, 2> two = load_vector<2>(tile + k * stride + 8 * block + accumulator_column());
      b[block].at[0][k] = two.at[0];
      b[block].at[1][k] = two.at[1];
    }
  }
}

// ---- The same for `Blocks` of 16 rows, or of 8 columns (an even number), side by side. Kernels run no faster for it on
// a GPU, but the emulation's lanes meet once instead of for every block.

// `Count` times four matrices, their rows `apart` elements apart.
template <int Count, bool Transposed>
__device__ inline void load_blocks(uint32_t* to, const bf16* row, int apart) {
#if defined(MERF_CUDA_EMULATION)
  emulation::load_matrices(to, row, Count, static_cast<size_t>(apart) * sizeof(bf16), Transposed);
#else
#pragma unroll
  for (int i = 0; i < Count; ++i) {
    uint32_t four[4];
    if constexpr (Transposed) {
      load_matrices_transposed(four, row + i * apart);
    } else {
      load_matrices(four, row + i * apart);
    }
#pragma unroll
    for (int r = 0; r < 4; ++r) to[4 * i + r] = four[r];
  }
#endif
}

template <int Blocks>
__device__ inline void load_a(FragmentA<bf16> (&a)[Blocks], const bf16* tile, int stride) {
  const int matrix = lane_index() / 8, row = lane_index() % 8;
  load_blocks<Blocks, false>(a[0].at, tile + (matrix % 2 * 8 + row) * stride + matrix / 2 * 8, 16 * stride);
}
template <int Blocks>
__device__ inline void load_a_transposed(FragmentA<bf16> (&a)[Blocks], const bf16* tile, int stride) {
  const int matrix = lane_index() / 8, row = lane_index() % 8;
  load_blocks<Blocks, true>(a[0].at, tile + (matrix / 2 * 8 + row) * stride + matrix % 2 * 8, 16);
}
template <int Blocks>
__device__ inline void load_b_transposed(FragmentB<bf16> (&b)[Blocks], const bf16* tile, int stride) {
  static_assert(Blocks % 2 == 0);
  const int matrix = lane_index() / 8, row = lane_index() % 8;
  load_blocks<Blocks / 2, false>(b[0].at, tile + (matrix / 2 * 8 + row) * stride + matrix % 2 * 8,
                                 16 * stride);
}
template <int Blocks>
__device__ inline void load_b(FragmentB<bf16> (&b)[Blocks], const bf16* tile, int stride) {
  static_assert(Blocks % 2 == 0);
  const int matrix = lane_index() / 8, row = lane_index() % 8;
  load_blocks<Blocks / 2, true>(b[0].at, tile + (matrix % 2 * 8 + row) * stride + matrix / 2 * 8, 16);
}

template <int Blocks>
__device__ inline void load_a(FragmentA<float> (&a)[Blocks], const float* tile, int stride) {
#pragma unroll
  for (int i = 0; i < Blocks; ++i) load_a(a[i], tile + 16 * i * stride, stride);
}
template <int Blocks>
__device__ inline void load_a_transposed(FragmentA<float> (&a)[Blocks], const float* tile, int stride) {
#pragma unroll
  for (int i = 0; i < Blocks; ++i) load_a_transposed(a[i], tile + 16 * i, stride);
}
template <int Blocks>
__device__ inline void load_b_transposed(FragmentB<float> (&b)[Blocks], const float* tile, int stride) {
#pragma unroll
  for (int i = 0; i < Blocks; i += 2) {
    load_b_transposed(reinterpret_cast<FragmentB<float>(&)[2]>(b[i]), tile + 8 * i * stride, stride);
  }
}
template <int Blocks>
__device__ inline void load_b(FragmentB<float> (&b)[Blocks], const float* tile, int stride) {
#pragma unroll
  for (int i = 0; i < Blocks; i += 2) {
    load_b(reinterpret_cast<FragmentB<float>(&)[2]>(b[i]), tile + 8 * i, stride);
  }
}

// d[i][j] += a[i] * b[j].
template <int Rows, int Columns>
__device__ inline void mma(Accumulator (&d)[Rows][Columns], const FragmentA<bf16> (&a)[Rows],
                           const FragmentB<bf16> (&b)[Columns]) {
#if defined(MERF_CUDA_EMULATION)
  static_assert(Rows <= emulation::kMostMmaBlocks && Columns <= emulation::kMostMmaBlocks);
  emulation::mma_bf16(d[0][0].at, a[0].at, b[0].at, Rows, Columns);
#else
#pragma unroll
  for (int i = 0; i < Rows; ++i) {
#pragma unroll
    for (int j = 0; j < Columns; ++j) mma(d[i][j], a[i], b[j]);
  }
#endif
}
template <int Rows, int Columns>
__device__ inline void mma(Accumulator (&d)[Rows][Columns], const FragmentA<float> (&a)[Rows],
                           const FragmentB<float> (&b)[Columns]) {
#if defined(MERF_CUDA_EMULATION)
  emulation::mma_f32(d[0][0].at, a[0].at[0], b[0].at[0], Rows, Columns);
#else
#pragma unroll
  for (int i = 0; i < Rows; ++i) {
#pragma unroll
    for (int j = 0; j < Columns; ++j) mma(d[i][j], a[i], b[j]);
  }
#endif
}

// Accumulators of 16 rows and `depth` columns (two of them for bfloat16, one for float32), rounded to T, as the A of
// the next product.
__device__ inline void to_fragment(FragmentA<bf16>& a, const Accumulator* d) {
  a.at[0] = pack_bf16(d[0].at[0], d[0].at[1]);
  a.at[1] = pack_bf16(d[0].at[2], d[0].at[3]);
  a.at[2] = pack_bf16(d[1].at[0], d[1].at[1]);
  a.at[3] = pack_bf16(d[1].at[2], d[1].at[3]);
}
__device__ inline void to_fragment(FragmentA<float>& a, const Accumulator* d) {
  const int quad = lane_index() / 4 * 4;
#pragma unroll
  for (int k = 0; k < 8; ++k) {
#pragma unroll
    for (int second = 0; second < 2; ++second)
      a.at[second][k] = shuffle(d->at[2 * second + k % 2], quad + k / 2);
  }
}

}  // namespace merf::cuda
