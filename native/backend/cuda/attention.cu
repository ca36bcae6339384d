// Attention over the token forest, blockwise with a running softmax, as in FlashAttention (Dao 2023): memory is linear
// in tokens, and of the scores only a tile exists at a time, in registers. A block of threads has one tile of queries
// of one head and walks over the tiles of keys on its list (attention_plan.h): what the forest hides is never loaded,
// and what it does not hide is not masked. The next tile of keys and values arrives while one is worked on.
#include <algorithm>
#include <cfloat>

#include "backend/cuda/attention_hopper.h"
#include "backend/cuda/attention_tiles.h"
#include "backend/cuda/cuda_backend.h"
#include "backend/cuda/launch.h"

namespace merf::cuda {

namespace {

// A warp with two bands of queries reads keys and values from shared memory half as often for the same
// products; registers allow it up to head size 128.
template <typename T, int kHead, bool kSmall>
struct Cut {
  static constexpr bool kHalf = sizeof(T) == 2;
  static constexpr int kBands = kHead <= (kHalf ? 128 : 64) ? 2 : 1;
  static constexpr int kWarps = kHead <= 128 ? 4 : kHalf ? 8 : kSmall ? 2 : 4;
  static constexpr int kThreads = kWarp * kWarps;
  static constexpr int kQueries = kBand * kBands * kWarps;
  static constexpr int kKeys = kSmall ? (kHead > 128 ? 16 : 32) : kHalf ? 64 : 32;
  static constexpr int kBlocks = kHead > 128           ? 1
                                 : kHalf&& kHead <= 64 ? 3
                                                       : 2;  // on a multiprocessor at once
  static constexpr size_t kShared = tile_bytes<T, kHead>(kQueries) + 2 * tile_bytes<T, kHead>(2 * kKeys);
};

template <typename T>
struct ForwardParameters {
  HeadRows<const T> q, k, v;
  HeadRows<T> out;
  float* lse;                    // [q_heads, tokens]
  const int32_t* visible_until;  // padded
  AttentionWork work;
  int tokens;
  float scale;  // of scores, times log2(e); above 0
  bool negate;  // the scores
};

// Whether any of 16 bytes' elements is infinite or NaN.
__device__ inline bool any_not_finite(const Vector<bf16, 8>& values) {
  bool found = false;
#pragma unroll
  for (const bf16 value : values.at) found |= (value.bits & 0x7f80) == 0x7f80;
  return found;
}
__device__ inline bool any_not_finite(const Vector<float, 4>& values) {
  bool found = false;
#pragma unroll
  for (const float value : values.at) found |= (std::bit_cast<uint32_t>(value) & 0x7f800000) == 0x7f800000;
  return found;
}

// A hidden value has weight 0, but 0 times infinity is NaN. Rows of `values` that are not finite become 0,
// and in the tile's margin [key] stands NaN (else 0), which is for the weights of those who see the key.
// Followed by a barrier.
template <int kHead, int kKeys, int kThreads, typename T>
__device__ inline void take_poison(T* values) {
  constexpr int kShare = kThreads / kKeys;  // threads for a row
  const auto thread = static_cast<unsigned>(thread_index());
  const int key = static_cast<int>(thread / kShare), share = static_cast<int>(thread % kShare);
  T* row = values + key * kRow<T, kHead>;
  int found = 0;
#pragma unroll
  for (int i = 0; i < kHead; i += kShare * kVector<T>) {
    found |= any_not_finite(load_vector<kVector<T>>(row + i + share * kVector<T>));
  }
  found = warp_max(found, kShare);
  if (share != 0) return;
  *margin<kHead>(values, key) = found ? NAN : 0.0f;
  if (found) {
    for (int i = 0; i < kHead; ++i) row[i] = from_f32<T>(0.0f);
  }
}

template <typename T, int kHead, bool kSmall>
__global__ void __launch_bounds__(Cut<T, kHead, kSmall>::kThreads, Cut<T, kHead, kSmall>::kBlocks)
    attention_kernel(ForwardParameters<T> p) {
  using C = Cut<T, kHead, kSmall>;
  constexpr int kBands = C::kBands, kKeys = C::kKeys, kStage = C::kKeys * kRow<T, kHead>;
  SharedMemory shared;
  T* queries = shared.take<T>(C::kQueries * kRow<T, kHead>);
  T* keys = shared.take<T>(2 * kStage);
  T* values = shared.take<T>(2 * kStage);

  const int kv_head = static_cast<int>(blockIdx.y);
  const int head = kv_head * static_cast<int>(gridDim.x) + static_cast<int>(blockIdx.x);
  const AttentionPiece piece = p.work.pieces[blockIdx.z];
  const int first_query = piece.tile * C::kQueries;
  const int warp_query = warp_index() * kBand * kBands;  // this warp's first, in the tile
  const int own_query = first_query + warp_query + accumulator_row(0);
  T* own_queries = queries + warp_query * kRow<T, kHead>;

  const int32_t* next = p.work.entries + piece.first_entry;
  int32_t ahead = *next;
  const auto start = [&](int stage) {
    const int first_key = entry_tile(ahead) * kKeys;
    copy_rows<kHead, kKeys, C::kThreads>(keys + stage * kStage, p.k, kv_head, first_key, p.tokens);
    copy_rows<kHead, kKeys, C::kThreads>(values + stage * kStage, p.v, kv_head, first_key, p.tokens);
    copy_async_commit();
  };
  copy_rows<kHead, C::kQueries, C::kThreads>(queries, p.q, head, first_query, p.tokens);
  start(0);
  if (p.negate) {
    copy_async_wait<0>();
    sync_block();
    for (int i = thread_index(); i < C::kQueries * kRow<T, kHead>; i += C::kThreads) {
      queries[i] = from_f32<T>(-to_f32(queries[i]));
    }
  }

  Accumulator out[kBands][kHead / 8];
  float most[kBands][2], sum[kBands][2];  // of scores so far, unscaled; of this lane's weights relative to it
#pragma unroll
  for (int band = 0; band < kBands; ++band) {
#pragma unroll
    for (int n = 0; n < kHead / 8; ++n) out[band][n] = {};
#pragma unroll
    for (int second = 0; second < 2; ++second) {
      most[band][second] = -kInfinity;
      sum[band][second] = 0.0f;
    }
  }
  // Scores of -infinity alone, which have no maximum to be relative to, stay 0.
  const auto exponent_of = [&](float maximum) { return maximum == -kInfinity ? 0.0f : maximum * p.scale; };

  int stage = 0;
#pragma unroll 1
  for (int left = piece.entries; left > 0; --left, stage = 1 - stage) {
    const int first_key = entry_tile(ahead) * kKeys;
    const bool partial = entry_partial(ahead);
    const T* stage_keys = keys + stage * kStage;
    T* stage_values = values + stage * kStage;
    copy_async_wait<0>();
    // Behind this barrier the tile is there, and none reads the one before, whose place the next one takes.
    sync_block();
    if (left > 1) {
      ahead = *++next;
      start(1 - stage);
    }
    bool poisoned = false;
    if (partial) {
      take_poison<kHead, kKeys, C::kThreads>(stage_values);
      sync_block();
      for (int key = lane_index(); key < kKeys; key += kWarp) {
        poisoned |= *margin<kHead>(stage_values, key) != 0.0f;
      }
      poisoned = any(poisoned);
    }

    Accumulator weights[kBands][kKeys / 8];  // scores at first
    multiply_transposed<kHead, kBands, kKeys>(weights, own_queries, stage_keys);
    if (partial) {
#pragma unroll
      for (int block = 0; block < kKeys / 8; ++block) {
        const int key = first_key + 8 * block + accumulator_column();
        const auto until = load_vector<2>(p.visible_until + key);
#pragma unroll
        for (int band = 0; band < kBands; ++band) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int query = first_query + warp_query + kBand * band + accumulator_row(i / 2);
            if (!visible(key + i % 2, query, until.at[i % 2])) weights[band][block].at[i] = -kInfinity;
          }
        }
      }
    }

#pragma unroll
    for (int band = 0; band < kBands; ++band) {
      float shrink[2];  // of what was summed relative to a lesser maximum
      bool grown = false;
#pragma unroll
      for (int second = 0; second < 2; ++second) {
        // fmaxf passes over NaN, which reaches its row by its weight.
        float maximum = most[band][second];
#pragma unroll
        for (int block = 0; block < kKeys / 8; ++block) {
          maximum = fmaxf(
              maximum, fmaxf(weights[band][block].at[2 * second], weights[band][block].at[2 * second + 1]));
        }
        maximum = warp_max(maximum, 4);
        shrink[second] = fast_exp2(most[band][second] * p.scale - exponent_of(maximum));
        grown |= maximum != most[band][second];
        most[band][second] = maximum;
      }
      if (any(grown)) {
#pragma unroll
        for (int second = 0; second < 2; ++second) {
          sum[band][second] *= shrink[second];
#pragma unroll
          for (int block = 0; block < kHead / 8; ++block) {
            out[band][block].at[2 * second] *= shrink[second];
            out[band][block].at[2 * second + 1] *= shrink[second];
          }
        }
      }
#pragma unroll
      for (int second = 0; second < 2; ++second) {
        const float exponent = exponent_of(most[band][second]);
#pragma unroll
        for (int block = 0; block < kKeys / 8; ++block) {
#pragma unroll
          for (int i = 2 * second; i < 2 * second + 2; ++i) {
            float& weight = weights[band][block].at[i];
            weight = fast_exp2(fmaf(weight, p.scale, -exponent));
            sum[band][second] += weight;
          }
        }
      }
    }
    if (poisoned) {
#pragma unroll
      for (int block = 0; block < kKeys / 8; ++block) {
        const auto pair = load_vector<2>(margin<kHead>(stage_values, 8 * block + accumulator_column()));
#pragma unroll
        for (int band = 0; band < kBands; ++band) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            float& weight = weights[band][block].at[i];
            if (weight > 0.0f) weight += pair.at[i % 2];
          }
        }
      }
    }
    multiply_add<kHead, kBands, kKeys>(out, weights, stage_values);
  }

