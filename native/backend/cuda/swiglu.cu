// SwiGLU and its backward: bound by memory, so each thread moves 16 bytes at a time where rows allow it.
#include <algorithm>

#include "backend/cuda/cuda_backend.h"
#include "backend/cuda/launch.h"
#include "backend/cuda/primitives/copy.h"
#include "backend/cuda/sigmoid.h"
#include "backend/cuda/widths.h"

namespace merf::cuda {

namespace {

constexpr int kThreads = 256;  // at most

// Blocks for rows of `size` elements, N to a thread: the grid's x is the row, its y the part of it.
template <int N>
LaunchShape shape_of(int64_t rows, int64_t size) {
  const int64_t parts = std::max<int64_t>(1, divide_up(size, N * kThreads));
  return {blocks(rows, parts), static_cast<int>(round_up(divide_up(size, N * parts), kWarp))};
}

// The thread's first column.
template <int N>
__device__ inline int64_t own_column() {
  return int64_t{blockIdx.y * blockDim.x + threadIdx.x} * N;
}

// gate_up [tokens, 2 * size], y [tokens, size]; one thread for N neighbouring elements of a row.
template <typename T, int N>
__global__ void __launch_bounds__(kThreads) swiglu_kernel(const T* gate_up, T* y, int64_t size) {
  const int64_t row = blockIdx.x, column = own_column<N>();
  if (column >= size) return;
  const auto gate = load_vector<N>(gate_up + row * 2 * size + column);
  const auto up = load_vector<N>(gate_up + row * 2 * size + size + column);
  Vector<T, N> out;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float g = to_f32(gate.at[i]);
    out.at[i] = from_f32<T>(g * sigmoid(g) * to_f32(up.at[i]));
  }
  store_vector<N>(y + row * size + column, out);
}

template <typename T, int N>
__global__ void __launch_bounds__(kThreads)
    swiglu_backward_kernel(const T* dy, const T* gate_up, T* dgate_up, int64_t size) {
  const int64_t row = blockIdx.x, column = own_column<N>();
  if (column >= size) return;
  const int64_t at = row * 2 * size + column;
  const auto gate = load_vector<N>(gate_up + at);
  const auto up = load_vector<N>(gate_up + at + size);
  const auto d = load_vector<N>(dy + row * size + column);
  Vector<T, N> dgate, dup;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float g = to_f32(gate.at[i]), u = to_f32(up.at[i]), dout = to_f32(d.at[i]);
    const float s = sigmoid(g);
    dup.at[i] = from_f32<T>(dout * g * s);
    dgate.at[i] = from_f32<T>(dout * u * s * (1.0f + g * (1.0f - s)));
  }
  store_vector<N>(dgate_up + at, dgate);
  store_vector<N>(dgate_up + at + size, dup);
}

}  // namespace

void CudaBackend::swiglu(const Tensor& gate_up, const Tensor& y) {
  const int64_t tokens = y.shape[0], size = y.row_size();
  with_type(y.dtype, [&](auto type) {
    using T = decltype(type);
    with_width<kVector<T>>(vectors_fit(size, kVector<T>, {gate_up.data, y.data}), [&](auto width) {
      constexpr int kWidth = decltype(width)::value;
      launch(gpu(), "swiglu", swiglu_kernel<T, kWidth>, shape_of<kWidth>(tokens, size), gate_up.as<const T>(),
             y.as<T>(), size);
    });
  });
}

void CudaBackend::swiglu_backward(const Tensor& dy, const Tensor& gate_up, const Tensor& dgate_up) {
  const int64_t tokens = dy.shape[0], size = dy.row_size();
  with_type(dy.dtype, [&](auto type) {
    using T = decltype(type);
    with_width<kVector<T>>(
        vectors_fit(size, kVector<T>, {dy.data, gate_up.data, dgate_up.data}), [&](auto width) {
          constexpr int kWidth = decltype(width)::value;
          launch(gpu(), "swiglu_backward", swiglu_backward_kernel<T, kWidth>, shape_of<kWidth>(tokens, size),
                 dy.as<const T>(), gate_up.as<const T>(), dgate_up.as<T>(), size);
        });
  });
}

}  // namespace merf::cuda
