// The forward of attention.cu for bfloat16 on compute capability 9.0, in the manner of FlashAttention-3 (Shah and others
// 2024). A block's first warpgroup has one thread that keeps the copy engine busy with tiles of keys and values; each of
// the others has 64 queries. These begin the next tile's scores before they multiply this one's weights with its values,
// so that exponentials are computed while tensor cores work, and they take turns in beginning products, so that one
// computes its weights while the other multiplies.
#include "backend/cuda/attention_hopper.h"

#include <algorithm>
#include <cfloat>

#include "backend/cuda/attention_panels.h"
#include "backend/cuda/launch.h"

namespace merf::cuda {

namespace {

template <int kHead>
struct Cut {
  static constexpr int kGroups = kHead <= 64 ? 3 : 2;  // warpgroups with queries
  static constexpr int kThreads = kWarpgroup * (1 + kGroups);
  static constexpr int kQueries = 64 * kGroups, kKeys = 128, kStages = 2;
  static constexpr int kBarriers = 1 + 4 * kStages;
  static constexpr size_t kShared = shared_bytes<bf16>((kQueries + 2 * kStages * kKeys) * kHead) +
                                    shared_bytes<float>(2 * kGroups * kKeys) +
                                    shared_bytes<uint64_t>(kBarriers);
};

struct Parameters {
  TensorMap q, k, v;
  HeadRows<bf16> out;
  float* lse;                    // [q_heads, tokens]
  const int32_t* visible_until;  // padded
  AttentionWork work;
  int tokens;
  float scale;  // of scores, times log2(e); above 0
  bool negate;  // the scores
};

// Barriers of the block but 0.
[[maybe_unused]] constexpr int kOwnBarrier = 1;   // + warpgroup
[[maybe_unused]] constexpr int kAllBarrier = 4;   // of all warpgroups with queries
[[maybe_unused]] constexpr int kTurnBarrier = 5;  // + warpgroup

template <int kHead>
__global__ void __launch_bounds__(Cut<kHead>::kThreads, 1)
    attention_hopper_kernel(const __grid_constant__ Parameters p) {
#if MERF_HAS_WGMMA
  using C = Cut<kHead>;
  constexpr int kQueries = C::kQueries, kKeys = C::kKeys, kStages = C::kStages, kGroups = C::kGroups;
  constexpr int kStage = kKeys * kHead;
  // 64 Ki in all.
  constexpr int kRegisters = kGroups == 3 ? 160 : 240, kCopyRegisters = kGroups == 3 ? 32 : 24;
  SharedMemory shared;
  bf16* tiles = shared.take<bf16>((kQueries + 2 * kStages * kKeys) * kHead);
  float* poisons = shared.take<float>(2 * kGroups * kKeys);  // [warpgroup][2][key]
  uint64_t* barriers = shared.take<uint64_t>(C::kBarriers);
  bf16* queries = tiles;
  bf16* keys = queries + kQueries * kHead;
  bf16* values = keys + kStages * kStage;
  uint64_t* queries_full = barriers;
  uint64_t* keys_full = barriers + 1;
  uint64_t* values_full = keys_full + kStages;
  uint64_t* keys_free = values_full + kStages;
  uint64_t* values_free = keys_free + kStages;

  if (thread_index() == 0) {
    barrier_init(queries_full, 1);
    for (int stage = 0; stage < kStages; ++stage) {
      barrier_init(keys_full + stage, 1);
      barrier_init(values_full + stage, 1);
      // Every warp says when it is done.
      barrier_init(keys_free + stage, 4 * kGroups);
      barrier_init(values_free + stage, 4 * kGroups);
    }
    fence_barriers();
  }
  sync_block();

  const int kv_head = static_cast<int>(blockIdx.y);
  const int head = kv_head * static_cast<int>(gridDim.x) + static_cast<int>(blockIdx.x);
  const AttentionPiece piece = p.work.pieces[blockIdx.z];
  const int32_t* entries = p.work.entries + piece.first_entry;
  const int first_query = piece.tile * kQueries;

  if (warp_index() < 4) {
    fewer_registers<kCopyRegisters>();
    if (thread_index() == 0) {
      barrier_expect(queries_full, panel_bytes<kHead>(kQueries));
      copy_panels<kHead, kQueries>(queries, p.q, head, first_query, queries_full);
      Ring<kStages> ring;
#pragma unroll 1
      for (int n = 0; n < piece.entries; ++n, ring.advance()) {
        const int stage = ring.stage, first_key = entry_tile(entries[n]) * kKeys;
        barrier_wait(keys_free + stage, 1 - ring.phase);
        barrier_expect(keys_full + stage, panel_bytes<kHead>(kKeys));
        copy_panels<kHead, kKeys>(keys + stage * kStage, p.k, kv_head, first_key, keys_full + stage);
        barrier_wait(values_free + stage, 1 - ring.phase);
        barrier_expect(values_full + stage, panel_bytes<kHead>(kKeys));
        copy_panels<kHead, kKeys>(values + stage * kStage, p.v, kv_head, first_key, values_full + stage);
      }
    }
  } else {
    more_registers<kRegisters>();
    const int group = warp_index() / 4 - 1;
    const int thread = thread_index() % kWarpgroup;
    const int first_row = 64 * group + warp_index() % 4 * kBand;  // this warp's
    const int own_query = first_query + first_row + accumulator_row(0);
    bf16* own_queries = queries + 64 * group * kPanelColumns;

    barrier_wait(queries_full, 0);
    if (p.negate) {
#pragma unroll 1
      for (int i = thread; i < 64 * kHead; i += kWarpgroup) {
        bf16& value =
            own_queries[i / (64 * kPanelColumns) * kQueries * kPanelColumns + i % (64 * kPanelColumns)];
        value.bits ^= 0x8000;
      }
      fence_shared();
      sync_threads(kOwnBarrier + group, kWarpgroup);
    }

    Accumulator out[kHead / 8], scores[kKeys / 8];
    FragmentA<bf16> weights[kKeys / 16];
#pragma unroll
    for (int n = 0; n < kHead / 8; ++n) out[n] = {};
    // The greatest score so far, unscaled, and the sum of this lane's weights relative to it.
    float most[2] = {-kInfinity, -kInfinity}, sum[2] = {0.0f, 0.0f};
    int partials = 0;
    // Scores of -infinity alone, which have no maximum to be relative to, stay 0.
    const auto exponent_of = [&](float maximum) { return maximum == -kInfinity ? 0.0f : maximum * p.scale; };

    // Hides scores of a tile's hidden pairs. A hidden value has weight 0, but 0 times infinity is NaN: rows of values
    // that are not finite become 0 and `poison` of their keys NaN (else 0), which is for the weights of those who see
    // them. Whether there are any.
    const auto hide = [&](int32_t entry, bf16* tile, uint64_t* full, int phase, float* poison) {
      const int first_key = entry_tile(entry) * kKeys;
#pragma unroll
      for (int block = 0; block < kKeys / 8; ++block) {
        const int key = first_key + 8 * block + accumulator_column();
        const auto until = load_vector<2>(p.visible_until + key);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (!visible(key + i % 2, own_query + i / 2 * 8, until.at[i % 2])) scores[block].at[i] = -kInfinity;
        }
      }
      static_assert(kKeys == kWarpgroup);  // a thread for a row
      barrier_wait(full, phase);
      bool found = false;
#pragma unroll
      for (int panel = 0; panel < kHead / kPanelColumns; ++panel) {
#pragma unroll 4
        for (int i = 0; i < 8; ++i) {
          const auto part =
              load_vector<8>(tile + (panel * kKeys + thread) * kPanelColumns + (i ^ thread % 8) * 8);
#pragma unroll
          for (const bf16 value : part.at) found |= (value.bits & 0x7f80) == 0x7f80;
        }
      }
      poison[thread] = found ? NAN : 0.0f;
      sync_threads(kOwnBarrier + group, kWarpgroup);
      bool poisoned = false;
      for (int key = lane_index(); key < kKeys; key += kWarp) poisoned |= poison[key] != 0.0f;
      poisoned = any(poisoned);
      if (poisoned) {
        // All warpgroups have found the same, and none multiplies before the rows are 0.
        sync_threads(kAllBarrier, kGroups * kWarpgroup);
        if (group == 0 && found) {
          for (int i = 0; i < kHead; ++i) {
            tile[(i / kPanelColumns * kKeys + thread) * kPanelColumns + i % kPanelColumns] =
                from_f32<bf16>(0.0f);
          }
        }
        fence_shared();
        sync_threads(kAllBarrier, kGroups * kWarpgroup);
      }
      return poisoned;
    };

    // Scores become weights relative to a maximum that they may raise; `shrink` is for what was summed relative to the
    // one before. Whether any of this warp's was raised.
    const auto soften = [&](int n, int32_t entry, float(&shrink)[2]) {
      const int stage = n % kStages, phase = n / kStages % 2;
      bool poisoned = false;
      const float* poison = poisons + (2 * group + partials % 2) * kKeys;
      if (entry_partial(entry)) {
        poisoned = hide(entry, values + stage * kStage, values_full + stage, phase,
                        poisons + (2 * group + partials % 2) * kKeys);
        ++partials;
      }
      bool grown = false;
#pragma unroll
      for (int second = 0; second < 2; ++second) {
        // fmaxf passes over NaN, which reaches its row by its weight.
        float maximum = most[second];
#pragma unroll
        for (int block = 0; block < kKeys / 8; ++block) {
          maximum = fmaxf(maximum, fmaxf(scores[block].at[2 * second], scores[block].at[2 * second + 1]));
        }
        maximum = warp_max(maximum, 4);
        const float exponent = exponent_of(maximum);
        shrink[second] = fast_exp2(most[second] * p.scale - exponent);
        grown |= maximum != most[second];
        most[second] = maximum;
        float total = 0.0f;
#pragma unroll
        for (int block = 0; block < kKeys / 8; ++block) {
#pragma unroll
          for (int i = 2 * second; i < 2 * second + 2; ++i) {
            float& weight = scores[block].at[i];
            weight = fast_exp2(fmaf(weight, p.scale, -exponent));
            total += weight;
          }
        }
        sum[second] = fmaf(sum[second], shrink[second], total);
      }
      if (poisoned) {
#pragma unroll
        for (int block = 0; block < kKeys / 8; ++block) {
          const auto pair = load_vector<2>(poison + 8 * block + accumulator_column());
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            float& weight = scores[block].at[i];
            if (weight > 0.0f) weight += pair.at[i % 2];
          }
        }
      }
      return any(grown);
    };

