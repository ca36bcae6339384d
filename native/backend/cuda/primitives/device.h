// The language that kernels are written in. A kernel is a `__global__` function template in a .cu file of this folder.
// Every .cu file is compiled twice: by nvcc for a GPU, and by the host's compiler for the emulation, which runs each
// kernel in every test. What makes that possible:
//
//   - shared memory comes from SharedMemory (shared.h), never from `__shared__` variables;
//   - blocks have a multiple of 32 threads, and whole warps reach every function of warp.h, mma.h and ldmatrix;
//   - barriers are sync_block() and sync_warp(), reached by all threads of the block or warp;
//   - PTX and intrinsics stand behind the functions of this folder alone, and kernels start through launch.h alone;
//   - what order shows in (sums of floating-point numbers) has a fixed order; atomics are for integers.
#pragma once

#include <cstdint>

#include "backend/bf16.h"

#if defined(MERF_CUDA_EMULATION)
#include "backend/cuda/emulation/device.h"
#else
#include <cuda_runtime.h>
#endif

namespace merf::cuda {

constexpr int kWarp = 32;

// The thread's index in its block, whose threads stand in one dimension.
__device__ inline int thread_index() { return static_cast<int>(threadIdx.x); }
// Divided while unsigned, where that is a shift.
__device__ inline int lane_index() { return static_cast<int>(threadIdx.x % kWarp); }
__device__ inline int warp_index() { return static_cast<int>(threadIdx.x / kWarp); }
__device__ inline int thread_count() { return static_cast<int>(blockDim.x); }
__device__ inline int warp_count() { return static_cast<int>(blockDim.x) / kWarp; }

// The thread's index in a grid of one dimension, and how many threads that has.
__device__ inline int64_t grid_index() { return int64_t{blockIdx.x} * blockDim.x + threadIdx.x; }
__device__ inline int64_t grid_size() { return int64_t{gridDim.x} * blockDim.x; }

MERF_HOST_DEVICE constexpr int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }
MERF_HOST_DEVICE constexpr int64_t round_up(int64_t n, int64_t to) { return divide_up(n, to) * to; }

}  // namespace merf::cuda
