// Decoding against the paged key/value cache.
//
// A run is cut into stretches of kStretch tokens and its rows into tiles: a task. A task gives each of its (row, head)
// pairs a partial softmax (maximum, sum, output), and a second kernel merges a row's in the plan's order. All query
// heads of a key/value head and all rows of a task are one matrix against the stretch's keys, so a page that many rows
// share is read once a tile of kTile pairs. Where there are at most 16 pairs, as in a completion's own pages, a block's
// warps share them: each has some of the keys for the scores and some of the columns for the output. Either way every
// number comes of the same operations in the same order, so what a row gets depends on its own runs alone.
//
// A step is a recording that is played under other plans. So the kernels read everything of the plan from memory that
// stays where it is, and blocks take one item of work after another until there are none.
#include <algorithm>
#include <array>
#include <bit>
#include <limits>

#include "backend/cuda/cache_rows.h"
#include "backend/cuda/cuda_backend.h"
#include "backend/cuda/launch.h"
#include "backend/cuda/primitives/atomic.h"
#include "backend/cuda/primitives/mma.h"
#include "backend/cuda/primitives/overlap.h"
#include "backend/cuda/primitives/shared.h"

namespace merf::cuda {

namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
constexpr int kStretch = 256;   // cached tokens in one partial softmax
constexpr int kTaskRows = 64;   // decoding rows in one task
constexpr int kWarpPairs = 16;  // (row, head) pairs of one product
constexpr int kPage = static_cast<int>(kPageTokens);
static_assert(kStretch % kPage == 0);

// The plan on the device, int32: a header, tasks, where each row's list begins [batch + 1], the lists, rows, pages.
// All positions are from the plan's begin.
constexpr int kClaimed = 0;  // items that blocks took beyond their first; 0 between launches
constexpr int kBatch = 1;    // rows that were planned
constexpr int kBegins = 2;   // position of the lists' begins
constexpr int kAtLeast =
    3;  // [r]: tasks of r rows or more, r from 0 to kTaskRows; the tasks stand in that order
constexpr int kTasks = kAtLeast + kTaskRows + 1;
constexpr int kTaskInts = 5;

struct Task {
  int first_page;  // position
  int tokens;
  int first_row;  // position
  int rows;
  int first_partial;  // the first row's; the others follow
};

// What one block does at a time: the pairs [first, first + count) of a task, in the order of its rows, under one
// key/value head. count is 0 where there is no such item.
struct Item {
  Task task;
  int kv_head;
  int first;
  int count;
};

template <typename T, int kHead>
struct Tiling {
  // Pairs of one block, and keys at a time: as many as fit the 99 KiB that blocks have on small GPUs.
  static constexpr int kTile = sizeof(T) * kHead <= 512 ? kWarps * kWarpPairs : kWarpPairs;
  static_assert(kTaskRows % kTile == 0);
  static constexpr int kKeys = sizeof(T) * kHead <= 256 ? 64 : sizeof(T) * kHead < 512 ? 32 : 16;
  static constexpr int kStride = kHead + kVector<T>;  // of queries, keys and values in shared memory
  static constexpr int kWeightStride = kKeys + kVector<T>;
  static constexpr int kChunks = kKeys / 16;  // of keys, each one warp's where warps share the pairs
  static constexpr int kPairColumns = (kHead / 16 + kWarps - 1) / kWarps;  // of 16: a warp's where they do
  static constexpr size_t kShared =
      2 * shared_bytes<T>(2 * kKeys * kStride) + shared_bytes<T>(kTile * kStride) +
      shared_bytes<T>(kWarpPairs * kWeightStride) + shared_bytes<float>(kChunks * kWarpPairs) +
      shared_bytes<int>(kStretch / kPage) + shared_bytes<Item>(1);
  static_assert(kShared <= kLeastShared);
  // Blocks that a multiprocessor has at once, as registers allow.
  static constexpr int kBlocks = sizeof(T) * kHead <= 192 ? 3 : 2;
};

// Keys and values of one step, [tokens, heads, size], to the pages [pages, heads, kPageTokens, size] of their slots; a
// thread for 16 bytes of each.
template <typename T>
__global__ void __launch_bounds__(256)
    cache_write_kernel(const T* k, int64_t k_stride, const T* v, int64_t v_stride, const int32_t* slots,
                       T* keys, T* values, int64_t tokens, int heads, int size) {
  // Accesses are counted in 32 bits, which divide faster: more of them than that would be of 64 GiB.
  const uint32_t accesses = static_cast<uint32_t>(heads * size / kVector<T>);
  const uint32_t index = blockIdx.x * blockDim.x + threadIdx.x;
  const int64_t token = index / accesses;
  if (token >= tokens) return;
  const int column = static_cast<int>(index % accesses) * kVector<T>, head = column / size;
  const int slot = slots[token];
  if (slot < 0) return;
  const int64_t to = cached_head(slot, heads, head, size) + column % size;
  store_vector<kVector<T>>(keys + to, load_vector<kVector<T>>(k + token * k_stride + column));
  store_vector<kVector<T>>(values + to, load_vector<kVector<T>>(v + token * v_stride + column));
}

// Items by tile: every task has a first one, those whose rows reach further a second one, and so on.
template <int kTile>
__device__ inline Item find_item(const int32_t* plan, int item, int kv_heads, int group) {
  const int kv_head = item % kv_heads;
  int index = item / kv_heads;
  for (int tile = 0; tile < group * (kTaskRows / kTile); ++tile) {
    const int tasks = plan[kAtLeast + tile * kTile / group + 1];
    if (index < tasks) {
      const int32_t* at = plan + kTasks + index * kTaskInts;
      const Task task{at[0], at[1], at[2], at[3], at[4]};
      const int pairs = task.rows * group - tile * kTile;
      return {task, kv_head, tile * kTile, pairs < kTile ? pairs : kTile};
    }
    index -= tasks;
  }
  return {{}, 0, 0, 0};
}

// Two neighbouring numbers, rounded as to_fragment does.
__device__ inline void store_pair(bf16* to, float first, float second) {
  *reinterpret_cast<uint32_t*>(to) = pack_bf16(first, second);
}
__device__ inline void store_pair(float* to, float first, float second) {
  store_vector<2>(to, Vector<float, 2>{{first, second}});
}

__device__ inline void set_ones(FragmentB<bf16>& b) { b.at[0] = b.at[1] = 0x3f803f80u; }
__device__ inline void set_ones(FragmentB<float>& b) {
#pragma unroll
  for (int k = 0; k < 8; ++k) b.at[0][k] = b.at[1][k] = 1.0f;
}

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// Scores [16, 16 * kTwos] of 16 queries and 16 * kTwos keys, times `scale`, and minus infinity from key `keys` on.
template <typename T, int kHead, int kTwos>
__device__ inline void multiply_keys(Accumulator (&scores)[2 * kTwos], const T* queries, const T* tile,
                                     int keys, float scale) {
  constexpr int kStride = Tiling<T, kHead>::kStride;
#pragma unroll
  for (int j = 0; j < 2 * kTwos; ++j) scores[j] = {};
#pragma unroll(sizeof(T) == 2 ? 4 : 1)
  for (int k = 0; k < kHead; k += kDepth<T>) {
    FragmentA<T> a;
    load_a(a, queries + k, kStride);
#pragma unroll
    for (int j = 0; j < kTwos; ++j) {
      FragmentB<T> b[2];
      load_b_transposed(b, tile + 16 * j * kStride + k, kStride);
      mma(scores[2 * j], a, b[0]);
      mma(scores[2 * j + 1], a, b[1]);
    }
  }
#pragma unroll
  for (int j = 0; j < 2 * kTwos; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int key = 8 * j + accumulator_column() + i % 2;
      scores[j].at[i] = key < keys ? scores[j].at[i] * scale : kMinusInfinity;
    }
  }
}