    const auto multiply_keys = [&](int n) {
      const int stage = n % kStages;
      barrier_wait(keys_full + stage, n / kStages % 2);
      wgmma_fence();
      wgmma_transposed<kHead>(scores, own_queries, kQueries, keys + stage * kStage, kKeys);
      wgmma_commit();
    };
    const auto multiply_values = [&](int n) {
      const int stage = n % kStages;
      barrier_wait(values_full + stage, n / kStages % 2);
      wgmma_fence();
      wgmma_add<kKeys>(out, weights, values + stage * kStage, kKeys, true);
      wgmma_commit();
    };

    float shrink[2];
    // The first turn is the first warpgroup's.
    if (group == 0 && piece.entries > 1) arrive_threads(kTurnBarrier, 2 * kWarpgroup);
    multiply_keys(0);
    wgmma_wait<0>();
    wgmma_done(scores);
    release(keys_free);
    soften(0, entries[0], shrink);
    to_fragments(weights, scores);
#pragma unroll 1
    for (int n = 1; n < piece.entries; ++n) {
      const int32_t entry = entries[n];
      sync_threads(kTurnBarrier + group, 2 * kWarpgroup);
      multiply_keys(n);
      multiply_values(n - 1);
      if (group + 1 < kGroups) {
        arrive_threads(kTurnBarrier + group + 1, 2 * kWarpgroup);
      } else if (n + 1 < piece.entries) {
        arrive_threads(kTurnBarrier, 2 * kWarpgroup);
      }
      wgmma_wait<1>();
      wgmma_done(scores);
      release(keys_free + n % kStages);
      const bool grown = soften(n, entry, shrink);
      wgmma_wait<0>();
      wgmma_done(out);
      release(values_free + (n - 1) % kStages);
      if (grown) {
#pragma unroll
        for (int block = 0; block < kHead / 8; ++block) {
#pragma unroll
          for (int i = 0; i < 4; ++i) out[block].at[i] *= shrink[i / 2];
        }
      }
      to_fragments(weights, scores);
    }
    multiply_values(piece.entries - 1);
    wgmma_wait<0>();
    wgmma_done(out);

