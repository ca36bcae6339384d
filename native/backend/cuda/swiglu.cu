// SwiGLU and its backward: bound by memory, so each thread moves 16 bytes at a time where rows allow it.
#include "backend/cuda/cuda_backend.h"
#include "backend/cuda/launch.h"
#include "backend/cuda/primitives/copy.h"
#include "backend/cuda/primitives/math.h"
#include "backend/cuda/widths.h"

namespace merf::cuda {

namespace {

constexpr int kThreads = 256;

__device__ inline float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// gate_up [tokens, 2 * size], y [tokens, size]; one thread for N neighbouring elements of a row.
template <typename T, int N>
__global__ void __launch_bounds__(kThreads)
    swiglu_kernel(const T* gate_up, T* y, int64_t tokens, int64_t size) {
  const int64_t index = grid_index() * N;
  if (index >= tokens * size) return;
  const int64_t row = index / size, column = index % size;
  const auto gate = load_vector<N>(gate_up + row * 2 * size + column);
  const auto up = load_vector<N>(gate_up + row * 2 * size + size + column);
  Vector<T, N> out;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float g = to_f32(gate.at[i]);
    out.at[i] = from_f32<T>(g * sigmoid(g) * to_f32(up.at[i]));
  }
  store_vector<N>(y + index, out);
}

template <typename T, int N>
__global__ void __launch_bounds__(kThreads)
    swiglu_backward_kernel(const T* dy, const T* gate_up, T* dgate_up, int64_t tokens, int64_t size) {
  const int64_t index = grid_index() * N;
  if (index >= tokens * size) return;
  const int64_t row = index / size, column = index % size;
  const int64_t at = row * 2 * size + column;
  const auto gate = load_vector<N>(gate_up + at);
  const auto up = load_vector<N>(gate_up + at + size);
  const auto d = load_vector<N>(dy + index);
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
      launch(gpu(), "swiglu", swiglu_kernel<T, kWidth>,
             {blocks(divide_up(tokens * size, kWidth * kThreads)), kThreads}, gate_up.as<const T>(),
             y.as<T>(), tokens, size);
    });
  });
}

void CudaBackend::swiglu_backward(const Tensor& dy, const Tensor& gate_up, const Tensor& dgate_up) {
  const int64_t tokens = dy.shape[0], size = dy.row_size();
  with_type(dy.dtype, [&](auto type) {
    using T = decltype(type);
    with_width<kVector<T>>(vectors_fit(size, kVector<T>, {dy.data, gate_up.data, dgate_up.data}),
                           [&](auto width) {
                             constexpr int kWidth = decltype(width)::value;
                             launch(gpu(), "swiglu_backward", swiglu_backward_kernel<T, kWidth>,
                                    {blocks(divide_up(tokens * size, kWidth * kThreads)), kThreads},
                                    dy.as<const T>(), gate_up.as<const T>(), dgate_up.as<T>(), tokens, size);
                           });
  });
}

}  // namespace merf::cuda