// The greatest score of this lane's two rows.
template <int kTiles>
__device__ inline void row_maxima(const Accumulator (&scores)[kTiles], float (&most)[2]) {
#pragma unroll
  for (int second = 0; second < 2; ++second) {
    most[second] = kMinusInfinity;
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      most[second] = fmaxf(most[second], fmaxf(scores[j].at[2 * second], scores[j].at[2 * second + 1]));
    }
    most[second] = warp_max(most[second], 4);
  }
}

// The softmax so far of 16 pairs, of which this lane has two rows: maxima, sums of weights in column 0 of `sum`, and
// kTiles blocks of 8 columns of the output.
template <int kTiles>
struct Softmax {
  float maximum[2] = {kMinusInfinity, kMinusInfinity};
  float base[2];  // what scores are taken against: the maximum, or 0 where there is none
  Accumulator sum = {};
  Accumulator output[kTiles] = {};

  // Takes in the maxima of further scores.
  __device__ void raise(const float (&most)[2]) {
    float factor[2];
#pragma unroll
    for (int second = 0; second < 2; ++second) {
      const float before = maximum[second];
      maximum[second] = fmaxf(before, most[second]);
      base[second] = maximum[second] == kMinusInfinity ? 0.0f : maximum[second];
      factor[second] = fast_exp2(before - base[second]);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      sum.at[i] *= factor[i / 2];
#pragma unroll
      for (int j = 0; j < kTiles; ++j) output[j].at[i] *= factor[i / 2];
    }
  }
  __device__ float weight(float score, int second) const { return fast_exp2(score - base[second]); }
};

