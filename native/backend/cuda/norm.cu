// RMSNorm in one pass over memory: a row stays in registers from its sum of squares to its output. Narrow
// rows have a warp each, wide ones a block, so that a batch of a few decoding rows still has enough threads.
//
// Backward sums dweight in two steps without atomics: a block keeps its columns of dweight in registers over
// its rows and writes them as one partial; the partials are summed in their order.
#include <algorithm>

#include "backend/cuda/cuda_backend.h"
#include "backend/cuda/launch.h"
#include "backend/cuda/primitives/convert.h"
#include "backend/cuda/primitives/shared.h"
#include "backend/cuda/primitives/warp.h"
#include "backend/cuda/widths.h"

namespace merf::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kHeld = 32;  // elements of a row that a thread holds
constexpr int kHeldBackward = 16;
constexpr int kMaxRow = 512;  // threads for a row
constexpr int kSmallBlock = 128;

// Threads for a row of `size` elements, at least `least`, where each holds `held`.
int row_threads(int64_t size, int held, int least) {
  int threads = least;
  while (threads < kMaxRow && int64_t{threads} * held < size) threads = std::max(2 * threads, kSmallBlock);
  return threads;
}

// Over the threads of a row: a warp or the whole block.
__device__ inline float row_sum(float value, int threads, float* scratch) {
  return threads == kWarp ? warp_sum(value) : block_sum(value, scratch);
}

// x and y [rows, size], weight [size], rstd [rows]; rstd may be null. `threads` threads
// a row, of which each takes N neighbouring elements at a time; rows wider than they can hold are read twice.
template <typename X, typename Y, int N>
__global__ void __launch_bounds__(kMaxRow)
    rms_norm_kernel(const X* x, const float* weight, float epsilon, Y* y, float* rstd, int64_t rows,
                    int64_t size, int threads) {
  SharedMemory shared;
  float* scratch = shared.take<float>(kWarp);
  const int64_t row = grid_index() / threads;
  if (row >= rows) return;  // a whole warp: where blocks have a row each, there are none more
  const int member = thread_index() % threads;
  const int64_t round = int64_t{threads} * kHeld;
  x += row * size;
  y += row * size;

  float held[kHeld / N][N];
  float squares = 0.0f;
  for (int64_t begin = 0; begin < size; begin += round) {
#pragma unroll
    for (int i = 0; i < kHeld / N; ++i) {
      const int64_t at = begin + (int64_t{i} * threads + member) * N;
      if (at >= size) continue;
      load_floats(held[i], x + at);
#pragma unroll
      for (int j = 0; j < N; ++j) squares = fmaf(held[i][j], held[i][j], squares);
    }
  }
  const float mean = row_sum(squares, threads, scratch) / static_cast<float>(size);
  const float scale = 1.0f / sqrtf(mean + epsilon);
  if (rstd != nullptr && member == 0) rstd[row] = scale;
  for (int64_t begin = 0; begin < size; begin += round) {
#pragma unroll
    for (int i = 0; i < kHeld / N; ++i) {
      const int64_t at = begin + (int64_t{i} * threads + member) * N;
      if (at >= size) continue;
      if (size > round) load_floats(held[i], x + at);
      float factor[N];
      load_floats(factor, weight + at);
#pragma unroll
      for (int j = 0; j < N; ++j) factor[j] *= held[i][j] * scale;
      store_floats(y + at, factor);
    }
  }
}

// dx += rstd * (g - x * rstd^2 * mean(g * x)) where g = dy * weight, and partials [blocks, size] = the sums
// over the block's `rows_per_block` rows of dy * x * rstd. A block takes the columns from blockIdx.y * (what
// its threads hold); the mean is over the whole row whichever the columns are.
template <typename X, typename Y, int N>
__global__ void __launch_bounds__(kMaxRow)
    rms_norm_backward_kernel(const Y* dy, const X* x, const float* weight, const float* rstd, X* dx,
                             float* partials, int64_t rows, int64_t size, int64_t rows_per_block) {
  SharedMemory shared;
  float* scratch = shared.take<float>(kWarp);
  const int64_t round = int64_t{thread_count()} * kHeldBackward;
  const int64_t own = int64_t{blockIdx.y} * round;
  const int64_t first = int64_t{blockIdx.x} * rows_per_block;
  const int64_t last = first + rows_per_block < rows ? first + rows_per_block : rows;
  float dweight[kHeldBackward / N][N] = {};
  for (int64_t row = first; row < last; ++row) {
    const Y* dy_row = dy + row * size;
    const X* x_row = x + row * size;
    X* dx_row = dx + row * size;
    const float scale = rstd[row];
    float dot = 0.0f;
    for (int64_t begin = 0; begin < size; begin += round) {
#pragma unroll
      for (int i = 0; i < kHeldBackward / N; ++i) {
        const int64_t at = begin + (int64_t{i} * thread_count() + thread_index()) * N;
        if (at >= size) continue;
        float d[N], v[N], w[N];
        load_floats(d, dy_row + at);
        load_floats(v, x_row + at);
        load_floats(w, weight + at);
#pragma unroll
        for (int j = 0; j < N; ++j) dot = fmaf(d[j] * w[j], v[j], dot);
      }
    }
    const float mean = block_sum(dot, scratch) / static_cast<float>(size);
    const float pull = mean * scale * scale;
#pragma unroll
    for (int i = 0; i < kHeldBackward / N; ++i) {
      const int64_t at = own + (int64_t{i} * thread_count() + thread_index()) * N;
      if (at >= size) continue;
      float d[N], v[N], w[N], out[N];
      load_floats(d, dy_row + at);
      load_floats(v, x_row + at);
      load_floats(w, weight + at);
      load_floats(out, dx_row + at);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        dweight[i][j] = fmaf(d[j] * v[j], scale, dweight[i][j]);
        out[j] = fmaf(fmaf(-v[j], pull, d[j] * w[j]), scale, out[j]);
      }
      store_floats(dx_row + at, out);
    }
  }