    float scales[2];
#pragma unroll
    for (int second = 0; second < 2; ++second) {
      const float total = warp_sum(sum[second], 4);
      const int query = own_query + 8 * second;
      if (lane_index() % 4 == 0 && query < p.tokens) {
        p.lse[int64_t{head} * p.tokens + query] = exponent_of(most[second]) * kLn2 + logf(total);
      }
      scales[second] = 1.0f / total;
    }
    // The output is laid out where the queries stood, which no warp of this warpgroup reads any more.
    sync_threads(kOwnBarrier + group, kWarpgroup);
    store_panels<kHead, kQueries>(out, scales, queries, first_row, p.out, head, first_query, p.tokens);
  }
#else
  static_cast<void>(p);
#endif
}

template <int kHead>
bool run(CudaBackend& backend, AttentionPlan& plan, const HeadsView& q, const HeadsView& k,
         const HeadsView& v, float scale, const HeadsView& out, const Tensor& lse) {
  using C = Cut<kHead>;
  const auto map = [&](HeadsView view, int rows) {
    view.tokens = q.tokens;
    return backend.gpu().tensor_map(view, rows);
  };
  const auto q_map = map(q, C::kQueries), k_map = map(k, C::kKeys), v_map = map(v, C::kKeys);
  if (!q_map || !k_map || !v_map) return false;
  const AttentionSchedule& schedule = plan.by_query(backend, C::kQueries, C::kKeys);
  const Parameters parameters{*q_map, *k_map, *v_map, HeadRows<bf16>(out), lse.as<float>(), plan.padded(),
                              AttentionWork(schedule), static_cast<int>(q.tokens),
                              // No score of those that all become 0 shall become 0 * infinity.
                              std::max(std::fabs(scale) * kLog2e, FLT_MIN), scale < 0.0f};
  launch(backend.gpu(), "attention_hopper", attention_hopper_kernel<kHead>,
         {blocks(q.heads / k.heads, k.heads, schedule.pieces), C::kThreads, C::kShared}, parameters);
  return true;
}

}  // namespace

bool attention_on_hopper(CudaBackend& backend, AttentionPlan& plan, const HeadsView& q, const HeadsView& k,
                         const HeadsView& v, float scale, const HeadsView& out, const Tensor& lse) {
  if (!attention_fits_hopper(backend, q)) return false;
  return q.head_size <= 64 ? run<64>(backend, plan, q, k, v, scale, out, lse)
                           : run<128>(backend, plan, q, k, v, scale, out, lse);
}

}  // namespace merf::cuda
