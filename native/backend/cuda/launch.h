// Starting kernels.
#pragma once

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

inline dim3 blocks(int64_t x, int64_t y = 1, int64_t z = 1) {
  return dim3(static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z));
}

// Enqueues the kernel on the GPU's stream. `name` is what errors call it.
template <typename... Parameters, typename... Arguments>
void launch(Gpu& gpu, const char* name, void (*kernel)(Parameters...), const LaunchShape& shape,
            Arguments&&... arguments) {
  static_assert(sizeof...(Parameters) == sizeof...(Arguments));
  if (shape.grid.x == 0 || shape.grid.y == 0 || shape.grid.z == 0) return;
#if defined(MERF_CUDA_EMULATION)
  // Parameters are copied, as a launch does.
  gpu.enqueue([&emulator = gpu.emulator(), name, kernel, shape,
               ... parameters = Parameters(std::forward<Arguments>(arguments))] {
    emulator.run(name, shape.grid, shape.threads, shape.shared, [&] { kernel(parameters...); });
  });
#else
  const void* function = reinterpret_cast<const void*>(kernel);
  if (shape.shared > 48 * 1024) gpu.allow_shared(function, shape.shared);
  std::tuple<Parameters...> parameters(std::forward<Arguments>(arguments)...);
  std::apply(
      [&](auto&... each) {
        void* addresses[] = {static_cast<void*>(&each)..., nullptr};
        cudaLaunchAttribute overlap{};
        overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
        overlap.val.programmaticStreamSerializationAllowed = 1;
        cudaLaunchConfig_t config{};
        config.gridDim = shape.grid;
        config.blockDim = dim3(static_cast<unsigned>(shape.threads));
        config.dynamicSmemBytes = shape.shared;
        config.stream = gpu.stream();
        config.attrs = &overlap;
        config.numAttrs = shape.overlaps && gpu.properties().major >= 9 ? 1 : 0;
        gpu.check_launch(name, cudaLaunchKernelExC(&config, function, addresses));
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