#pragma unroll
  for (int i = 0; i < kHeldBackward / N; ++i) {
    const int64_t at = own + (int64_t{i} * thread_count() + thread_index()) * N;
    if (at < size) store_floats(partials + blockIdx.x * size + at, dweight[i]);
  }
}

// sums [size] += the column sums of partials [parts, size]: a block for 32 columns, whose warps take every
// warp_count()-th part.
__global__ void __launch_bounds__(1024)
    add_columns_kernel(const float* partials, float* sums, int64_t parts, int64_t size) {
  SharedMemory shared;
  float* by_warp = shared.take<float>(kWarp * kWarp);
  const int64_t column = int64_t{blockIdx.x} * kWarp + lane_index();
  float sum = 0.0f;
  if (column < size) {
#pragma unroll 4
    for (int64_t part = warp_index(); part < parts; part += warp_count())
      sum += partials[part * size + column];
  }
  by_warp[warp_index() * kWarp + lane_index()] = sum;
  sync_block();
  if (warp_index() == 0 && column < size) {
    float total = 0.0f;
    for (int warp = 0; warp < warp_count(); ++warp) total += by_warp[warp * kWarp + lane_index()];
    sums[column] += total;
  }
}

// x, y [size]; one thread for N neighbouring elements, fewer at the end.
template <typename Y, typename X, int N>
__global__ void __launch_bounds__(kThreads) add_kernel(Y* y, const X* x, int64_t size) {
  const int64_t index = grid_index() * N;
  if (index + N <= size) {
    float sum[N], change[N];
    load_floats(sum, y + index);
    load_floats(change, x + index);
#pragma unroll
    for (int i = 0; i < N; ++i) sum[i] += change[i];
    store_floats(y + index, sum);
  } else {
    for (int64_t i = index; i < size; ++i) y[i] = from_f32<Y>(to_f32(y[i]) + to_f32(x[i]));
  }
}

// Calls body with the types of two tensors.
template <typename Body>
void with_types(DType first, DType second, Body&& body) {
  with_type(first, [&](auto a) { with_type(second, [&](auto b) { body(a, b); }); });
}

}  // namespace

void CudaBackend::rms_norm(const Tensor& x, const Tensor& weight, float epsilon, const Tensor& y,
                           const Tensor& rstd) {
  const int64_t rows = x.shape[0], size = x.row_size();
  const int threads = row_threads(size, kHeld, kWarp);
  const int block = std::max(threads, kSmallBlock);
  with_types(x.dtype, y.dtype, [&](auto x_type, auto y_type) {
    using X = decltype(x_type);
    using Y = decltype(y_type);
    with_width<8>(vectors_fit(size, 8, {x.data, weight.data, y.data}), [&](auto width) {
      launch(gpu(), "rms_norm", rms_norm_kernel<X, Y, decltype(width)::value>,
             {blocks(divide_up(rows * threads, block)), block, shared_bytes<float>(kWarp)}, x.as<const X>(),
             weight.as<const float>(), epsilon, y.as<Y>(), rstd.as<float>(), rows, size, threads);
    });
  });
}

void CudaBackend::rms_norm_backward(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                    const Tensor& rstd, const Tensor& dx, const Tensor& dweight) {
  const int64_t rows = x.shape[0], size = x.row_size();
  if (rows == 0 || size == 0) return;
  // Few rows a block keep the GPU busy in small batches; a bound on the blocks keeps the partials small in
  // large ones.
  const int64_t rows_per_block = std::max<int64_t>(8, divide_up(rows, 1024));
  const int64_t parts = divide_up(rows, rows_per_block);
  const int threads = row_threads(size, kHeldBackward, kSmallBlock);
  const Tensor partials = allocate(DType::f32, {parts, size});
  with_types(x.dtype, dy.dtype, [&](auto x_type, auto y_type) {
    using X = decltype(x_type);
    using Y = decltype(y_type);
    with_width<8>(vectors_fit(size, 8, {dy.data, x.data, weight.data, dx.data}), [&](auto width) {
      launch(gpu(), "rms_norm_backward", rms_norm_backward_kernel<X, Y, decltype(width)::value>,
             {blocks(parts, divide_up(size, int64_t{threads} * kHeldBackward)), threads,
              shared_bytes<float>(kWarp)},
             dy.as<const Y>(), x.as<const X>(), weight.as<const float>(), rstd.as<const float>(), dx.as<X>(),
             partials.as<float>(), rows, size, rows_per_block);
    });
  });
  if (!dweight) return;
  const int warps = static_cast<int>(std::min<int64_t>(parts, 32));
  launch(gpu(), "rms_norm_backward", add_columns_kernel,
         {blocks(divide_up(size, kWarp)), warps * kWarp, shared_bytes<float>(kWarp * kWarp)},
         partials.as<const float>(), dweight.as<float>(), parts, size);
}

void CudaBackend::add(const Tensor& y, const Tensor& x) {
  const int64_t size = y.size();
  with_types(y.dtype, x.dtype, [&](auto y_type, auto x_type) {
    using Y = decltype(y_type);
    using X = decltype(x_type);
    with_width<8>(vectors_fit(8, 8, {y.data, x.data}), [&](auto width) {
      constexpr int kWidth = decltype(width)::value;
      launch(gpu(), "add", add_kernel<Y, X, kWidth>, {blocks(divide_up(size, kWidth * kThreads)), kThreads},
             y.as<Y>(), x.as<const X>(), size);
    });
  });
}

}  // namespace merf::cuda
