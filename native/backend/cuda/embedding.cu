// Rows by index, and the sum of gradients back into them.
//
// Backward adds the rows of each id in the order of their tokens, whatever the order in which the GPU gets to them:
// tokens are first listed by id, with integer atomics and hence in any order, then every token finds its rank among
// those of its id by counting, and last one block an id walks its tokens in order.
#include <algorithm>

#include "backend/cuda/cuda_backend.h"
#include "backend/cuda/launch.h"
#include "backend/cuda/primitives/atomic.h"
#include "backend/cuda/primitives/convert.h"
#include "backend/cuda/products.h"
#include "backend/cuda/widths.h"

namespace merf::cuda {

namespace {

constexpr int kThreads = 128;
constexpr int kMaxChunks = 256;  // blocks for one row

// from [any, size], rows [gridDim.x], to [gridDim.x, size].
template <typename From, typename To, int N>
__global__ void __launch_bounds__(kThreads)
    gather_kernel(const From* from, const int32_t* rows, To* to, int64_t size) {
  from += int64_t{rows[blockIdx.x]} * size;
  to += int64_t{blockIdx.x} * size;
  const int64_t step = int64_t{gridDim.y} * thread_count() * N;
  for (int64_t i = (int64_t{blockIdx.y} * thread_count() + thread_index()) * N; i < size; i += step) {
    float values[N];
    load_floats(values, from + i);
    store_floats(to + i, values);
  }
}

// slots[t]: a number of token t among the counts[ids[t]] tokens of its id, in any order. ids, slots [tokens];
// counts [vocabulary], 0 at first.
__global__ void __launch_bounds__(kThreads)
    count_ids_kernel(const int32_t* ids, uint32_t* counts, uint32_t* slots, int64_t tokens) {
  const int64_t token = grid_index();
  if (token < tokens) slots[token] = atomic_add(counts + ids[token], 1u);
}

// starts[id]: where the id's tokens stand in lists of all tokens; `used` is 0 at first.
__global__ void __launch_bounds__(kThreads)
    place_ids_kernel(const int32_t* ids, const uint32_t* counts, const uint32_t* slots, uint32_t* used,
                     uint32_t* starts, int64_t tokens) {
  const int64_t token = grid_index();
  if (token >= tokens || slots[token] != 0) return;
  starts[ids[token]] = atomic_add(used, counts[ids[token]]);
}

// listed [tokens]: the tokens by id, those of one id in any order.
__global__ void __launch_bounds__(kThreads)
    list_tokens_kernel(const int32_t* ids, const uint32_t* starts, const uint32_t* slots, int32_t* listed,
                       int64_t tokens) {
  const int64_t token = grid_index();
  if (token < tokens) listed[starts[ids[token]] + slots[token]] = static_cast<int32_t>(token);
}

// ordered [tokens]: the tokens by id, those of one id rising.
__global__ void __launch_bounds__(kThreads)
    order_tokens_kernel(const int32_t* ids, const uint32_t* counts, const uint32_t* starts,
                        const int32_t* listed, int32_t* ordered, int64_t tokens) {
  const int64_t token = grid_index();
  if (token >= tokens) return;
  const uint32_t count = counts[ids[token]], start = starts[ids[token]];
  uint32_t rank = 0;
#pragma unroll 8
  for (uint32_t i = 0; i < count; ++i) rank += listed[start + i] < token ? 1 : 0;
  ordered[start + rank] = static_cast<int32_t>(token);
}

// dtable[id] += dy[t] over the id's tokens in order, but for those of id `padding`; dy [tokens, size], dtable [vocabulary, size]. The block of the
// token that has its id's slot 0 does it.
template <typename T, int N>
__global__ void __launch_bounds__(kThreads)
    add_rows_kernel(const int32_t* ids, const uint32_t* counts, const uint32_t* starts, const uint32_t* slots,
                    const int32_t* ordered, const T* dy, float* dtable, int64_t size, int32_t padding) {
  constexpr int kAhead = 4;  // rows on their way at a time
  if (slots[blockIdx.x] != 0) return;
  const int32_t id = ids[blockIdx.x];
  if (id == padding) return;
  const int32_t* tokens = ordered + starts[id];
  const int count = static_cast<int>(counts[id]);
  const int64_t step = int64_t{gridDim.y} * thread_count() * N;
  for (int64_t i = (int64_t{blockIdx.y} * thread_count() + thread_index()) * N; i < size; i += step) {
    float sum[N];
    load_floats(sum, dtable + id * size + i);
    int first = 0;
    for (; first + kAhead <= count; first += kAhead) {
      float rows[kAhead][N];
#pragma unroll
      for (int k = 0; k < kAhead; ++k) load_floats(rows[k], dy + tokens[first + k] * size + i);
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
#pragma unroll
        for (int j = 0; j < N; ++j) sum[j] += rows[k][j];
      }
    }
    for (; first < count; ++first) {
      float row[N];
      load_floats(row, dy + tokens[first] * size + i);
#pragma unroll
      for (int j = 0; j < N; ++j) sum[j] += row[j];
    }
    store_floats(dtable + id * size + i, sum);
  }
}

int64_t chunks(int64_t size, int width) {
  return std::min<int64_t>(divide_up(size, int64_t{width} * kThreads), kMaxChunks);
}

template <typename From, typename To>
void gather(Gpu& gpu, const char* name, const Tensor& from, const Tensor& rows, const Tensor& to) {
  const int64_t size = from.row_size();
  constexpr int kWide = std::max(kVector<From>, kVector<To>);
  with_width<kWide>(vectors_fit(size, kWide, {from.data, to.data}), [&](auto width) {
    constexpr int kWidth = decltype(width)::value;
    launch(gpu, name, gather_kernel<From, To, kWidth>, {blocks(rows.size(), chunks(size, kWidth)), kThreads},
           from.as<const From>(), rows.as<const int32_t>(), to.as<To>(), size);
  });
}

}  // namespace

