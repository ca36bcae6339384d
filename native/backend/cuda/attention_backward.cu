// The gradients of attention. Probabilities are computed again from the scores and lse, so nothing of [T, T] is kept.
// Two passes, each with the sums it makes in registers, so that their order is fixed and nothing is added atomically:
// one over tiles of keys, whose dK and dV sum over the queries that see them and over the query heads of the group;
// one over tiles of queries, whose dQ sums over the keys they see. With P the probabilities and dP = dO V^T,
// dS = P * (dP - rowsum(dO * O)); dV = P^T dO, dK = scale dS^T Q, dQ = scale dS K. The first pass computes the transposed
// P^T and dS^T, which then are the left operands of its products as they stand in registers.
//
// That is 7 products where 5 would do, if the pass over keys made dQ as well. Registers allow it: in
// bfloat16, at head sizes 64 and 128, ptxas needs 255 for sm_90a and spills none. But dQ sums over tiles of
// keys, so its float32 sums would go through memory once a tile, each block waiting for its turn: with
// tiles of 128 keys, 8 bytes for every 512 operations saved, whatever the head size and the mask. At the
// 316 TFLOP/s that an H100 makes here (8192 tokens, 28 heads of 128: 5.3 ms) the two products take 1.5 ms,
// and the 7.5 GB of sums 1.4 ms of all that its second-level cache can move (5.5 TB/s), with dS still to be
// handed round in shared memory. Nothing is left to be won.
//
// Hidden pairs have P = 0 and dS = 0, but their products with what is not finite are NaN: such gradients may spread
// within a tile. They are of no use anyway, since no update is made with any gradient that is not finite.
#include <algorithm>

#include "backend/cuda/attention_hopper.h"
#include "backend/cuda/attention_tiles.h"
#include "backend/cuda/cuda_backend.h"
#include "backend/cuda/launch.h"

