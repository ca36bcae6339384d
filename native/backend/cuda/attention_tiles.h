// What the attention kernels are made of: tiles of rows of one head in shared memory, and products of them that a warp
// does on bands of 16 rows in registers. Written once for bfloat16, on tensor cores, and float32.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "backend/cuda/attention_plan.h"
#include "backend/cuda/launch.h"
#include "backend/cuda/primitives/copy.h"
#include "backend/cuda/primitives/math.h"
#include "backend/cuda/primitives/mma.h"
#include "backend/cuda/primitives/shared.h"
#include "backend/cuda/primitives/warp.h"

namespace merf::cuda {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int kBand = 16;  // rows of a warp's product

// A HeadsView as kernels take it.
template <typename T>
struct HeadRows {
  T* data;
  int64_t stride;
  int head_size;

  explicit HeadRows(const HeadsView& view)
      : data(static_cast<T*>(view.data)),
        stride(view.row_stride),
        head_size(static_cast<int>(view.head_size)) {}
  // Row t of the head is at t * stride.
  __device__ T* head(int64_t index) const { return data + index * head_size; }
};

// The lists and pieces of an AttentionSchedule, as kernels take them.
struct AttentionWork {
  const AttentionPiece* pieces = nullptr;
  const int32_t* entries = nullptr;

  AttentionWork() = default;
  explicit AttentionWork(const AttentionSchedule& schedule)
      : pieces(schedule.piece_table.as<const AttentionPiece>()),
        entries(schedule.entry_table.as<const int32_t>()) {}
};

__device__ constexpr bool visible(int key, int query, int visible_until) {
  return key <= query && query < visible_until;
}

// kHead is the head size that a kernel was made for, the real one filled up with zeros. Rows in shared memory are 16
// bytes longer, so that the rows that are read together lie in different banks.
template <typename T, int kHead>
constexpr int kRow = kHead + kVector<T>;
template <typename T, int kHead>
constexpr size_t tile_bytes(int rows) {
  return shared_bytes<T>(int64_t{rows} * kRow<T, kHead>);
}

// The 16 bytes behind each row of a tile, which no product reads, as one array of floats, four a row: what stands
// beside a tile takes no memory of its own. Floats from a multiple of 4 to the next lie side by side.
template <int kHead, typename T>
__device__ inline float* margin(T* tile, int index) {
  const auto at = static_cast<unsigned>(index);
  return reinterpret_cast<float*>(tile + at / 4 * kRow<T, kHead> + kHead) + at % 4;
}

// Starts copying rows [first, first + kRows) of a head into a tile, zeros for those behind the last token.
template <int kHead, int kRows, int kThreads, typename T>
__device__ inline void copy_rows(T* tile, const HeadRows<const T>& from, int64_t head, int first,
                                 int tokens) {
  // A thread stays in its columns, so that few addresses have to be kept.
  constexpr int kMost = kThreads * kVector<T>;  // columns that all threads copy at a time
  constexpr int kColumns = kHead % 128 == 0 ? std::min(kHead, kMost) : kHead % 64 == 0 ? 64 : 32;
  constexpr int kStep = kMost / kColumns;
  static_assert(kHead % kColumns == 0 && (kRows % kStep == 0 || kRows < kStep));
  const auto thread = static_cast<unsigned>(thread_index());
  const int row = static_cast<int>(thread / (kColumns / kVector<T>));
  const int column = static_cast<int>(thread % (kColumns / kVector<T>)) * kVector<T>;
  const T* source = from.head(head) + (first + row) * from.stride + column;
  T* to = tile + row * kRow<T, kHead> + column;
  if (kRows < kStep && row >= kRows) return;
#pragma unroll 2
  for (int i = 0; i < kRows; i += kStep) {
#pragma unroll
    for (int j = 0; j < kHead; j += kColumns) {
      copy_async(to + i * kRow<T, kHead> + j, source + j,
                 first + row + i < tokens && column + j < from.head_size);
    }
    source += kStep * from.stride;
  }
}

// d = A B^T for A [16 kBands, kHead] and B [kColumns, kHead] in tiles.
template <int kHead, int kBands, int kColumns, typename T>
__device__ inline void multiply_transposed(Accumulator (&d)[kBands][kColumns / 8], const T* a, const T* b) {
#pragma unroll
  for (int band = 0; band < kBands; ++band) {
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) d[band][n] = {};
  }
#pragma unroll(sizeof(T) == 2 ? kHead / kDepth <T> : 1)
  for (int k = 0; k < kHead; k += kDepth<T>) {
    FragmentA<T> left[kBands];
#pragma unroll
    for (int band = 0; band < kBands; ++band)
      load_a(left[band], a + kBand * band * kRow<T, kHead> + k, kRow<T, kHead>);
#pragma unroll
    for (int n = 0; n < kColumns; n += 16) {
      FragmentB<T> right[2];
      load_b_transposed(right, b + n * kRow<T, kHead> + k, kRow<T, kHead>);
#pragma unroll
      for (int band = 0; band < kBands; ++band) {
#pragma unroll
        for (int i = 0; i < 2; ++i) mma(d[band][n / 8 + i], left[band], right[i]);
      }
    }
  }
}

