// Bulk copies of tiles from global to shared memory by the copy engine of compute capability 9.0 and later, and the
// barriers in shared memory that they complete on (mbarrier). One thread starts a copy; nobody's registers are passed.
//
// A barrier has phases, numbered from 0. A phase ends once as many threads have arrived as the barrier was initialised
// with and as many bytes have been copied as they announced. barrier_wait(b, p) returns once the phase with parity p has
// ended, where the phase before the first counts as ended, with parity 1.
#pragma once

#include "backend/cuda/primitives/device.h"

namespace merf::cuda {

#if defined(MERF_CUDA_EMULATION)
using emulation::barrier_arrive;
using emulation::barrier_expect;
using emulation::barrier_init;
using emulation::barrier_wait;
using emulation::copy_bulk;
using emulation::copy_tensor;
using emulation::shared_address;
using emulation::TensorMap;
#else

// A CUtensorMap, which a kernel takes as part of a `const __grid_constant__` parameter.
struct alignas(128) TensorMap {
  uint64_t opaque[16];
};

__device__ inline uint32_t shared_address(const void* at) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(at));
}

// Is called by one thread, and followed by fence_barriers() and a barrier of the block.
__device__ inline void barrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals)
               : "memory");
}
__device__ inline void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Arrives and announces bytes that will be copied.
__device__ inline void barrier_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(bytes)
               : "memory");
}
__device__ inline void barrier_wait(uint64_t* barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// Copies 64 columns of `map`'s rows from (row, middle, column) into a panel (wgmma.h) at a multiple of 1024 bytes. What
// lies outside of the tensor becomes 0, and counts as copied. Completes on the barrier.
__device__ inline void copy_tensor(void* to_shared, const TensorMap& map, int column, int middle, int row,
                                   uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, "
      "%4}], [%5];" ::"r"(shared_address(to_shared)),
      "l"(&map), "r"(column), "r"(middle), "r"(row), "r"(shared_address(barrier))
      : "memory");
}
// Copies a multiple of 16 bytes, from and to multiples of 16 bytes.
__device__ inline void copy_bulk(void* to_shared, const void* from, uint32_t bytes, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
          shared_address(to_shared)),
      "l"(from), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}
#endif

// Makes initialised barriers known to the copy engine.
__device__ inline void fence_barriers() {
#if !defined(MERF_CUDA_EMULATION)
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

// Orders this thread's ordinary accesses to shared memory before those that tensor cores and the copy engine make after
// a barrier.
__device__ inline void fence_shared() {
#if !defined(MERF_CUDA_EMULATION)
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

}  // namespace merf::cuda