namespace merf::cuda {

namespace {

template <typename T>
struct BackwardParameters {
  HeadRows<const T> q, k, v, dout;
  HeadRows<T> dq, dk, dv;
  const float* lse2;             // [q_heads, padded]: lse log2(e); infinity behind the last token
  const float* delta;            // [q_heads, padded]: rowsum(dout * out)
  const int32_t* visible_until;  // [padded]
  AttentionWork work;
  float* partial;  // [slots, kv_heads, 2 (dk, dv), key tile, kHead], for tiles of keys in pieces
  int tokens, padded, group;
  float scale;
};

// ---- rowsum(dout * out)

constexpr int kRowLanes = 8;

// lse [q_heads, tokens]; lse2, delta [q_heads, padded]. Eight lanes a row; rows in the order of memory.
template <typename T>
__global__ void __launch_bounds__(256)
    attention_delta_kernel(HeadRows<const T> dout, HeadRows<const T> out, const float* lse, float* lse2,
                           float* delta, int first_query, int tokens, int padded, int heads) {
  const int64_t row = grid_index() / kRowLanes;
  const int64_t token = row / heads, head = row % heads;
  // The other queries' probabilities are all 0.
  const bool valid = token >= first_query && token < tokens;
  float sum = 0.0f;
  if (valid) {
    const T* a = dout.head(head) + token * dout.stride;
    const T* b = out.head(head) + token * out.stride;
    for (int i = lane_index() % kRowLanes * kVector<T>; i < out.head_size; i += kRowLanes * kVector<T>) {
      const auto left = load_vector<kVector<T>>(a + i), right = load_vector<kVector<T>>(b + i);
#pragma unroll
      for (int j = 0; j < kVector<T>; ++j) sum = fmaf(to_f32(left.at[j]), to_f32(right.at[j]), sum);
    }
  }
  sum = warp_sum(sum, kRowLanes);
  if (token < padded && lane_index() % kRowLanes == 0) {
    lse2[head * padded + token] = valid ? lse[head * tokens + token] * kLog2e : kInfinity;
    delta[head * padded + token] = sum;
  }
}

// ---- dK and dV

// The gradients that a pass over keys makes: registers do not hold both at the largest head size.
enum class Sums { keys, values, both };

template <typename T, int kHead, bool kSmall>
struct KeyCut {
  static constexpr bool kHalf = sizeof(T) == 2;
  static constexpr int kBands = kHalf && kHead <= 64 ? 2 : 1;
  static constexpr int kWarps = kSmall && kHead > 128 ? (kHalf ? 4 : 1) : kHalf&& kHead > 64 ? 8 : 4;
  static constexpr int kThreads = kWarp * kWarps;
  static constexpr int kKeys = kBand * kBands * kWarps;
  static constexpr int kQueries = kSmall        ? (kHalf && kHead <= 96 ? 32 : 16)
                                  : kHead > 128 ? (kHalf ? 32 : 16)
                                                : (kHalf ? 64 : 32);
  static constexpr int kChunk = kHead > 128 ? 16 : std::min(kQueries, 32);  // queries at a time
  static constexpr int kBlocks = kSmall || kWarps == 8 || kHead > 128 ? 1 : 2;
  static constexpr size_t kShared = 2 * tile_bytes<T, kHead>(kKeys) + 2 * tile_bytes<T, kHead>(2 * kQueries);
};

template <typename T, int kHead, bool kSmall, Sums kSums>
__global__ void __launch_bounds__(KeyCut<T, kHead, kSmall>::kThreads, KeyCut<T, kHead, kSmall>::kBlocks)
    attention_backward_keys_kernel(BackwardParameters<T> p) {
  using C = KeyCut<T, kHead, kSmall>;
  constexpr int kBands = C::kBands, kQueries = C::kQueries, kChunk = C::kChunk;
  constexpr int kStage = kQueries * kRow<T, kHead>;
  SharedMemory shared;
  T* keys = shared.take<T>(C::kKeys * kRow<T, kHead>);
  T* values = shared.take<T>(C::kKeys * kRow<T, kHead>);
  T* queries = shared.take<T>(2 * kStage);
  T* douts = shared.take<T>(2 * kStage);
  // lse2 [2 kQueries] is in the margin of `queries`, delta in that of `douts`.

  const int64_t kv_head = blockIdx.x;
  const AttentionPiece piece = p.work.pieces[blockIdx.y];
  const int32_t* entries = p.work.entries + piece.first_entry;
  const int first_key = piece.tile * C::kKeys;
  const int warp_key = warp_index() * kBand * kBands;
  T* own_keys = keys + warp_key * kRow<T, kHead>;
  T* own_values = values + warp_key * kRow<T, kHead>;

  // The unit that is loaded next.
  int64_t head = kv_head * p.group + piece.begin / piece.entries;
  int entry = piece.begin % piece.entries;
  int32_t ahead = entries[entry];
  const auto start = [&](int stage) {
    const int first_query = entry_tile(ahead) * kQueries;
    copy_rows<kHead, kQueries, C::kThreads>(queries + stage * kStage, p.q, head, first_query, p.tokens);
    copy_rows<kHead, kQueries, C::kThreads>(douts + stage * kStage, p.dout, head, first_query, p.tokens);
    constexpr int kVectors = kQueries / 4;
    if (thread_index() < 2 * kVectors) {
      const int at = thread_index() % kVectors * 4;
      const bool first = thread_index() < kVectors;
      copy_async(margin<kHead>(first ? queries : douts, stage * kQueries + at),
                 (first ? p.lse2 : p.delta) + head * p.padded + first_query + at);
    }
    copy_async_commit();
  };
  copy_rows<kHead, C::kKeys, C::kThreads>(keys, p.k, kv_head, first_key, p.tokens);
  copy_rows<kHead, C::kKeys, C::kThreads>(values, p.v, kv_head, first_key, p.tokens);
  start(0);

  Accumulator dkeys[kBands][kHead / 8], dvalues[kBands][kHead / 8];
  int until[kBands][2];
#pragma unroll
  for (int band = 0; band < kBands; ++band) {
#pragma unroll
    for (int n = 0; n < kHead / 8; ++n) dkeys[band][n] = dvalues[band][n] = {};
#pragma unroll
    for (int second = 0; second < 2; ++second)
      until[band][second] = p.visible_until[first_key + warp_key + kBand * band + accumulator_row(second)];
  }

  const float scale2 = p.scale * kLog2e;
#pragma unroll 1
  for (int unit = piece.begin; unit < piece.end; ++unit) {
    const int stage = (unit - piece.begin) % 2;
    const int first_query = entry_tile(ahead) * kQueries;
    const bool partial = entry_partial(ahead);
    copy_async_wait<0>();
    // Behind this barrier the tile is there, and none reads the one before, whose place the next one takes.
    sync_block();
    if (unit + 1 < piece.end) {
      if (++entry == piece.entries) {
        entry = 0;
        ++head;
      }
      ahead = entries[entry];
      start(1 - stage);
    }

#pragma unroll 1
    for (int chunk = 0; chunk < kQueries; chunk += kChunk) {
      const int at = stage * kQueries + chunk;  // in what two stages hold
      Accumulator probabilities[kBands][kChunk / 8], dscores[kBands][kChunk / 8];
      multiply_transposed<kHead, kBands, kChunk>(probabilities, own_keys, queries + at * kRow<T, kHead>);
#pragma unroll
      for (int block = 0; block < kChunk / 8; ++block) {
        const auto row_lse2 = load_vector<2>(margin<kHead>(queries, at + 8 * block + accumulator_column()));
#pragma unroll
        for (int band = 0; band < kBands; ++band) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            float& score = probabilities[band][block].at[i];
            score = fast_exp2(fmaf(score, scale2, -row_lse2.at[i % 2]));
          }
        }
      }
      if (partial) {
#pragma unroll
        for (int band = 0; band < kBands; ++band) {
#pragma unroll
          for (int block = 0; block < kChunk / 8; ++block) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const int key = first_key + warp_key + kBand * band + accumulator_row(i / 2);
              const int query = first_query + chunk + 8 * block + accumulator_column() + i % 2;
              if (!visible(key, query, until[band][i / 2])) probabilities[band][block].at[i] = 0.0f;
            }
          }
        }
      }
      if constexpr (kSums != Sums::values) {
        multiply_transposed<kHead, kBands, kChunk>(dscores, own_values, douts + at * kRow<T, kHead>);
#pragma unroll
        for (int block = 0; block < kChunk / 8; ++block) {
          const auto row_delta = load_vector<2>(margin<kHead>(douts, at + 8 * block + accumulator_column()));
#pragma unroll
          for (int band = 0; band < kBands; ++band) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              float& dscore = dscores[band][block].at[i];
              dscore = probabilities[band][block].at[i] * (dscore - row_delta.at[i % 2]);
            }
          }
        }
      }
      if constexpr (kSums != Sums::keys) {
        multiply_add<kHead, kBands, kChunk>(dvalues, probabilities, douts + at * kRow<T, kHead>);
      }
      if constexpr (kSums != Sums::values) {
        multiply_add<kHead, kBands, kChunk>(dkeys, dscores, queries + at * kRow<T, kHead>);
      }
    }
  }

  const auto finish = [&](const Accumulator(&sums)[kBands][kHead / 8], float scale, int which, T* tile,
                          const HeadRows<T>& to) {
    if (piece.slot < 0) {
      float scales[kBands][2];
#pragma unroll
      for (int band = 0; band < kBands; ++band) scales[band][0] = scales[band][1] = scale;
      store_rows<kHead>(sums, scales, tile, to, kv_head, first_key + warp_key, p.tokens);
      return;
    }
    const int64_t slot = (int64_t{piece.slot} * gridDim.x + kv_head) * 2 + which;
    float* rows = p.partial + (slot * C::kKeys + warp_key) * kHead;
#pragma unroll
    for (int band = 0; band < kBands; ++band) {
#pragma unroll
      for (int block = 0; block < kHead / 8; ++block) {
#pragma unroll
        for (int second = 0; second < 2; ++second) {
          store_pair(
              rows + (kBand * band + accumulator_row(second)) * kHead + 8 * block + accumulator_column(),
              sums[band][block].at[2 * second] * scale, sums[band][block].at[2 * second + 1] * scale);
        }
      }
    }
  };
  if constexpr (kSums != Sums::values) finish(dkeys, p.scale, 0, own_keys, p.dk);
  if constexpr (kSums != Sums::keys) finish(dvalues, 1.0f, 1, own_values, p.dv);
}