// Where the partial softmax of pair `pair` of the item goes.
__device__ inline int64_t partial_of(const Item& item, int pair, int kv_heads, int group) {
  const int at = item.first + pair;
  return (int64_t{item.task.first_partial + at / group} * kv_heads + item.kv_head) * group + at % group;
}

// q [rows, q_heads, size], q_stride apart; keys, values [pages, kv_heads, kPageTokens, size]; outputs [partials,
// q_heads, size]; statistics [partials, q_heads, 2]: maximum and sum. scale is times log2(e).
template <typename T, int kHead>
__global__ void __launch_bounds__(kThreads, (Tiling<T, kHead>::kBlocks))
    decode_kernel(const T* q, int64_t q_stride, const T* keys, const T* values, int32_t* plan, float* outputs,
                  float* statistics, int kv_heads, int group, int size, float scale) {
  using Sizes = Tiling<T, kHead>;
  constexpr int kTile = Sizes::kTile, kKeys = Sizes::kKeys;
  constexpr int kStride = Sizes::kStride, kWeightStride = Sizes::kWeightStride;
  constexpr int kAccess = kVector<T>, kAccesses = kHead / kAccess;  // of a row
  SharedMemory shared;
  T* const key_tiles = shared.take<T>(2 * kKeys * kStride);
  T* const value_tiles = shared.take<T>(2 * kKeys * kStride);
  T* const queries = shared.take<T>(kTile * kStride);
  T* const weights = shared.take<T>(kWarpPairs * kWeightStride);
  float* const maxima = shared.take<float>(Sizes::kChunks * kWarpPairs);
  int* const pages = shared.take<int>(kStretch / kPage);
  Item& item = *shared.take<Item>(1);
  const int warp = warp_index(), lane = lane_index();

  wait_for_previous();
  let_next_begin();
  if (thread_index() == 0) item = find_item<kTile>(plan, static_cast<int>(blockIdx.x), kv_heads, group);
  sync_block();
  while (item.count > 0) {
    // Asked for now and looked at when this item is done.
    uint32_t claimed = 0;
    if (thread_index() == 0) claimed = atomic_add(reinterpret_cast<uint32_t*>(plan + kClaimed), uint32_t{1});

    const int tokens = item.task.tokens;
    if (thread_index() * kPage < tokens) pages[thread_index()] = plan[item.task.first_page + thread_index()];
    const bool together = kTile == kWarpPairs || item.count <= kWarpPairs;  // all warps on the same pairs
    for (int i = thread_index(); i < (together ? kWarpPairs : kTile) * kAccesses; i += kThreads) {
      const int pair = i / kAccesses, column = i % kAccesses * kAccess;
      const bool valid = pair < item.count && column < size;
      const T* from = q;
      if (valid) {
        const int at = item.first + pair;
        from += plan[item.task.first_row + at / group] * q_stride +
                (item.kv_head * group + at % group) * size + column;
      }
      copy_async(queries + pair * kStride + column, from, valid);
    }
    sync_block();

    const auto load = [&](int first) {
      const int stage = first / kKeys % 2 * kKeys * kStride;
      for (int i = thread_index(); i < kKeys * kAccesses; i += kThreads) {
        const int key = i / kAccesses, column = i % kAccesses * kAccess, token = first + key;
        const bool valid = token < tokens && column < size;
        const int64_t from =
            valid
                ? ((int64_t{pages[token / kPage]} * kv_heads + item.kv_head) * kPage + token % kPage) * size +
                      column
                : 0;
        copy_async(key_tiles + stage + key * kStride + column, keys + from, valid);
        copy_async(value_tiles + stage + key * kStride + column, values + from, valid);
      }
      copy_async_commit();
    };
    // Waits for the keys and values from token `first` on, and asks for those behind.
    const auto arrive = [&](int first) {
      copy_async_wait<0>();
      sync_block();
      if (first + kKeys < tokens) load(first + kKeys);
    };
    FragmentB<T> ones;
    set_ones(ones);

    load(0);
    if (together) {
      constexpr int kMine = Sizes::kPairColumns;
      Softmax<2 * kMine> softmax;
      for (int first = 0; first < tokens; first += kKeys) {
        arrive(first);
        const int stage = first / kKeys % 2 * kKeys * kStride;
        Accumulator scores[2];
        if (warp < Sizes::kChunks) {
          float most[2];
          multiply_keys<T, kHead, 1>(scores, queries, key_tiles + stage + 16 * warp * kStride,
                                     tokens - first - 16 * warp, scale);
          row_maxima(scores, most);
          if (lane % 4 == 0) {
            maxima[warp * kWarpPairs + accumulator_row(0)] = most[0];
            maxima[warp * kWarpPairs + accumulator_row(1)] = most[1];
          }
        }
        sync_block();
        float most[2];
#pragma unroll
        for (int second = 0; second < 2; ++second) {
          most[second] = maxima[accumulator_row(second)];
#pragma unroll
          for (int i = 1; i < Sizes::kChunks; ++i) {
            most[second] = fmaxf(most[second], maxima[i * kWarpPairs + accumulator_row(second)]);
          }
        }
        softmax.raise(most);
        if (warp < Sizes::kChunks) {
#pragma unroll
          for (int j = 0; j < 2; ++j) {
#pragma unroll
            for (int second = 0; second < 2; ++second) {
              store_pair(weights + accumulator_row(second) * kWeightStride + 16 * warp + 8 * j +
                             accumulator_column(),
                         softmax.weight(scores[j].at[2 * second], second),
                         softmax.weight(scores[j].at[2 * second + 1], second));
            }
          }
        }
        sync_block();
#pragma unroll(sizeof(T) == 2 ? 4 : 1)
        for (int k = 0; k < kKeys; k += kDepth<T>) {
          FragmentA<T> a;
          load_a(a, weights + k, kWeightStride);
          mma(softmax.sum, a, ones);
#pragma unroll
          for (int j = 0; j < kMine; ++j) {
            const int columns = 16 * (warp + kWarps * j);
            if (columns >= kHead) break;
            FragmentB<T> b[2];
            load_b(b, value_tiles + stage + k * kStride + columns, kStride);
            mma(softmax.output[2 * j], a, b[0]);
            mma(softmax.output[2 * j + 1], a, b[1]);
          }
        }
      }
#pragma unroll
      for (int second = 0; second < 2; ++second) {
        const int pair = accumulator_row(second);
        if (pair >= item.count) continue;
        const int64_t to = partial_of(item, pair, kv_heads, group);
#pragma unroll
        for (int j = 0; j < 2 * kMine; ++j) {
          const int column = 16 * (warp + kWarps * (j / 2)) + j % 2 * 8 + accumulator_column();
          if (column < size) {
            store_pair(outputs + to * size + column, softmax.output[j].at[2 * second],
                       softmax.output[j].at[2 * second + 1]);
          }
        }
        if (warp == 0 && lane % 4 == 0) {
          store_pair(statistics + 2 * to, softmax.maximum[second], softmax.sum.at[2 * second]);
        }
      }
    } else {
      const bool idle = warp * kWarpPairs >= item.count;
      Softmax<kHead / 8> softmax;
      for (int first = 0; first < tokens; first += kKeys) {
        arrive(first);
        if (idle) continue;
        const int stage = first / kKeys % 2 * kKeys * kStride;
        Accumulator scores[kKeys / 8];
        multiply_keys<T, kHead, kKeys / 16>(scores, queries + warp * kWarpPairs * kStride, key_tiles + stage,
                                            tokens - first, scale);
        float most[2];
        row_maxima(scores, most);
        softmax.raise(most);
#pragma unroll
        for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
          for (int i = 0; i < 4; ++i) scores[j].at[i] = softmax.weight(scores[j].at[i], i / 2);
        }
#pragma unroll
        for (int k = 0; k < kKeys; k += kDepth<T>) {
          FragmentA<T> a;
          to_fragment(a, scores + k / 8);
          mma(softmax.sum, a, ones);
#pragma unroll
          for (int j = 0; j < kHead / 16; ++j) {
            FragmentB<T> b[2];
            load_b(b, value_tiles + stage + k * kStride + 16 * j, kStride);
            mma(softmax.output[2 * j], a, b[0]);
            mma(softmax.output[2 * j + 1], a, b[1]);
          }
        }
      }
#pragma unroll
      for (int second = 0; second < 2; ++second) {
        const int pair = warp * kWarpPairs + accumulator_row(second);
        if (pair >= item.count) continue;
        const int64_t to = partial_of(item, pair, kv_heads, group);
#pragma unroll
        for (int j = 0; j < kHead / 8; ++j) {
          const int column = 8 * j + accumulator_column();
          if (column < size) {
            store_pair(outputs + to * size + column, softmax.output[j].at[2 * second],
                       softmax.output[j].at[2 * second + 1]);
          }
        }
        if (lane % 4 == 0) {
          store_pair(statistics + 2 * to, softmax.maximum[second], softmax.sum.at[2 * second]);
        }
      }
    }

    sync_block();
    if (thread_index() == 0)
      item = find_item<kTile>(plan, static_cast<int>(gridDim.x + claimed), kv_heads, group);
    sync_block();
  }
}

