// The two passes of attention_backward.cu for bfloat16 on compute capability 9.0: the same sums in registers, by products
// of warpgroups. A block's first warpgroup has one thread that keeps the copy engine busy; each of two others has 64 keys
// or 64 queries. The last product of a tile is still under way while the next tile's scores begin.
#include "backend/cuda/attention_hopper.h"
#include "backend/cuda/attention_panels.h"
#include "backend/cuda/launch.h"

namespace merf::cuda {

namespace {

constexpr int kGroups = 2;  // warpgroups that multiply
constexpr int kRows = 64 * kGroups;
constexpr int kThreads = kWarpgroup * (1 + kGroups);
// 64 Ki registers in all.
[[maybe_unused]] constexpr int kRegisters = 240, kCopyRegisters = 24;

struct Parameters {
  TensorMap q, k, v, dout;
  HeadRows<bf16> dq, dk, dv;
  const float* lse2;             // [q_heads, padded]: lse log2(e); infinity behind the last token
  const float* delta;            // [q_heads, padded]: rowsum(dout * out)
  const int32_t* visible_until;  // [padded]
  AttentionWork work;
  float* partial;  // [slots, kv_heads, 2 (dk, dv), kRows, kHead], for tiles of keys in pieces
  int tokens, padded, group;
  float scale;
};

// ---- dK and dV

template <int kHead>
struct KeyCut {
  static constexpr int kQueries = 64;
  static constexpr int kStages = kHead <= 64 ? 4 : 3;
  static constexpr int kBarriers = 1 + 3 * kStages;
  static constexpr size_t kShared = shared_bytes<bf16>(2 * (kRows + kStages * kQueries) * kHead) +
                                    shared_bytes<float>(2 * kStages * kQueries) +
                                    shared_bytes<uint64_t>(kBarriers);
};

template <int kHead>
__global__ void __launch_bounds__(kThreads, 1)
    attention_backward_keys_hopper_kernel(const __grid_constant__ Parameters p) {
#if MERF_HAS_WGMMA
  using C = KeyCut<kHead>;
  constexpr int kQueries = C::kQueries, kStages = C::kStages, kStage = kQueries * kHead;
  // Whether registers hold a tile's dS beside the next one's dP and P, so that its last product need not be waited for.
  constexpr bool kCarried = kHead <= 64;
  SharedMemory shared;
  bf16* keys = shared.take<bf16>(2 * (kRows + kStages * kQueries) * kHead);
  bf16* values = keys + kRows * kHead;
  bf16* queries = values + kRows * kHead;
  bf16* douts = queries + kStages * kStage;
  float* lse2 = shared.take<float>(2 * kStages * kQueries);
  float* delta = lse2 + kStages * kQueries;
  uint64_t* keys_full = shared.take<uint64_t>(C::kBarriers);
  uint64_t* queries_full = keys_full + 1;         // with lse2
  uint64_t* douts_full = queries_full + kStages;  // with delta
  uint64_t* free = douts_full + kStages;
  if (thread_index() == 0) {
    barrier_init(keys_full, 1);
    for (int stage = 0; stage < kStages; ++stage) {
      barrier_init(queries_full + stage, 1);
      barrier_init(douts_full + stage, 1);
      barrier_init(free + stage, 4 * kGroups);
    }
    fence_barriers();
  }
  sync_block();

  const int kv_head = static_cast<int>(blockIdx.x);
  const AttentionPiece piece = p.work.pieces[blockIdx.y];
  const int32_t* entries = p.work.entries + piece.first_entry;
  const int first_key = piece.tile * kRows;

  if (warp_index() < 4) {
    fewer_registers<kCopyRegisters>();
    if (thread_index() == 0) {
      barrier_expect(keys_full, 2 * panel_bytes<kHead>(kRows));
      copy_panels<kHead, kRows>(keys, p.k, kv_head, first_key, keys_full);
      copy_panels<kHead, kRows>(values, p.v, kv_head, first_key, keys_full);
      int head = kv_head * p.group + piece.begin / piece.entries, entry = piece.begin % piece.entries;
      Ring<kStages> ring;
#pragma unroll 1
      for (int unit = piece.begin; unit < piece.end; ++unit, ring.advance()) {
        const int stage = ring.stage, first_query = entry_tile(entries[entry]) * kQueries;
        const int64_t row = int64_t{head} * p.padded + first_query;
        constexpr uint32_t kRowBytes = kQueries * sizeof(float);
        barrier_wait(free + stage, 1 - ring.phase);
        barrier_expect(queries_full + stage, panel_bytes<kHead>(kQueries) + kRowBytes);
        copy_panels<kHead, kQueries>(queries + stage * kStage, p.q, head, first_query, queries_full + stage);
        copy_bulk(lse2 + stage * kQueries, p.lse2 + row, kRowBytes, queries_full + stage);
        barrier_expect(douts_full + stage, panel_bytes<kHead>(kQueries) + kRowBytes);
        copy_panels<kHead, kQueries>(douts + stage * kStage, p.dout, head, first_query, douts_full + stage);
        copy_bulk(delta + stage * kQueries, p.delta + row, kRowBytes, douts_full + stage);
        if (++entry == piece.entries) {
          entry = 0;
          ++head;
        }
      }
    }
  } else {
    more_registers<kRegisters>();
    const int group = warp_index() / 4 - 1;
    const int first_row = 64 * group + warp_index() % 4 * kBand;  // this warp's
    const int own_key = first_key + first_row + accumulator_row(0);
    const bf16* own_keys = keys + 64 * group * kPanelColumns;
    const bf16* own_values = values + 64 * group * kPanelColumns;
    const int until[2] = {p.visible_until[own_key], p.visible_until[own_key + 8]};

    Accumulator dkeys[kHead / 8], dvalues[kHead / 8], scores[kQueries / 8], dscores[kQueries / 8];
    FragmentA<bf16> probability[kQueries / 16], dscore[kQueries / 16];
#pragma unroll
    for (int n = 0; n < kHead / 8; ++n) dkeys[n] = dvalues[n] = {};
    const float scale2 = p.scale * kLog2e;

    barrier_wait(keys_full, 0);
    int entry = piece.begin % piece.entries, before = 0;
    Ring<kStages> ring;
#pragma unroll 1
    for (int unit = piece.begin; unit < piece.end; ++unit, ring.advance()) {
      const int stage = ring.stage;
      const int32_t query_entry = entries[entry];
      if (++entry == piece.entries) entry = 0;
      const bf16* stage_queries = queries + stage * kStage;
      const bf16* stage_douts = douts + stage * kStage;
      barrier_wait(queries_full + stage, ring.phase);
      wgmma_fence();
      wgmma_transposed<kHead>(scores, own_keys, kRows, stage_queries, kQueries);
      wgmma_commit();
      barrier_wait(douts_full + stage, ring.phase);
      wgmma_transposed<kHead>(dscores, own_values, kRows, stage_douts, kQueries);
      wgmma_commit();
      wgmma_wait<1>();
      wgmma_done(scores);
      if (kCarried && unit > piece.begin) release(free + before);

#pragma unroll
      for (int block = 0; block < kQueries / 8; ++block) {
        const auto row_lse2 = load_vector<2>(lse2 + stage * kQueries + 8 * block + accumulator_column());
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float& score = scores[block].at[i];
          score = fast_exp2(fmaf(score, scale2, -row_lse2.at[i % 2]));
        }
      }
      if (entry_partial(query_entry)) {
        const int own_query = entry_tile(query_entry) * kQueries + accumulator_column();
#pragma unroll
        for (int block = 0; block < kQueries / 8; ++block) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            if (!visible(own_key + i / 2 * 8, own_query + 8 * block + i % 2, until[i / 2])) {
              scores[block].at[i] = 0.0f;
            }
          }
        }
      }
      to_fragments(probability, scores);
      wgmma_fence();
      wgmma_add<kQueries>(dvalues, probability, stage_douts, kQueries, true);
      wgmma_commit();
      wgmma_wait<1>();
      wgmma_done(dscores);
#pragma unroll
      for (int block = 0; block < kQueries / 8; ++block) {
        const auto row_delta = load_vector<2>(delta + stage * kQueries + 8 * block + accumulator_column());
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          dscores[block].at[i] = scores[block].at[i] * (dscores[block].at[i] - row_delta.at[i % 2]);
        }
      }
      to_fragments(dscore, dscores);
      wgmma_fence();
      wgmma_add<kQueries>(dkeys, dscore, stage_queries, kQueries, true);
      wgmma_commit();
      if constexpr (!kCarried) {
        wgmma_wait<0>();
        wgmma_done(dkeys);
        wgmma_done(dvalues);
        release(free + stage);
      }
      before = stage;
    }
    wgmma_wait<0>();
    wgmma_done(dkeys);
    wgmma_done(dvalues);

    const auto finish = [&](const Accumulator(&sums)[kHead / 8], float scale, int which, bf16* tile,
                            const HeadRows<bf16>& to) {
      if (piece.slot < 0) {
        const float scales[2] = {scale, scale};
        store_panels<kHead, kRows>(sums, scales, tile, first_row, to, kv_head, first_key, p.tokens);
        return;
      }
      const int64_t slot = (int64_t{piece.slot} * gridDim.x + kv_head) * 2 + which;
      float* rows = p.partial + (slot * kRows + first_row) * kHead;
#pragma unroll
      for (int block = 0; block < kHead / 8; ++block) {
#pragma unroll
        for (int second = 0; second < 2; ++second) {
          store_pair(rows + accumulator_row(second) * kHead + 8 * block + accumulator_column(),
                     sums[block].at[2 * second] * scale, sums[block].at[2 * second + 1] * scale);
        }
      }
    };
    // The sums are laid out where the keys and values stood, which no warp of this warpgroup reads any more.
    sync_threads(1 + group, kWarpgroup);
    finish(dkeys, p.scale, 0, keys, p.dk);
    finish(dvalues, 1.0f, 1, values, p.dv);
  }