// Adds the pieces of tiles of keys. partial: as above; blocks (kv_heads * 2, tiles in pieces, rows of a tile / warps).
template <typename T, int kHead>
__global__ void __launch_bounds__(256)
    attention_sum_kernel(const float* partial, const AttentionSum* sums, HeadRows<T> dk, HeadRows<T> dv,
                         int key_tokens, int tokens) {
  const AttentionSum sum = sums[blockIdx.y];
  const int row = static_cast<int>(blockIdx.z) * warp_count() + warp_index();
  const int64_t token = int64_t{sum.tile} * key_tokens + row;
  if (token >= tokens) return;
  const HeadRows<T>& to = blockIdx.x % 2 == 0 ? dk : dv;
  T* out = to.head(blockIdx.x / 2) + token * to.stride;
  const int64_t step = int64_t{gridDim.x} * key_tokens * kHead;  // from slot to slot
  const float* from = partial + sum.first_slot * step + (int64_t{blockIdx.x} * key_tokens + row) * kHead;
  for (int i = 4 * lane_index(); i < to.head_size; i += 4 * kWarp) {
    Vector<float, 4> total = load_vector<4>(from + i);
    for (int slot = 1; slot < sum.slots; ++slot) {
      const auto next = load_vector<4>(from + slot * step + i);
#pragma unroll
      for (int j = 0; j < 4; ++j) total.at[j] += next.at[j];
    }
    store_pair(out + i, total.at[0], total.at[1]);
    store_pair(out + i + 2, total.at[2], total.at[3]);
  }
}

