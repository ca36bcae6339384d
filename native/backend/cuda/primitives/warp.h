// What the threads of a warp or block do together.
#pragma once

#include "backend/cuda/primitives/device.h"

namespace merf::cuda {

#if defined(MERF_CUDA_EMULATION)
using emulation::any;
using emulation::arrive_threads;
using emulation::ballot;
using emulation::shuffle;
using emulation::sync_block;
using emulation::sync_threads;
using emulation::sync_warp;
#else

// All threads of the block; what was written before is seen after.
__device__ inline void sync_block() { __syncthreads(); }
// `threads` threads of the block, whole warps, which name the same barrier (1 to 15).
__device__ inline void sync_threads(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
// Counts as one of the threads that sync_threads waits for, without waiting.
__device__ inline void arrive_threads(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
__device__ inline void sync_warp() { __syncwarp(); }

// The value that lane `source` gave.
template <typename T>
__device__ inline T shuffle(T value, int source) {
  return __shfl_sync(0xffffffffu, value, source);
}
// Bit l is set where lane l's condition holds.
__device__ inline uint32_t ballot(bool condition) { return __ballot_sync(0xffffffffu, condition); }
__device__ inline bool any(bool condition) { return __any_sync(0xffffffffu, condition); }
#endif

template <typename T>
__device__ inline T shuffle_xor(T value, int mask) {
  return shuffle(value, lane_index() ^ mask);
}

// Over the 32 lanes, or over each aligned group of `width` (a power of two) of them; every lane gets the result. The
// order is fixed.
template <typename T>
__device__ inline T warp_sum(T value, int width = kWarp) {
  for (int mask = width / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}
template <typename T>
__device__ inline T warp_max(T value, int width = kWarp) {
  for (int mask = width / 2; mask > 0; mask /= 2) {
    const T other = shuffle_xor(value, mask);
    value = other > value ? other : value;
  }
  return value;
}

// The sum over the lanes up to this one.
template <typename T>
__device__ inline T warp_prefix_sum(T value) {
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const bool some = lane_index() >= distance;
    const T before = shuffle(value, some ? lane_index() - distance : lane_index());
    if (some) value += before;
  }
  return value;
}

// Over all threads of the block, in a fixed order; every thread gets the result. `scratch`: room for one value a warp
// in shared memory, free again after the call.
template <typename T>
__device__ inline T block_sum(T value, T* scratch) {
  value = warp_sum(value);
  if (lane_index() == 0) scratch[warp_index()] = value;
  sync_block();
  T sum = scratch[0];
  for (int i = 1; i < warp_count(); ++i) sum += scratch[i];
  sync_block();
  return sum;
}
template <typename T>
__device__ inline T block_max(T value, T* scratch) {
  value = warp_max(value);
  if (lane_index() == 0) scratch[warp_index()] = value;
  sync_block();
  T most = scratch[0];
  for (int i = 1; i < warp_count(); ++i) most = scratch[i] > most ? scratch[i] : most;
  sync_block();
  return most;
}

}  // namespace merf::cuda