#else
  static_cast<void>(p);
#endif
}

// ---- dQ

template <int kHead>
struct QueryCut {
  static constexpr int kKeys = 128, kStages = 2;
  static constexpr int kBarriers = 1 + 4 * kStages;
  static constexpr size_t kShared =
      shared_bytes<bf16>(2 * (kRows + kStages * kKeys) * kHead) + shared_bytes<uint64_t>(kBarriers);
};

template <int kHead>
__global__ void __launch_bounds__(kThreads, 1)
    attention_backward_queries_hopper_kernel(const __grid_constant__ Parameters p) {
#if MERF_HAS_WGMMA
  using C = QueryCut<kHead>;
  constexpr int kKeys = C::kKeys, kStages = C::kStages, kStage = kKeys * kHead;
  // Whether registers hold dP beside dS of the tile before.
  constexpr bool kAtOnce = kHead <= 64;
  SharedMemory shared;
  bf16* queries = shared.take<bf16>(2 * (kRows + kStages * kKeys) * kHead);
  bf16* douts = queries + kRows * kHead;
  bf16* keys = douts + kRows * kHead;
  bf16* values = keys + kStages * kStage;
  uint64_t* queries_full = shared.take<uint64_t>(C::kBarriers);
  uint64_t* keys_full = queries_full + 1;
  uint64_t* values_full = keys_full + kStages;
  uint64_t* keys_free = values_full + kStages;
  uint64_t* values_free = keys_free + kStages;
  if (thread_index() == 0) {
    barrier_init(queries_full, 1);
    for (int stage = 0; stage < kStages; ++stage) {
      barrier_init(keys_full + stage, 1);
      barrier_init(values_full + stage, 1);
      barrier_init(keys_free + stage, 4 * kGroups);
      barrier_init(values_free + stage, 4 * kGroups);
    }
    fence_barriers();
  }
  sync_block();

  const int kv_head = static_cast<int>(blockIdx.y);
  const int head = kv_head * p.group + static_cast<int>(blockIdx.x);
  const AttentionPiece piece = p.work.pieces[blockIdx.z];
  const int32_t* entries = p.work.entries + piece.first_entry;
  const int first_query = piece.tile * kRows;

  if (warp_index() < 4) {
    fewer_registers<kCopyRegisters>();
    if (thread_index() == 0) {
      barrier_expect(queries_full, 2 * panel_bytes<kHead>(kRows));
      copy_panels<kHead, kRows>(queries, p.q, head, first_query, queries_full);
      copy_panels<kHead, kRows>(douts, p.dout, head, first_query, queries_full);
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
    const int first_row = 64 * group + warp_index() % 4 * kBand;  // this warp's
    const int own_query = first_query + first_row + accumulator_row(0);
    const bf16* own_queries = queries + 64 * group * kPanelColumns;
    const bf16* own_douts = douts + 64 * group * kPanelColumns;

    Accumulator dqueries[kHead / 8], scores[kKeys / 8], dscores[kKeys / 8];
    FragmentA<bf16> dscore[kKeys / 16];
#pragma unroll
    for (int n = 0; n < kHead / 8; ++n) dqueries[n] = {};
    float lse2[2], delta[2];
#pragma unroll
    for (int second = 0; second < 2; ++second) {
      const int64_t at = int64_t{head} * p.padded + own_query + 8 * second;
      lse2[second] = p.lse2[at];
      delta[second] = p.delta[at];
    }
    const float scale2 = p.scale * kLog2e;

    // Scores become probabilities.
    const auto soften = [&](int32_t entry) {
#pragma unroll
      for (int block = 0; block < kKeys / 8; ++block) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float& score = scores[block].at[i];
          score = fast_exp2(fmaf(score, scale2, -lse2[i / 2]));
        }
      }
      if (!entry_partial(entry)) return;
      const int first_key = entry_tile(entry) * kKeys;
#pragma unroll
      for (int block = 0; block < kKeys / 8; ++block) {
        const int key = first_key + 8 * block + accumulator_column();
        const auto until = load_vector<2>(p.visible_until + key);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (!visible(key + i % 2, own_query + i / 2 * 8, until.at[i % 2])) scores[block].at[i] = 0.0f;
        }
      }
    };
    const auto differentiate = [&] {
#pragma unroll
      for (int block = 0; block < kKeys / 8; ++block) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          dscores[block].at[i] = scores[block].at[i] * (dscores[block].at[i] - delta[i / 2]);
        }
      }
      to_fragments(dscore, dscores);
    };
    const auto multiply = [&](Accumulator(&d)[kKeys / 8], const bf16* rows, const bf16* tiles, uint64_t* full,
                              const Ring<kStages>& at) {
      barrier_wait(full + at.stage, at.phase);
      wgmma_fence();
      wgmma_transposed<kHead>(d, rows, kRows, tiles + at.stage * kStage, kKeys);
      wgmma_commit();
    };

    barrier_wait(queries_full, 0);
    Ring<kStages> ring;
    multiply(scores, own_queries, keys, keys_full, ring);
    multiply(dscores, own_douts, values, values_full, ring);
    wgmma_wait<1>();
    wgmma_done(scores);
    soften(entries[0]);
    wgmma_wait<0>();
    wgmma_done(dscores);
    release(values_free);
    differentiate();