template <int kHead, typename T>
void add_pieces(CudaBackend& backend, const AttentionSchedule& schedule, const float* partial,
                const HeadRows<T>& dk, const HeadRows<T>& dv, int tokens) {
  constexpr int kThreads = 256;
  launch(backend.gpu(), "attention_sum", attention_sum_kernel<T, kHead>,
         {blocks(2 * schedule.kv_heads, schedule.sums, divide_up(schedule.key_tokens, kThreads / kWarp)),
          kThreads},
         partial, schedule.sum_table.as<const AttentionSum>(), dk, dv, schedule.key_tokens, tokens);
}

// ---- dQ

template <typename T, int kHead, bool kSmall>
struct QueryCut {
  static constexpr bool kHalf = sizeof(T) == 2;
  static constexpr int kBands = kHead <= (kHalf ? 128 : 64) ? 2 : 1;
  static constexpr int kWarps = kHead <= 128 ? 4 : kSmall ? (kHalf ? 4 : 1) : kHalf ? 8 : 4;
  static constexpr int kThreads = kWarp * kWarps;
  static constexpr int kQueries = kBand * kBands * kWarps;
  static constexpr int kKeys = kSmall ? 16 : kHalf ? (kHead <= 64 ? 64 : 32) : kHead > 128 ? 16 : 32;
  static constexpr int kChunk = kHead > 128 ? 16 : std::min(kKeys, 32);  // keys at a time
  static constexpr int kBlocks = kSmall || kHead > 128 ? 1 : kHalf&& kHead <= 64 ? 3 : 2;
  static constexpr size_t kShared = 2 * tile_bytes<T, kHead>(kQueries) + 2 * tile_bytes<T, kHead>(2 * kKeys);
};

