// Conversion between f32 and bf16: bound by memory, so each thread moves 8 elements at a time.
#include "backend/cuda/cuda_backend.h"
#include "backend/cuda/launch.h"
#include "backend/cuda/primitives/convert.h"
#include "backend/cuda/widths.h"

namespace merf::cuda {

namespace {

constexpr int kThreads = 256;

// from, to [size]; one thread for N neighbouring elements, fewer at the end.
template <typename From, typename To, int N>
__global__ void __launch_bounds__(kThreads) cast_kernel(const From* from, To* to, int64_t size) {
  const int64_t index = grid_index() * N;
  if (index + N <= size) {
    float values[N];
    load_floats(values, from + index);
    store_floats(to + index, values);
  } else {
    for (int64_t i = index; i < size; ++i) to[i] = from_f32<To>(to_f32(from[i]));
  }
}

}  // namespace

void CudaBackend::cast(const Tensor& destination, const Tensor& source) {
  if (destination.dtype == source.dtype) {
    copy(destination, source);
    return;
  }
  const int64_t size = source.size();
  with_width<8>(vectors_fit(8, 8, {destination.data, source.data}), [&](auto width) {
    constexpr int kWidth = decltype(width)::value;
    const LaunchShape shape{blocks(divide_up(size, kWidth * kThreads)), kThreads};
    if (source.dtype == DType::bf16) {
      launch(gpu(), "cast", cast_kernel<bf16, float, kWidth>, shape, source.as<const bf16>(),
             destination.as<float>(), size);
    } else {
      launch(gpu(), "cast", cast_kernel<float, bf16, kWidth>, shape, source.as<const float>(),
             destination.as<bf16>(), size);
    }
  });
}

}  // namespace merf::cuda