// outputs, statistics: as above; out [rows, heads, size], out_stride apart. A warp for one row's head.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    merge_kernel(int32_t* plan, const float* outputs, const float* statistics, T* out, int64_t out_stride,
                 int64_t rows, int heads, int size) {
  wait_for_previous();
  let_next_begin();
  if (grid_index() == 0) plan[kClaimed] = 0;
  const int64_t index = grid_index() / kWarp;
  const int64_t row = index / heads;
  const int head = static_cast<int>(index % heads);
  if (row >= rows || row >= plan[kBatch]) return;
  const int32_t* begins = plan + plan[kBegins];
  const int begin = begins[row], end = begins[row + 1];
  if (begin == end) return;

  float most = kMinusInfinity;
  for (int i = begin + lane_index(); i < end; i += kWarp) {
    most = fmaxf(most, statistics[2 * (int64_t{plan[i]} * heads + head)]);
  }
  most = warp_max(most);
  if (most == kMinusInfinity) most = 0.0f;

  constexpr int kAccess = 4, kMost = 256 / (kAccess * kWarp);  // accesses a lane, for the largest head
  Vector<float, kAccess> output[kMost] = {};
  float sum = 0.0f;
#pragma unroll 4
  for (int i = begin; i < end; ++i) {
    const int64_t from = int64_t{plan[i]} * heads + head;
    const auto statistic = load_vector<2>(statistics + 2 * from);
    const float factor = fast_exp2(statistic.at[0] - most);
    sum = fmaf(factor, statistic.at[1], sum);
#pragma unroll
    for (int j = 0; j < kMost; ++j) {
      const int column = kAccess * (lane_index() + kWarp * j);
      if (column >= size) continue;
      const auto x = load_vector<kAccess>(outputs + from * size + column);
#pragma unroll
      for (int d = 0; d < kAccess; ++d) output[j].at[d] = fmaf(factor, x.at[d], output[j].at[d]);
    }
  }
  const float scale = 1.0f / sum;
#pragma unroll
  for (int j = 0; j < kMost; ++j) {
    const int column = kAccess * (lane_index() + kWarp * j);
    if (column >= size) continue;
    Vector<T, kAccess> rounded;
#pragma unroll
    for (int d = 0; d < kAccess; ++d) rounded.at[d] = from_f32<T>(output[j].at[d] * scale);
    store_vector<kAccess>(out + row * out_stride + int64_t{head} * size + column, rounded);
  }
}