void CudaBackend::gather_rows(const Tensor& x, const Tensor& rows, const Tensor& y) {
  // Bits of one size are as good as another's: what is 4 bytes is copied as float32.
  with_type(x.dtype, [&](auto type) {
    using T = decltype(type);
    gather<T, T>(gpu(), "gather_rows", x, rows, y);
  });
}

void CudaBackend::embedding(const Tensor& ids, const PackedWeight& packed, const Tensor& y) {
  const Tensor& table = static_cast<const CudaPackedWeight&>(packed).values;
  with_type(table.dtype, [&](auto from) {
    with_type(y.dtype,
              [&](auto to) { gather<decltype(from), decltype(to)>(gpu(), "embedding", table, ids, y); });
  });
}

void CudaBackend::embedding_backward(const Tensor& ids, const Tensor& dy, const Tensor& dtable,
                                     int32_t padding) {
  const int64_t tokens = ids.size(), vocabulary = dtable.shape[0], size = dtable.row_size();
  if (tokens == 0 || size == 0) return;
  const Tensor counted = allocate(DType::i32, {vocabulary + 1});  // counts, then how many tokens are placed
  const Tensor starts = allocate(DType::i32, {vocabulary});
  const Tensor by_token = allocate(DType::i32, {3, tokens});
  zero(counted);
  const int32_t* id = ids.as<const int32_t>();
  uint32_t* count = counted.as<uint32_t>();
  uint32_t* start = starts.as<uint32_t>();
  uint32_t* slots = by_token.as<uint32_t>();
  int32_t* listed = by_token.as<int32_t>() + tokens;
  int32_t* ordered = listed + tokens;
  const LaunchShape each_token{blocks(divide_up(tokens, kThreads)), kThreads};
  const char* name = "embedding_backward";
  launch(gpu(), name, count_ids_kernel, each_token, id, count, slots, tokens);
  launch(gpu(), name, place_ids_kernel, each_token, id, count, slots, count + vocabulary, start, tokens);
  launch(gpu(), name, list_tokens_kernel, each_token, id, start, slots, listed, tokens);
  launch(gpu(), name, order_tokens_kernel, each_token, id, count, start, listed, ordered, tokens);
  with_type(dy.dtype, [&](auto type) {
    using T = decltype(type);
    with_width<4>(vectors_fit(size, 4, {dy.data, dtable.data}), [&](auto width) {
      constexpr int kWidth = decltype(width)::value;
      launch(gpu(), name, add_rows_kernel<T, kWidth>, {blocks(tokens, chunks(size, kWidth)), kThreads}, id,
             count, start, slots, ordered, dy.as<const T>(), dtable.as<float>(), size, padding);
    });
  });
}

}  // namespace merf::cuda
