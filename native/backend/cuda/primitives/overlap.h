// Kernels that begin before the one ahead of them has ended (programmatic dependent launch): LaunchShape::overlaps.
// Ahead of wait_for_previous a kernel reads nothing but what no kernel of the same step writes, such as weights, and
// writes nothing. Every thread of it calls both: that it has ended then means that all before it have.
#pragma once

#include "backend/cuda/primitives/device.h"

namespace merf::cuda {

#if defined(MERF_CUDA_EMULATION)
inline void wait_for_previous() {}
inline void let_next_begin() {}
inline void prefetch(const void*) {}
#else
// Waits until the kernels ahead have ended and what they wrote is seen.
__device__ inline void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// The next kernel may begin once all blocks of this one have come here.
__device__ inline void let_next_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
// Brings the line of global memory that has this address to the second-level cache.
__device__ inline void prefetch(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}
#endif

}  // namespace merf::cuda