#pragma unroll 1
    for (int n = 1; n < piece.entries; ++n) {
      const int32_t entry = entries[n];
      const int before = ring.stage;
      ring.advance();
      multiply(scores, own_queries, keys, keys_full, ring);
      wgmma_add<kKeys>(dqueries, dscore, keys + before * kStage, kKeys, true);
      wgmma_commit();
      if constexpr (kAtOnce) multiply(dscores, own_douts, values, values_full, ring);
      wgmma_wait<kAtOnce ? 2 : 1>();
      wgmma_done(scores);
      soften(entry);
      wgmma_wait<0>();
      wgmma_done(dqueries);
      release(keys_free + before);
      if constexpr (!kAtOnce) {
        multiply(dscores, own_douts, values, values_full, ring);
        wgmma_wait<0>();
      }
      wgmma_done(dscores);
      release(values_free + ring.stage);
      differentiate();
    }
    wgmma_fence();
    wgmma_add<kKeys>(dqueries, dscore, keys + ring.stage * kStage, kKeys, true);
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_done(dqueries);
    const float scales[2] = {p.scale, p.scale};
    // The sums are laid out where the queries stood, which no warp of this warpgroup reads any more.
    sync_threads(1 + group, kWarpgroup);
    store_panels<kHead, kRows>(dqueries, scales, queries, first_row, p.dq, head, first_query, p.tokens);
  }
