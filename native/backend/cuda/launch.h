// Starting kernels.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <string>
#include <tuple>
#include <utility>

#include "backend/cuda/gpu.h"
#include "backend/cuda/primitives/device.h"

namespace merf::cuda {

struct LaunchShape {
  dim3 grid;          // blocks; a grid of none is no launch
  int threads = 128;  // in a block, a multiple of 32
  size_t shared = 0;  // bytes of shared memory a block, as shared_bytes counts them
  // The kernel calls wait_for_previous (primitives/overlap.h), so it may begin before the one ahead of it has ended.
  bool overlaps = false;
};

// Throws where a dimension is no number that a launch can be given, rather than lose its upper bits.
inline dim3 blocks(int64_t x, int64_t y = 1, int64_t z = 1) {
  for (const int64_t count : {x, y, z}) {
    if (count < 0 || count > 0x7fffffff) {
      throw Error("INTERNAL",
                  "Expected a grid of at most 2147483647 blocks but received " + std::to_string(count));
    }
  }
  return dim3(static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z));
}

// Shared memory that a block can have on every GPU: compute capability 8.6, 8.9 and 12.0 have no more.
constexpr size_t kLeastShared = size_t{99} << 10;

// Blocks with `shared` bytes that a multiprocessor of this GPU holds at once, if registers allow `most`. Each
// block takes 1 KiB more than it asks for, and a multiprocessor has what the largest block takes.
inline int resident_blocks(const Gpu& gpu, size_t shared, int most) {
  constexpr size_t kReserve = 1024;
  const size_t blocks = (gpu.properties().shared_bytes + kReserve) / (shared + kReserve);
  return static_cast<int>(std::min<size_t>(blocks, static_cast<size_t>(most)));
}

// Enqueues the kernel on the GPU's stream. `name` is what errors call it.
template <typename... Parameters, typename... Arguments>
void launch(Gpu& gpu, const char* name, void (*kernel)(Parameters...), const LaunchShape& shape,
            Arguments&&... arguments) {
  static_assert(sizeof...(Parameters) == sizeof...(Arguments));
  if (shape.grid.x == 0 || shape.grid.y == 0 || shape.grid.z == 0) return;
#if defined(MERF_CUDA_EMULATION)
  gpu.begin_launch(name);
  // Parameters are copied, as a launch does.
  gpu.enqueue([&gpu, name, kernel, shape, ... parameters = Parameters(std::forward<Arguments>(arguments))] {
    if (!gpu.begin_kernel(name)) return;
    gpu.emulator().run(name, shape.grid, shape.threads, shape.shared, [&] { kernel(parameters...); });
  });
#else
  const void* function = reinterpret_cast<const void*>(kernel);
  if (shape.shared > 48 * 1024) gpu.allow_shared(function, shape.shared);
  std::tuple<Parameters...> parameters(std::forward<Arguments>(arguments)...);
  std::apply(
      [&](auto&... each) {
        void* addresses[] = {static_cast<void*>(&each)..., nullptr};
        gpu.launch(name, function, shape.grid, shape.threads, shape.shared, addresses, shape.overlaps);
      },
      parameters);
#endif
}

// Calls body(T()) with the element type of `dtype`.
template <typename Body>
void with_type(DType dtype, Body&& body) {
  if (dtype == DType::bf16) {
    body(bf16{});
  } else {
    body(float{});
  }
}

}  // namespace merf::cuda