template <typename T, int kHead, bool kSmall>
__global__ void __launch_bounds__(QueryCut<T, kHead, kSmall>::kThreads, QueryCut<T, kHead, kSmall>::kBlocks)
    attention_backward_queries_kernel(BackwardParameters<T> p) {
  using C = QueryCut<T, kHead, kSmall>;
  constexpr int kBands = C::kBands, kKeys = C::kKeys, kChunk = C::kChunk;
  constexpr int kStage = kKeys * kRow<T, kHead>;
  SharedMemory shared;
  T* queries = shared.take<T>(C::kQueries * kRow<T, kHead>);
  T* douts = shared.take<T>(C::kQueries * kRow<T, kHead>);
  T* keys = shared.take<T>(2 * kStage);
  T* values = shared.take<T>(2 * kStage);

  const int64_t kv_head = blockIdx.y, head = kv_head * p.group + blockIdx.x;
  const AttentionPiece piece = p.work.pieces[blockIdx.z];
  const int32_t* entries = p.work.entries + piece.first_entry;
  const int first_query = piece.tile * C::kQueries;
  const int warp_query = warp_index() * kBand * kBands;
  T* own_queries = queries + warp_query * kRow<T, kHead>;
  const T* own_douts = douts + warp_query * kRow<T, kHead>;

  int32_t ahead = entries[piece.begin];
  const auto start = [&](int stage) {
    const int first_key = entry_tile(ahead) * kKeys;
    copy_rows<kHead, kKeys, C::kThreads>(keys + stage * kStage, p.k, kv_head, first_key, p.tokens);
    copy_rows<kHead, kKeys, C::kThreads>(values + stage * kStage, p.v, kv_head, first_key, p.tokens);
    copy_async_commit();
  };
  copy_rows<kHead, C::kQueries, C::kThreads>(queries, p.q, head, first_query, p.tokens);
  copy_rows<kHead, C::kQueries, C::kThreads>(douts, p.dout, head, first_query, p.tokens);
  start(0);

  Accumulator dqueries[kBands][kHead / 8];
  float lse2[kBands][2], delta[kBands][2];
#pragma unroll
  for (int band = 0; band < kBands; ++band) {
#pragma unroll
    for (int n = 0; n < kHead / 8; ++n) dqueries[band][n] = {};
#pragma unroll
    for (int second = 0; second < 2; ++second) {
      const int64_t at = head * p.padded + first_query + warp_query + kBand * band + accumulator_row(second);
      lse2[band][second] = p.lse2[at];
      delta[band][second] = p.delta[at];
    }
  }

  const float scale2 = p.scale * kLog2e;
#pragma unroll 1
  for (int n = piece.begin; n < piece.end; ++n) {
    const int stage = (n - piece.begin) % 2;
    const int first_key = entry_tile(ahead) * kKeys;
    const bool partial = entry_partial(ahead);
    copy_async_wait<0>();
    // Behind this barrier the tile is there, and none reads the one before, whose place the next one takes.
    sync_block();
    if (n + 1 < piece.end) {
      ahead = entries[n + 1];
      start(1 - stage);
    }

#pragma unroll 1
    for (int chunk = 0; chunk < kKeys; chunk += kChunk) {
      const int at = (stage * kKeys + chunk) * kRow<T, kHead>;
      Accumulator scores[kBands][kChunk / 8], dscores[kBands][kChunk / 8];
      multiply_transposed<kHead, kBands, kChunk>(scores, own_queries, keys + at);
      multiply_transposed<kHead, kBands, kChunk>(dscores, own_douts, values + at);
#pragma unroll
      for (int band = 0; band < kBands; ++band) {
#pragma unroll
        for (int block = 0; block < kChunk / 8; ++block) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float probability = fast_exp2(fmaf(scores[band][block].at[i], scale2, -lse2[band][i / 2]));
            float& dscore = dscores[band][block].at[i];
            dscore = probability * (dscore - delta[band][i / 2]);
          }
        }
      }
      if (partial) {
#pragma unroll
        for (int block = 0; block < kChunk / 8; ++block) {
          const int key = first_key + chunk + 8 * block + accumulator_column();
          const auto until = load_vector<2>(p.visible_until + key);
#pragma unroll
          for (int band = 0; band < kBands; ++band) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const int query = first_query + warp_query + kBand * band + accumulator_row(i / 2);
              if (!visible(key + i % 2, query, until.at[i % 2])) dscores[band][block].at[i] = 0.0f;
            }
          }
        }
      }
      multiply_add<kHead, kBands, kChunk>(dqueries, dscores, keys + at);
    }
  }

  float scales[kBands][2];
#pragma unroll
  for (int band = 0; band < kBands; ++band) scales[band][0] = scales[band][1] = p.scale;
  store_rows<kHead>(dqueries, scales, own_queries, p.dq, head, first_query + warp_query, p.tokens);
}

template <typename T, int kHead, bool kSmall>
void run_keys(CudaBackend& backend, AttentionPlan& plan, BackwardParameters<T> parameters, int64_t kv_heads) {
  using C = KeyCut<T, kHead, kSmall>;
  const int resident = std::max(resident_blocks(backend.gpu(), C::kShared, C::kBlocks), 1);
  const AttentionSchedule& schedule =
      plan.by_key(backend, C::kQueries, C::kKeys, parameters.group, kv_heads,
                  int64_t{backend.gpu().properties().multiprocessors} * resident);
  const Tensor partial = backend.allocate(DType::f32, {schedule.slots * kv_heads, 2, C::kKeys, kHead});
  parameters.work = AttentionWork(schedule);
  parameters.partial = partial.template as<float>();
  const LaunchShape shape{blocks(kv_heads, schedule.pieces), C::kThreads, C::kShared};
  if constexpr (kHead <= 128) {
    launch(backend.gpu(), "attention_backward_keys",
           attention_backward_keys_kernel<T, kHead, kSmall, Sums::both>, shape, parameters);
  } else {
    launch(backend.gpu(), "attention_backward_keys",
           attention_backward_keys_kernel<T, kHead, kSmall, Sums::keys>, shape, parameters);
    launch(backend.gpu(), "attention_backward_values",
           attention_backward_keys_kernel<T, kHead, kSmall, Sums::values>, shape, parameters);
  }
  add_pieces<kHead>(backend, schedule, parameters.partial, parameters.dk, parameters.dv, parameters.tokens);
}

