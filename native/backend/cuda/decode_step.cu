// What a decoding step does before and behind the model: it finds out which tokens it is fed, so that it can be enqueued
// before the host knows them, and puts what is kept of it into its place, so that the model's own kernels write to the
// same memory at every step and can be recorded.
#include <algorithm>

#include "backend/cuda/cuda_backend.h"
#include "backend/cuda/launch.h"
#include "backend/cuda/primitives/copy.h"
#include "backend/cuda/widths.h"

namespace merf::cuda {

namespace {

constexpr int kThreads = 128;
constexpr int kCopies = 128;    // in one launch, whose parameters may have 4 KiB
constexpr int kMaxBlocks = 64;  // for one copy
constexpr int kUnrolled = 4;    // accesses of a thread that are on their way at a time

// sources, ids [count]; drawn [any].
__global__ void __launch_bounds__(kThreads)
    next_tokens_kernel(const int32_t* drawn, const int32_t* sources, int32_t* ids, int64_t count) {
  const int64_t row = grid_index();
  if (row >= count) return;
  const int32_t source = sources[row];
  ids[row] = source < 0 ? -1 - source : drawn[source];
}

struct Copy {
  const void* from;
  void* to;
  int64_t row;  // bytes
};
struct Copies {
  Copy at[kCopies];
};
static_assert(sizeof(Copies) <= 3 << 10);

// Blocks (x, i) copy place[1] rows of copies.at[i].from to row place[0] of its `to`, N elements of T at a time.
template <typename T, int N>
__global__ void __launch_bounds__(kThreads)
    store_rows_kernel(const __grid_constant__ Copies copies, const int32_t* place) {
  const Copy& copy = copies.at[blockIdx.y];
  const int64_t row = copy.row / static_cast<int64_t>(sizeof(T)), size = place[1] * row;
  const T* from = static_cast<const T*>(copy.from);
  T* to = static_cast<T*>(copy.to) + place[0] * row;
  const int64_t step = int64_t{gridDim.x} * kThreads * N;
  int64_t i = (int64_t{blockIdx.x} * kThreads + thread_index()) * N;
  for (; i + (kUnrolled - 1) * step < size; i += kUnrolled * step) {
    Vector<T, N> vectors[kUnrolled];
#pragma unroll
    for (int k = 0; k < kUnrolled; ++k) vectors[k] = load_vector<N>(from + i + k * step);
#pragma unroll
    for (int k = 0; k < kUnrolled; ++k) store_vector<N>(to + i + k * step, vectors[k]);
  }
  for (; i < size; i += step) store_vector<N>(to + i, load_vector<N>(from + i));
}

}  // namespace

void CudaBackend::next_tokens(const Tensor& drawn, const Tensor& sources, const Tensor& ids) {
  const int64_t count = sources.size();
  launch(gpu(), "next_tokens", next_tokens_kernel, {blocks(divide_up(count, kThreads)), kThreads},
         drawn.as<const int32_t>(), sources.as<const int32_t>(), ids.as<int32_t>(), count);
}

void CudaBackend::store_rows(const std::vector<RowsCopy>& copies, const Tensor& place) {
  for (size_t first = 0; first < copies.size(); first += kCopies) {
    const size_t count = std::min<size_t>(kCopies, copies.size() - first);
    Copies table{};
    bool wide = true;
    int64_t most = 0;  // bytes of one copy
    for (size_t i = 0; i < count; ++i) {
      const auto& [from, to] = copies[first + i];
      const int64_t row = from.row_size() * static_cast<int64_t>(size_of(from.dtype));
      table.at[i] = {from.data, to.data, row};
      wide = wide && vectors_fit(row, 16, {from.data, to.data});
      most = std::max(most, static_cast<int64_t>(from.bytes()));
    }
    // Whatever the type: bits of one size are as good as another's.
    const auto run = [&](auto type, auto width) {
      using T = decltype(type);
      constexpr int kWidth = decltype(width)::value;
      const int64_t at_once = kThreads * kUnrolled * kWidth * static_cast<int64_t>(sizeof(T));
      launch(gpu(), "store_rows", store_rows_kernel<T, kWidth>,
             {blocks(std::min<int64_t>(divide_up(most, at_once), kMaxBlocks), static_cast<int64_t>(count)),
              kThreads},
             table, place.as<const int32_t>());
    };
    if (wide) {
      run(uint32_t{}, std::integral_constant<int, 4>{});
    } else {
      run(uint16_t{}, std::integral_constant<int, 1>{});
    }
  }
}

}  // namespace merf::cuda
