// Conversion between f32 and bf16, and between a f32 and its halves: bound by memory, so each thread moves 8 elements at
// a time.
#include "backend/cuda/cuda_backend.h"
#include "backend/cuda/launch.h"
#include "backend/cuda/primitives/convert.h"
#include "backend/cuda/widths.h"
#include "backend/halves.h"

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

// master, weight, lower [size], as cast_kernel.
template <int N>
__global__ void __launch_bounds__(kThreads)
    split_master_kernel(const float* master, bf16* weight, LowerHalf* lower, int64_t size) {
  const int64_t index = grid_index() * N;
  if (index + N <= size) {
    float values[N];
    load_floats(values, master + index);
    store_floats(weight + index, values);
    Vector<LowerHalf, N> below;
#pragma unroll
    for (int i = 0; i < N; ++i) below.at[i] = lower_half(values[i]);
    store_vector<N>(lower + index, below);
  } else {
    for (int64_t i = index; i < size; ++i) {
      weight[i] = to_bf16(master[i]);
      lower[i] = lower_half(master[i]);
    }
  }
}

template <int N>
__global__ void __launch_bounds__(kThreads)
    join_master_kernel(const bf16* weight, const LowerHalf* lower, float* master, int64_t size) {
  const int64_t index = grid_index() * N;
  if (index + N <= size) {
    const Vector<bf16, N> above = load_vector<N>(weight + index);
    const Vector<LowerHalf, N> below = load_vector<N>(lower + index);
    float values[N];
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] = join_halves(above.at[i], below.at[i]);
    store_floats(master + index, values);
  } else {
    for (int64_t i = index; i < size; ++i) master[i] = join_halves(weight[i], lower[i]);
  }
}

// Calls body(elements a thread, launch shape) with as many as the addresses allow.
template <typename Body>
void by_width(int64_t size, std::initializer_list<const void*> addresses, Body&& body) {
  with_width<8>(vectors_fit(8, 8, addresses), [&](auto width) {
    body(width, LaunchShape{blocks(divide_up(size, decltype(width)::value * kThreads)), kThreads});
  });
}

}  // namespace

void CudaBackend::split_master(const Tensor& master, const Tensor& weight, const Tensor& lower) {
  by_width(master.size(), {master.data, weight.data, lower.data}, [&](auto width, const LaunchShape& shape) {
    launch(gpu(), "split_master", split_master_kernel<decltype(width)::value>, shape,
           master.as<const float>(), weight.as<bf16>(), lower.as<LowerHalf>(), master.size());
  });
}

void CudaBackend::join_master(const Tensor& weight, const Tensor& lower, const Tensor& master) {
  by_width(master.size(), {master.data, weight.data, lower.data}, [&](auto width, const LaunchShape& shape) {
    launch(gpu(), "join_master", join_master_kernel<decltype(width)::value>, shape, weight.as<const bf16>(),
           lower.as<const LowerHalf>(), master.as<float>(), master.size());
  });
}

void CudaBackend::cast(const Tensor& destination, const Tensor& source) {
  if (destination.dtype == source.dtype) {
    copy(destination, source);
    return;
  }
  const int64_t size = source.size();
  by_width(size, {destination.data, source.data}, [&](auto width, const LaunchShape& shape) {
    constexpr int kWidth = decltype(width)::value;
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
