// Atomic additions to integers in shared or global memory, which give the same in every order; and what makes a block's
// writes to global memory seen by the block that counts them complete.
#pragma once

#include "backend/cuda/primitives/device.h"
#include "backend/cuda/primitives/warp.h"

namespace merf::cuda {

#if defined(MERF_CUDA_EMULATION)
using emulation::atomic_add;
using emulation::fence_memory;
#else
__device__ inline uint32_t atomic_add(uint32_t* to, uint32_t value) { return atomicAdd(to, value); }
__device__ inline uint64_t atomic_add(uint64_t* to, uint64_t value) {
  return atomicAdd(reinterpret_cast<unsigned long long*>(to), static_cast<unsigned long long>(value));
}
// What this thread wrote to global memory before is seen by whoever sees what it writes after.
__device__ inline void fence_memory() { __threadfence(); }
#endif

// Whether this block is the last of `count` to come here, which sees what the others wrote before they came. `arrived`
// is 0 at first; `scratch` is in shared memory. All threads of the block call it.
__device__ inline bool is_last_block(uint32_t* arrived, uint32_t count, uint32_t* scratch) {
  sync_block();
  if (thread_index() == 0) {
    fence_memory();
    *scratch = atomic_add(arrived, 1u);
    fence_memory();
  }
  sync_block();
  return *scratch + 1 == count;
}

}  // namespace merf::cuda
