// Shared memory, taken piece by piece from what the launch gave the block.
#pragma once

#include <cstddef>

#include "backend/cuda/primitives/device.h"

namespace merf::cuda {

constexpr size_t kSharedAlignment = 128;

// Bytes that a piece of `count` elements takes: a launch asks for the sum over its kernel's pieces.
template <typename T>
constexpr size_t shared_bytes(int64_t count) {
  return (static_cast<size_t>(count) * sizeof(T) + kSharedAlignment - 1) / kSharedAlignment *
         kSharedAlignment;
}

// Every thread of a block takes the same pieces in the same order. Contents are undefined at first (NaN under
// emulation, where what lies between pieces is watched).
class SharedMemory {
 public:
#if defined(MERF_CUDA_EMULATION)
  template <typename T>
  T* take(int64_t count) {
    return static_cast<T*>(emulation::take_shared(pieces_++, shared_bytes<T>(count)));
  }

 private:
  int pieces_ = 0;
#else
  __device__ SharedMemory() {
    extern __shared__ __align__(1024) unsigned char merf_shared_memory[];
    next_ = merf_shared_memory;
  }
  template <typename T>
  __device__ T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(next_);
    next_ += shared_bytes<T>(count);
    return piece;
  }

 private:
  unsigned char* next_;
#endif
};

}  // namespace merf::cuda
