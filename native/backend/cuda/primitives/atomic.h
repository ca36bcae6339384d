// Atomic additions to integers in shared or global memory, which give the same in every order.
#pragma once

#include "backend/cuda/primitives/device.h"

namespace merf::cuda {

#if defined(MERF_CUDA_EMULATION)
using emulation::atomic_add;
#else
__device__ inline uint32_t atomic_add(uint32_t* to, uint32_t value) { return atomicAdd(to, value); }
__device__ inline uint64_t atomic_add(uint64_t* to, uint64_t value) {
  return atomicAdd(reinterpret_cast<unsigned long long*>(to), static_cast<unsigned long long>(value));
}
#endif

}  // namespace merf::cuda