// Calls body(the head size that tiles are made for).
template <typename Body>
void with_head(int64_t size, Body&& body) {
  if (size <= 64) {
    body(std::integral_constant<int, 64>{});
  } else if (size <= 96) {
    body(std::integral_constant<int, 96>{});
  } else if (size <= 128) {
    body(std::integral_constant<int, 128>{});
  } else {
    body(std::integral_constant<int, 256>{});
  }
}

// Rows are moved by 16 bytes.
void check_view(const char* name, const HeadsView& x) {
  const auto misaligned = [&](int64_t bytes) { return bytes % 16 != 0; };
  const int64_t element = static_cast<int64_t>(size_of(x.dtype));
  if (x.head_size % 8 != 0 || x.head_size > 256) {
    throw Error("INTERNAL", std::string("Expected a head size that is a multiple of 8 and at most 256 for ") +
                                name + " but received " + std::to_string(x.head_size));
  }
  if (misaligned(x.row_stride * element) ||
      misaligned(static_cast<int64_t>(reinterpret_cast<uintptr_t>(x.data)))) {
    throw Error("INTERNAL", std::string("Expected rows that begin at multiples of 16 bytes for ") + name);
  }
}

}  // namespace

struct DecodeWork {
  Tensor transfer;  // [its capacity] i32: inputs of the step, then the plan
  Tensor partials;  // [partial_capacity, the width they were made for] f32
  int64_t partial_capacity = 0;
  int64_t begin = 0;              // the plan's position
  std::vector<int32_t> host;      // what was uploaded last
  std::vector<int32_t> position;  // [batch] while it is laid out