#pragma unroll
  for (int band = 0; band < kBands; ++band) {
#pragma unroll
    for (int second = 0; second < 2; ++second) {
      const float total = warp_sum(sum[band][second], 4);
      const int query = own_query + kBand * band + 8 * second;
      if (lane_index() % 4 == 0 && query < p.tokens) {
        p.lse[int64_t{head} * p.tokens + query] = exponent_of(most[band][second]) * kLn2 + logf(total);
      }
      sum[band][second] = 1.0f / total;
    }
  }
  store_rows<kHead>(out, sum, own_queries, p.out, head, first_query + warp_query, p.tokens);
}

template <typename T, int kHead>
void run(CudaBackend& backend, AttentionPlan& plan, const HeadsView& q, const HeadsView& k,
         const HeadsView& v, float scale, const HeadsView& out, const Tensor& lse) {
  with_cut<Cut, T, kHead>(backend.gpu(), [&](auto small) {
    constexpr bool kSmall = decltype(small)::value;
    using C = Cut<T, kHead, kSmall>;
    const AttentionSchedule& schedule = plan.by_query(backend, C::kQueries, C::kKeys);
    const ForwardParameters<T> parameters{HeadRows<const T>(q), HeadRows<const T>(k), HeadRows<const T>(v),
                                          HeadRows<T>(out), lse.as<float>(), plan.padded(),
                                          AttentionWork(schedule), static_cast<int>(q.tokens),
                                          // No score of those that all become 0 shall become 0 * infinity.
                                          std::max(std::fabs(scale) * kLog2e, FLT_MIN), scale < 0.0f};
    launch(backend.gpu(), "attention", attention_kernel<T, kHead, kSmall>,
           {blocks(q.heads / k.heads, k.heads, schedule.pieces), C::kThreads, C::kShared}, parameters);
  });
}

}  // namespace

AttentionPlan& CudaBackend::plan_attention(const std::vector<int32_t>& visible_until, int64_t first_query) {
  if (!attention_plan_ || !attention_plan_->is_of(visible_until, first_query)) {
    attention_plan_ = std::make_shared<AttentionPlan>(*this, visible_until, first_query);
  }
  return *attention_plan_;
}

void CudaBackend::attention(const HeadsView& q, const HeadsView& k, const HeadsView& v, const Tensor&,
                            const std::vector<int32_t>& visible_until_host, float scale, const HeadsView& out,
                            const Tensor& lse, int64_t first_query) {
  if (q.tokens == 0) return;
  AttentionPlan& plan = plan_attention(visible_until_host, first_query);
  if (attention_on_hopper(*this, plan, q, k, v, scale, out, lse)) return;
  with_type(q.dtype, [&](auto type) {
    with_head_size(q.head_size, [&](auto head_size) {
      run<decltype(type), decltype(head_size)::value>(*this, plan, q, k, v, scale, out, lse);
    });
  });
}

}  // namespace merf::cuda
