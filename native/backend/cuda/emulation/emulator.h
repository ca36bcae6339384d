// Runs kernels on the host. Blocks run one after another on each of a few threads of the host; a block's threads are
// fibers, which change over at barriers and warp operations, in an order drawn from a seed: a kernel whose result
// depends on the order lacks a barrier.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "backend/cuda/emulation/device.h"

namespace merf::cuda::emulation {

class BlockRunner;

constexpr size_t kMostShared = size_t{227} << 10;  // of a block at compute capability 9.0

class Emulator {
 public:
  // Seed 0: threads run in the order of their indices. Even seeds: any thread goes on next. Odd seeds: a warp goes on as
  // far as it can, past others that have not read yet what it overwrites.
  // A block can have `most_shared` bytes of shared memory, itself at most kMostShared.
  Emulator(int threads, uint64_t seed, size_t most_shared);
  ~Emulator();

  // Runs every block of the grid. Throws Error("INTERNAL") with the kernel's name where it broke CUDA's rules: a
  // barrier or warp operation that not all threads reached, a write outside of shared or global memory, more shared
  // memory than it was given, a shape that no GPU accepts.
  void run(const char* kernel, dim3 grid, int threads, size_t shared_bytes,
           const std::function<void()>& thread_body);

 private:
  const uint64_t seed_;
  const size_t most_shared_;
  uint64_t launches_ = 0;
  std::vector<std::unique_ptr<BlockRunner>> runners_;  // one for each thread, made when it is first needed
};

}  // namespace merf::cuda::emulation