#else
  static_cast<void>(p);
#endif
}

template <int kHead>
bool run(CudaBackend& backend, AttentionPlan& plan, const AttentionGradients& views, const float* lse2,
         const float* delta, float scale) {
  Gpu& gpu = backend.gpu();
  const int64_t kv_heads = views.k.heads, group = views.q.heads / kv_heads;
  constexpr int kQueries = KeyCut<kHead>::kQueries, kKeys = QueryCut<kHead>::kKeys;
  static_assert(kKeys == kRows);
  const auto map = [&](HeadsView view, int rows) {
    view.tokens = views.q.tokens;
    return gpu.tensor_map(view, rows);
  };
  const auto k_map = map(views.k, kRows), v_map = map(views.v, kRows);
  const auto q_map = map(views.q, kQueries), dout_map = map(views.dout, kQueries);
  const auto q_rows_map = map(views.q, kRows), dout_rows_map = map(views.dout, kRows);
  if (!k_map || !v_map || !q_map || !dout_map || !q_rows_map || !dout_rows_map) return false;
  Parameters parameters{*q_map,
                        *k_map,
                        *v_map,
                        *dout_map,
                        HeadRows<bf16>(views.dq),
                        HeadRows<bf16>(views.dk),
                        HeadRows<bf16>(views.dv),
                        lse2,
                        delta,
                        plan.padded(),
                        AttentionWork(),
                        nullptr,
                        static_cast<int>(views.q.tokens),
                        static_cast<int>(plan.padded_tokens()),
                        static_cast<int>(group),
                        scale};

  const AttentionSchedule& by_key =
      plan.by_key(backend, kQueries, kRows, group, kv_heads, gpu.properties().multiprocessors);
  const Tensor partial = backend.allocate(DType::f32, {by_key.slots * kv_heads, 2, kRows, kHead});
  parameters.work = AttentionWork(by_key);
  parameters.partial = partial.as<float>();
  launch(gpu, "attention_backward_keys_hopper", attention_backward_keys_hopper_kernel<kHead>,
         {blocks(kv_heads, by_key.pieces), kThreads, KeyCut<kHead>::kShared}, parameters);
  add_attention_pieces(backend, by_key, partial, views.dk, views.dv);

  const AttentionSchedule& by_query = plan.by_query(backend, kRows, kKeys);
  parameters.q = *q_rows_map;
  parameters.dout = *dout_rows_map;
  parameters.work = AttentionWork(by_query);
  launch(gpu, "attention_backward_queries_hopper", attention_backward_queries_hopper_kernel<kHead>,
         {blocks(group, kv_heads, by_query.pieces), kThreads, QueryCut<kHead>::kShared}, parameters);
  return true;
}

}  // namespace

bool attention_backward_on_hopper(CudaBackend& backend, AttentionPlan& plan, const AttentionGradients& views,
                                  const float* lse2, const float* delta, float scale) {
  if (!attention_fits_hopper(backend, views.q)) return false;
  return views.q.head_size <= 64 ? run<64>(backend, plan, views, lse2, delta, scale)
                                 : run<128>(backend, plan, views, lse2, delta, scale);
}

}  // namespace merf::cuda
