// What the attention kernels for compute capability 9.0 are made of: tiles of rows of one head as panels (wgmma.h), which
// one thread has copied, in a ring of stages, for warpgroups that multiply.
#pragma once

#include "backend/cuda/attention_tiles.h"
#include "backend/cuda/primitives/tensor_copy.h"
#include "backend/cuda/primitives/wgmma.h"

namespace merf::cuda {

// The stage of a ring that comes next, and the parity of the phase in which it is filled.
template <int kStages>
struct Ring {
  int stage = 0, phase = 0;
  __device__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      phase = 1 - phase;
    }
  }
};

template <int kHead>
__device__ constexpr uint32_t panel_bytes(int rows) {
  return static_cast<uint32_t>(rows * kHead) * sizeof(bf16);
}

// Starts copying rows [first, first + kRows) of a head, zeros for those behind the last token. One thread.
template <int kHead, int kRows>
__device__ inline void copy_panels(bf16* tile, const TensorMap& map, int head, int first, uint64_t* full) {
#pragma unroll
  for (int panel = 0; panel < kHead / kPanelColumns; ++panel) {
    copy_tensor(tile + panel * kRows * kPanelColumns, map, panel * kPanelColumns, head, first, full);
  }
}

// This warp no longer reads what is filled again once every warp has said so.
__device__ inline void release(uint64_t* free) {
  sync_warp();
  if (lane_index() == 0) barrier_arrive(free);
}

// Writes this warp's d times scale[second] as 16 rows of a head, by way of rows from `row` of a tile of kRows, which no
// other warp reads. `first`: the token of the tile's first row.
template <int kHead, int kRows>
__device__ inline void store_panels(const Accumulator (&d)[kHead / 8], const float (&scale)[2], bf16* tile,
                                    int row, const HeadRows<bf16>& to, int64_t head, int first, int tokens) {
  sync_warp();
#pragma unroll
  for (int second = 0; second < 2; ++second) {
#pragma unroll
    for (int block = 0; block < kHead / 8; ++block) {
      store_pair(tile + panel_offset(kRows, row + accumulator_row(second), 8 * block) + accumulator_column(),
                 d[block].at[2 * second] * scale[second], d[block].at[2 * second + 1] * scale[second]);
    }
  }
  sync_warp();
  constexpr int kVectors = kHead / 8;
  bf16* rows = to.head(head);
#pragma unroll 4
  for (int at = lane_index(); at < kBand * kVectors; at += kWarp) {
    const int own = row + at / kVectors, column = at % kVectors * 8;
    if (first + own < tokens && column < to.head_size) {
      store_vector<8>(rows + (first + own) * to.stride + column,
                      load_vector<8>(tile + panel_offset(kRows, own, column)));
    }
  }
}

}  // namespace merf::cuda