  int32_t* plan() const { return transfer.as<int32_t>() + begin; }
  // Lays out the plan in `host` from `begin` on; the number of partial softmaxes of a head.
  int64_t lay_out(const DecodePlan& plan, int64_t batch);
};

int64_t DecodeWork::lay_out(const DecodePlan& from, int64_t batch) {
  // Tasks in falling order of their rows, then of their work, so that what ends last is small.
  constexpr int kShare = kStretch / 4;
  const auto bucket = [](int32_t rows, int32_t tokens) {
    return static_cast<size_t>((kTaskRows - rows) * 4 + 3 - (tokens - 1) / kShare);
  };
  const auto each_task = [&](const DecodeRun& run, const auto& body) {
    for (int32_t token = 0; token < run.tokens; token += kStretch) {
      for (int32_t row = 0; row < run.row_count; row += kTaskRows) {
        body(token, std::min(kStretch, run.tokens - token), row, std::min(kTaskRows, run.row_count - row));
      }
    }
  };
  std::array<int32_t, 4 * kTaskRows + 1> task_position{};  // of the next task of each bucket
  position.assign(static_cast<size_t>(batch), 0);
  int32_t partials = 0;
  for (const DecodeRun& run : from.runs) {
    each_task(run, [&](int32_t, int32_t tokens, int32_t, int32_t rows) {
      ++task_position[bucket(rows, tokens) + 1];
    });
    const int32_t stretches = (run.tokens + kStretch - 1) / kStretch;
    for (int32_t r = 0; r < run.row_count; ++r) {
      position[static_cast<size_t>(from.rows[static_cast<size_t>(run.first_row + r)])] += stretches;
    }
    partials += stretches * run.row_count;
  }
  for (size_t i = 1; i < task_position.size(); ++i) task_position[i] += task_position[i - 1];
  const int32_t tasks = task_position.back();

  const int32_t begins = kTasks + tasks * kTaskInts, lists = begins + static_cast<int32_t>(batch) + 1;
  const int32_t rows_at = lists + partials, pages_at = rows_at + static_cast<int32_t>(from.rows.size());
  this->host.resize(static_cast<size_t>(begin + pages_at) + from.pages.size());
  int32_t* const host = this->host.data() + begin;
  host[kClaimed] = 0;
  host[kBatch] = static_cast<int32_t>(batch);
  host[kBegins] = begins;
  for (int32_t r = 0; r <= kTaskRows; ++r) {
    host[static_cast<size_t>(kAtLeast + r)] =
        task_position[static_cast<size_t>(4 * (kTaskRows - std::max(r, 1) + 1))];
  }
  int32_t next = lists;
  for (int64_t row = 0; row < batch; ++row) {
    const size_t at = static_cast<size_t>(row);
    host[static_cast<size_t>(begins) + at] = next;
    next += position[at];
    position[at] = host[static_cast<size_t>(begins) + at];
  }
  host[static_cast<size_t>(begins + batch)] = next;
  std::copy(from.rows.begin(), from.rows.end(), host + rows_at);
  std::copy(from.pages.begin(), from.pages.end(), host + pages_at);

  int32_t partial = 0;
  for (const DecodeRun& run : from.runs) {
    each_task(run, [&](int32_t token, int32_t tokens, int32_t row, int32_t rows) {
      const std::array<int32_t, kTaskInts> task{pages_at + run.first_page + token / kPage, tokens,
                                                rows_at + run.first_row + row, rows, partial};
      const int32_t index = task_position[bucket(rows, tokens)]++;
      std::copy(task.begin(), task.end(), host + kTasks + index * kTaskInts);
      for (int32_t r = 0; r < rows; ++r) {
        const int32_t owner = from.rows[static_cast<size_t>(run.first_row + row + r)];
        host[static_cast<size_t>(position[static_cast<size_t>(owner)]++)] = partial++;
      }
    });
  }
  return partials;
}