// d += A B for A [16 kBands, kColumns] in registers, rounded to T, and B [kColumns, kHead] in a tile.
template <int kHead, int kBands, int kColumns, typename T>
__device__ inline void multiply_add(Accumulator (&d)[kBands][kHead / 8],
                                    const Accumulator (&a)[kBands][kColumns / 8], const T* b) {
#pragma unroll
  for (int k = 0; k < kColumns; k += kDepth<T>) {
    FragmentA<T> left[kBands];
#pragma unroll
    for (int band = 0; band < kBands; ++band) to_fragment(left[band], &a[band][k / 8]);
#pragma unroll
    for (int n = 0; n < kHead; n += 16) {
      FragmentB<T> right[2];
      load_b(right, b + k * kRow<T, kHead> + n, kRow<T, kHead>);
#pragma unroll
      for (int band = 0; band < kBands; ++band) {
#pragma unroll
        for (int i = 0; i < 2; ++i) mma(d[band][n / 8 + i], left[band], right[i]);
      }
    }
  }
}

__device__ inline void store_pair(float* to, float first, float second) {
  store_vector<2>(to, Vector<float, 2>{{first, second}});
}
__device__ inline void store_pair(bf16* to, float first, float second) {
  *reinterpret_cast<uint32_t*>(to) = pack_bf16(first, second);
}

// Writes this warp's d times scale[band][second] as rows from `first` of a head, by way of `tile`: 16 kBands rows in
// shared memory that no other warp reads.
template <int kHead, int kBands, typename T>
__device__ inline void store_rows(const Accumulator (&d)[kBands][kHead / 8], const float (&scale)[kBands][2],
                                  T* tile, const HeadRows<T>& to, int64_t head, int first, int tokens) {
  sync_warp();
#pragma unroll
  for (int band = 0; band < kBands; ++band) {
#pragma unroll
    for (int second = 0; second < 2; ++second) {
      T* row = tile + (kBand * band + accumulator_row(second)) * kRow<T, kHead> + accumulator_column();
#pragma unroll
      for (int n = 0; n < kHead / 8; ++n) {
        store_pair(row + 8 * n, d[band][n].at[2 * second] * scale[band][second],
                   d[band][n].at[2 * second + 1] * scale[band][second]);
      }
    }
  }
  sync_warp();
  constexpr int kVectors = kHead / kVector<T>;
  T* rows = to.head(head);
  for (int at = lane_index(); at < kBand * kBands * kVectors; at += kWarp) {
    const int row = at / kVectors, column = at % kVectors * kVector<T>;
    if (first + row < tokens && column < to.head_size) {
      store_vector<kVector<T>>(rows + (first + row) * to.stride + column,
                               load_vector<kVector<T>>(tile + row * kRow<T, kHead> + column));
    }
  }
}

// ---- Cuts: how a kernel divides its work, as Cut<T, kHead, kSmall>. The small ones are for GPUs whose multiprocessors
// have less shared memory than the 228 KiB of compute capability 9.0: 164 at 8.0, and 100 at 8.6, 8.9 and 12.0, of which
// a block can have 99. So they exist only where the large one asks for more than that.

// Threads of Cut's that a multiprocessor of this GPU holds at once.
template <class Cut>
int resident_threads(const Gpu& gpu) {
  return Cut::kThreads * resident_blocks(gpu, Cut::kShared, Cut::kBlocks);
}

// Calls body(kSmall) with that of the two cuts of which this GPU holds more threads, the large one where equally many.
template <template <typename, int, bool> class Cut, typename T, int kHead, typename Body>
void with_cut(const Gpu& gpu, Body&& body) {
  using Large = Cut<T, kHead, false>;
  if constexpr (Large::kShared > kLeastShared) {
    using Small = Cut<T, kHead, true>;
    static_assert(Small::kShared <= kLeastShared);
    if (resident_threads<Small>(gpu) > resident_threads<Large>(gpu)) return body(std::true_type());
  }
  body(std::false_type());
}

// Calls body(kHead) with the least kHead that holds the head size, which kernels are made for.
template <typename Body>
void with_head_size(int64_t head_size, Body&& body) {
  if (head_size <= 64) {
    body(std::integral_constant<int, 64>{});
  } else if (head_size <= 96) {
    body(std::integral_constant<int, 96>{});
  } else if (head_size <= 128) {
    body(std::integral_constant<int, 128>{});
  } else {
    body(std::integral_constant<int, 256>{});
  }
}

}  // namespace merf::cuda