template <typename T, int kHead, bool kSmall>
void run_queries(CudaBackend& backend, AttentionPlan& plan, BackwardParameters<T> parameters,
                 int64_t kv_heads) {
  using C = QueryCut<T, kHead, kSmall>;
  const AttentionSchedule& schedule = plan.by_query(backend, C::kQueries, C::kKeys);
  parameters.work = AttentionWork(schedule);
  launch(backend.gpu(), "attention_backward_queries", attention_backward_queries_kernel<T, kHead, kSmall>,
         {blocks(parameters.group, kv_heads, schedule.pieces), C::kThreads, C::kShared}, parameters);
}

}  // namespace

void add_attention_pieces(CudaBackend& backend, const AttentionSchedule& schedule, const Tensor& partial,
                          const HeadsView& dk, const HeadsView& dv) {
  const auto add = [&](auto head_size) {
    add_pieces<decltype(head_size)::value>(backend, schedule, partial.as<const float>(), HeadRows<bf16>(dk),
                                           HeadRows<bf16>(dv), static_cast<int>(dk.tokens));
  };
  if (dk.head_size <= 64) {
    add(std::integral_constant<int, 64>{});
  } else {
    add(std::integral_constant<int, 128>{});
  }
}

void CudaBackend::attention_backward(const HeadsView& dout, const HeadsView& q, const HeadsView& k,
                                     const HeadsView& v, const HeadsView& out, const Tensor& lse,
                                     const Tensor&, const std::vector<int32_t>& visible_until_host,
                                     float scale, const HeadsView& dq, const HeadsView& dk,
                                     const HeadsView& dv, int64_t first_query) {
  if (q.tokens == 0) return;
  AttentionPlan& plan = plan_attention(visible_until_host, first_query);
  const int64_t padded = plan.padded_tokens();
  const Tensor rows = allocate(DType::f32, {2, q.heads, padded});
  float* lse2 = rows.as<float>();
  float* delta = lse2 + q.heads * padded;
  const auto tokens = static_cast<int>(q.tokens);
  with_type(q.dtype, [&](auto type) {
    using T = decltype(type);
    constexpr int kThreads = 256;
    launch(gpu(), "attention_delta", attention_delta_kernel<T>,
           {blocks(divide_up(padded * q.heads * kRowLanes, kThreads)), kThreads}, HeadRows<const T>(dout),
           HeadRows<const T>(out), lse.as<const float>(), lse2, delta, static_cast<int>(first_query), tokens,
           static_cast<int>(padded), static_cast<int>(q.heads));
    if (std::is_same_v<T, bf16> &&
        attention_backward_on_hopper(*this, plan, {q, k, v, dout, dq, dk, dv}, lse2, delta, scale)) {
      return;
    }
    const BackwardParameters<T> parameters{HeadRows<const T>(q),
                                           HeadRows<const T>(k),
                                           HeadRows<const T>(v),
                                           HeadRows<const T>(dout),
                                           HeadRows<T>(dq),
                                           HeadRows<T>(dk),
                                           HeadRows<T>(dv),
                                           lse2,
                                           delta,
                                           plan.padded(),
                                           AttentionWork(),
                                           nullptr,
                                           tokens,
                                           static_cast<int>(padded),
                                           static_cast<int>(q.heads / k.heads),
                                           scale};
    with_head_size(q.head_size, [&](auto head_size) {
      constexpr int kHead = decltype(head_size)::value;
      with_cut<KeyCut, T, kHead>(gpu(), [&](auto small) {
        run_keys<T, kHead, decltype(small)::value>(*this, plan, parameters, k.heads);
      });
      with_cut<QueryCut, T, kHead>(gpu(), [&](auto small) {
        run_queries<T, kHead, decltype(small)::value>(*this, plan, parameters, k.heads);
      });
    });
  });
}

}  // namespace merf::cuda