void CudaBackend::cache_write(const HeadsView& k, const HeadsView& v, const Tensor& slots,
                              const PagedLayer& cache) {
  check_view("k", k);
  check_view("v", v);
  with_type(k.dtype, [&](auto type) {
    using T = decltype(type);
    const int64_t accesses = k.tokens * k.heads * k.head_size / kVector<T>;
    launch(gpu(), "cache_write", cache_write_kernel<T>, {blocks(divide_up(accesses, 256)), 256},
           static_cast<const T*>(k.data), k.row_stride, static_cast<const T*>(v.data), v.row_stride,
           slots.as<const int32_t>(), cache.keys.as<T>(), cache.values.as<T>(), k.tokens,
           static_cast<int>(k.heads), static_cast<int>(k.head_size));
  });
}

Tensor CudaBackend::plan_decode(const DecodePlan& plan, int64_t batch, const std::vector<int32_t>& inputs) {
  if (!decode_) decode_ = std::make_shared<DecodeWork>();
  DecodeWork& work = *decode_;
  const int64_t count = static_cast<int64_t>(inputs.size());
  work.begin = round_up(count, 64);
  work.host.assign(inputs.begin(), inputs.end());
  const int64_t partials = work.lay_out(plan, batch);
  const auto grown = [](int64_t needed) {
    return static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(std::max<int64_t>(needed, 1024))));
  };
  const int64_t ints = static_cast<int64_t>(work.host.size());
  if (!work.transfer || ints > work.transfer.size()) {
    ++recording_generation_;
    work.transfer = Tensor();
    work.transfer = allocate(DType::i32, {grown(2 * ints)});
  }
  if (partials > work.partial_capacity || work.partial_capacity == 0) {
    ++recording_generation_;
    const int64_t width = work.partials.row_size();
    work.partials = Tensor();
    work.partial_capacity = grown(partials);
    if (width > 0) work.partials = allocate(DType::f32, {work.partial_capacity, width});
  }
  upload(work.transfer, work.host.data(), work.host.size() * sizeof(int32_t));
  return work.transfer.rows(0, count);
}

