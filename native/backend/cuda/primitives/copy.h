// Moving data: 16-byte accesses, asynchronous copies into shared memory, and matrices from there into fragments.
#pragma once

#include "backend/cuda/primitives/device.h"

namespace merf::cuda {

// `N` elements that move as one access; N * sizeof(T) is 4, 8 or 16 and the address a multiple of it.
template <typename T, int N>
struct alignas(sizeof(T) * N) Vector {
  T at[N];
};
template <typename T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));  // elements in the widest access

template <int N, typename T>
__device__ inline Vector<T, N> load_vector(const T* from) {
#if defined(MERF_CUDA_EMULATION)
  emulation::check_aligned("load_vector", from, sizeof(Vector<T, N>));
#endif
  return *reinterpret_cast<const Vector<T, N>*>(from);
}
template <int N, typename T>
__device__ inline void store_vector(T* to, const Vector<T, N>& value) {
#if defined(MERF_CUDA_EMULATION)
  emulation::check_aligned("store_vector", to, sizeof(Vector<T, N>));
#endif
  *reinterpret_cast<Vector<T, N>*>(to) = value;
}

#if defined(MERF_CUDA_EMULATION)
using emulation::copy_async;
using emulation::copy_async_commit;
using emulation::copy_async_wait;
using emulation::load_matrices;
using emulation::load_matrices_transposed;
#else

// Starts copying 16 bytes from global to shared memory, both 16-byte aligned; zeros instead where !valid (`from` is
// then not read).
__device__ inline void copy_async(void* to_shared, const void* from, bool valid = true) {
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(to_shared));
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
// Closes the group of this thread's copies since the last call.
__device__ inline void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits for this thread's groups but the youngest `Pending`. Others see what was copied after a barrier.
template <int Pending>
__device__ inline void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// ldmatrix: four 8 x 8 matrices of 2-byte elements. Lane l gives the 16-byte aligned address of row l % 8 of matrix
// l / 8 in shared memory; register r of lane l receives elements (l / 4, 2 (l % 4) + {0, 1}) of matrix r, or of its
// transpose.
__device__ inline void load_matrices(uint32_t (&to)[4], const void* row) {
  const uint32_t from = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(from)
               : "memory");
}
__device__ inline void load_matrices_transposed(uint32_t (&to)[4], const void* row) {
  const uint32_t from = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(from)
               : "memory");
}
#endif

}  // namespace merf::cuda