void CudaBackend::attention_decode(const HeadsView& q, const PagedLayer& cache, float scale,
                                   const HeadsView& out) {
  // Nothing here may depend on what was planned but where it lies: the launches are played again under other plans.
  if (!decode_ || !decode_->transfer || q.tokens == 0) return;
  check_view("q", q);
  check_view("out", out);
  DecodeWork& work = *decode_;
  const int64_t width = q.heads * (q.head_size + 2);
  if (!work.partials || work.partials.row_size() < width) {
    ++recording_generation_;
    work.partials = Tensor();
    work.partials = allocate(DType::f32, {work.partial_capacity, width});
  }
  float* const outputs = work.partials.as<float>();
  float* const statistics = outputs + work.partial_capacity * q.heads * q.head_size;
  const int kv_heads = static_cast<int>(cache.keys.shape[1]), heads = static_cast<int>(q.heads);
  const int size = static_cast<int>(q.head_size);
  int32_t* const plan = work.plan();
  with_type(q.dtype, [&](auto type) {
    using T = decltype(type);
    with_head(size, [&](auto head) {
      using Sizes = Tiling<T, decltype(head)::value>;
      // No more blocks than run at once: another would begin, with its first item, when all others are taken.
      const int resident = std::max(resident_blocks(gpu(), Sizes::kShared, Sizes::kBlocks), 1);
      launch(gpu(), "attention_decode", decode_kernel<T, decltype(head)::value>,
             {blocks(gpu().properties().multiprocessors * resident), kThreads, Sizes::kShared, true},
             static_cast<const T*>(q.data), q.row_stride, cache.keys.as<const T>(),
             cache.values.as<const T>(), plan, outputs, statistics, kv_heads, heads / kv_heads, size,
             scale * kLog2e);
    });
    launch(gpu(), "attention_decode_merge", merge_kernel<T>,
           {blocks(divide_up(q.tokens * heads, kWarps)), kThreads, 0, true}, plan, outputs, statistics,
           static_cast<T*>(out.data), out.row_stride, q.tokens, heads, size);
  });
}

}  // namespace merf::cuda
