// The gradients of attention over the token forest. Rows, packed keys and the mask are those of attention.cc.
//
// The gradients follow from P = exp(S - lse) and D = rowsum(dO * O):
//   dV = P^T dO,  dS = P * (dO V^T - D),  dK = scale * dS^T Q,  dQ = scale * dS K.
// One task is a block of keys: it walks the query blocks that see it upwards and owns its dK and dV. Each
// query block's dQ takes the contributions of its key blocks in rising order: a task waits its turn. Tasks
// are claimed in rising order too, so the one that is waited for is always running; they follow each other as
// in a pipeline.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "backend/cpu/attention_backward.cc"
#include "backend/cpu/simd_targets.h"
// The targets are chosen above.
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include <omp.h>

#include <atomic>
#include <thread>
#include <vector>

#include "backend/cpu/attention-inl.h"
#include "backend/cpu/attention_mask-inl.h"
#include "backend/cpu/cpu_backend.h"

HWY_BEFORE_NAMESPACE();
namespace merf {
namespace HWY_NAMESPACE {

// An even number, so that no pair of rows lies in two blocks.
HWY_INLINE int64_t backward_query_tokens(int64_t group) {
  return std::clamp<int64_t>(96 / group, 8, 64) / 2 * 2;
}

// What products take as it is where operands are float32, and in two layouts where they are pairs: as rows,
// and as steps of a product.
template <typename Operand>
struct BackwardScratch {
  static constexpr int64_t kWidth = kPerOperand<Operand>;

  Operand* keys_transposed;    // [head_size, kKeyBlock]
  Operand* values_transposed;  // [head_size, kKeyBlock]
  Operand* keys;               // [kKeyBlock, padded] as steps
  float* dkeys;                // [kKeyBlock, padded]
  float* dvalues;              // [kKeyBlock, padded]
  Operand* probabilities;      // [rows, kKeyBlock] as steps
  Operand* dscores;            // [rows, kKeyBlock] as steps
  Operand* dscores_rows;       // [rows, kKeyBlock]
  static int64_t floats(int64_t rows, int64_t head_size, int64_t padded) {
    return kKeyBlock * (2 * head_size + 3 * padded + 3 * rows);
  }
  BackwardScratch(float* memory, int64_t rows, int64_t head_size, int64_t padded)
      : keys_transposed(reinterpret_cast<Operand*>(memory)),
        values_transposed(keys_transposed + head_size / kWidth * kKeyBlock),
        keys(values_transposed + head_size / kWidth * kKeyBlock),
        dkeys(reinterpret_cast<float*>(keys + kKeyBlock / kWidth * padded)),
        dvalues(dkeys + kKeyBlock * padded),
        probabilities(reinterpret_cast<Operand*>(dvalues + kKeyBlock * padded)),
        dscores(probabilities + rows / kWidth * kKeyBlock),
        dscores_rows(kWidth == 1 ? dscores : dscores + rows / kWidth * kKeyBlock) {}
};

// One key/value head's rows, packed for the whole pass.
template <typename Operand>
struct BackwardRows {
  const Operand* query;        // [tokens * group, padded]
  const Operand* doutput;      // [tokens * group, padded]
  const Operand* query_steps;  // the same as steps
  const Operand* doutput_steps;
  const float* lse;    // [tokens * group], in powers of two
  const float* delta;  // [tokens * group]
  float* dquery;       // [tokens * group, padded]
};

// Rows are read six at a time, a pattern that no hardware prefetcher follows; from the third-level cache each
// strip would wait for its first touch.
template <typename Operand>
HWY_INLINE void prefetch_rows(const Operand* rows, int64_t operands) {
  for (int64_t i = 0; i < operands; i += 16) __builtin_prefetch(rows + i, 0, 3);
}

// P and dS of a strip of rows, those from `at` on in the scratch; both are 0 outside what `span` says.
template <typename Operand>
HWY_INLINE void backward_scores(const AttentionShape& s, const BackwardRows<Operand>& rows, int64_t row,
                                int64_t count, int64_t padded, KeySpan span, int64_t block,
                                const int32_t* visibility, const BackwardScratch<Operand>& scratch,
                                int64_t at) {
  constexpr int64_t kWidth = kPerOperand<Operand>;
  const int64_t vectors = (span.end - span.begin) / kLanes;
  const int64_t steps = s.head_size / kWidth, stride = padded / kWidth;
  Operand* probabilities = scratch.probabilities + at / kWidth * kKeyBlock;
  Operand* dscores = scratch.dscores + at / kWidth * kKeyBlock;
  Operand* dscores_rows = scratch.dscores_rows + at * (kKeyBlock / kWidth);
  if (span.begin != 0 || span.end != kKeyBlock) {
    const int64_t all = round_up(count, kWidth) / kWidth * kKeyBlock;
    std::fill(probabilities, probabilities + all, Operand{0});
    std::fill(dscores, dscores + all, Operand{0});
    if (kWidth > 1) std::fill(dscores_rows, dscores_rows + count * (kKeyBlock / kWidth), Operand{0});
    if (vectors == 0) return;
  }
  probabilities += span.begin;
  dscores += span.begin;
  dscores_rows += span.begin / kWidth;
  alignas(64) float unrounded[kWidth == 1 ? 1 : 2 * kTileRows * kKeyBlock];
  float* p = unrounded;
  float* ds = unrounded + kTileRows * kKeyBlock;
  if constexpr (kWidth == 1) {
    p = probabilities;
    ds = dscores;
  }
  multiply<Into::overwrite_scaled>(count, vectors, steps, rows.query + row * stride, stride, 1,
                                   scratch.keys_transposed + span.begin, kKeyBlock, p, kKeyBlock,
                                   s.scale * kLog2e);
  multiply<Into::overwrite>(count, vectors, steps, rows.doutput + row * stride, stride, 1,
                            scratch.values_transposed + span.begin, kKeyBlock, ds, kKeyBlock);
  for (int64_t i = 0; i < count && span.masked; ++i) {
    mask_row(visibility + span.begin, block * kKeyBlock + span.begin, vectors, (row + i) / s.group,
             kMinusInfinity, p + i * kKeyBlock);
  }
  const auto probability = [&](int64_t i, int64_t v) {
    const FloatVec score = hn::LoadU(kFloatTag, p + i * kKeyBlock + v * kLanes);
    return exp2_nonpositive(kFloatTag, hn::Sub(score, hn::Set(kFloatTag, rows.lse[row + i])));
  };
  const auto dscore = [&](int64_t i, int64_t v, FloatVec probability) {
    const FloatVec dp = hn::LoadU(kFloatTag, ds + i * kKeyBlock + v * kLanes);
    return hn::Mul(probability, hn::Sub(dp, hn::Set(kFloatTag, rows.delta[row + i])));
  };
  if constexpr (kWidth == 1) {
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t v = 0; v < vectors; ++v) {
        const FloatVec x = probability(i, v), dx = dscore(i, v, x);
        hn::StoreU(x, kFloatTag, p + i * kKeyBlock + v * kLanes);
        hn::StoreU(dx, kFloatTag, ds + i * kKeyBlock + v * kLanes);
      }
    }
  } else {
    for (int64_t i = 0; i < count; i += 2) {
      // The partner of an odd last row is 0.
      const bool two = i + 1 < count;
      for (int64_t v = 0; v < vectors; ++v) {
        const FloatVec x0 = probability(i, v), dx0 = dscore(i, v, x0);
        FloatVec x1 = hn::Zero(kFloatTag), dx1 = x1;
        if (two) {
          x1 = probability(i + 1, v);
          dx1 = dscore(i + 1, v, x1);
        }
        Operand* first_row = dscores_rows + (i * kKeyBlock + v * kLanes) / kWidth;
        store_step(x0, x1, probabilities + i / kWidth * kKeyBlock + v * kLanes);
        store_step_and_rows(dx0, dx1, dscores + i / kWidth * kKeyBlock + v * kLanes, first_row,
                            first_row + kKeyBlock / kWidth);
      }
    }
  }
}

// The first key block from `block` on that some query of [first, last] may see.
HWY_INLINE int32_t next_block(const MaskSummary& mask, int64_t block, int64_t first, int64_t last) {
  while (block < mask.key_blocks() && block * kKeyBlock <= last && !mask.touches(block, first, last)) ++block;
  return static_cast<int32_t>(block);
}

template <typename T, typename Operand>
void backward_block(const AttentionShape& s, const MaskSummary& mask, const HeadsView& k, const HeadsView& v,
                    const BackwardRows<Operand>& rows, int64_t padded, int64_t head, int64_t block,
                    int64_t query_tokens, std::atomic<int32_t>* turns,
                    const BackwardScratch<Operand>& scratch, const HeadsView& dk, const HeadsView& dv) {
  constexpr int64_t kWidth = kPerOperand<Operand>;
  const int64_t stride = padded / kWidth;
  const int64_t size = s.head_size, group = s.group;
  const int64_t key0 = block * kKeyBlock, keys = std::min(kKeyBlock, s.tokens - key0);
  pack_transposed(row_of<T>(k, key0, head), k.row_stride, keys, size, scratch.keys_transposed);
  pack_transposed(row_of<T>(v, key0, head), v.row_stride, keys, size, scratch.values_transposed);
  pack_steps(row_of<T>(k, key0, head), k.row_stride, keys, kKeyBlock, size, padded, scratch.keys);
  std::fill(scratch.dkeys, scratch.dkeys + kKeyBlock * padded, 0.0f);
  std::fill(scratch.dvalues, scratch.dvalues + kKeyBlock * padded, 0.0f);
  alignas(64) int32_t visibility[kKeyBlock];
  block_visibility(s, block, visibility);

  const int64_t query_end = std::min<int64_t>(mask.coarse[block].most, s.tokens);
  for (int64_t qb = std::max(key0, s.first_query) / query_tokens; qb * query_tokens < query_end; ++qb) {
    const int64_t first = qb * query_tokens, last = std::min(first + query_tokens, s.tokens) - 1;
    const int64_t row0 = first * group, count = (last - first + 1) * group;
    int64_t begin = count, end = 0;
    int64_t key_begin = kKeyBlock, key_end = 0;
    for (int64_t r = 0; r < count; r += kTileRows) {
      const int64_t n = std::min<int64_t>(kTileRows, count - r);
      const KeySpan span = visible_span(mask, s, block, first + r / group, first + (r + n - 1) / group);
      // The strip that follows; behind the block's last this is the next block's first.
      const int64_t ahead = std::min<int64_t>(row0 + r + 2 * kTileRows, s.tokens * group) - (row0 + r + n);
      prefetch_rows(rows.query + (row0 + r + n) * stride, ahead * stride);
      prefetch_rows(rows.doutput + (row0 + r + n) * stride, ahead * stride);
      prefetch_rows(rows.dquery + (row0 + r) * padded, n * padded);
      backward_scores(s, rows, row0 + r, n, padded, span, block, visibility, scratch, r);
      if (span.begin == span.end) continue;
      begin = std::min(begin, r);
      end = r + n;
      key_begin = std::min(key_begin, span.begin);
      key_end = std::max(key_end, span.end);
    }
    if (begin < end) {
      const int64_t width = key_end - key_begin;
      const int64_t steps = round_up(end - begin, kWidth) / kWidth, step = (row0 + begin) / kWidth;
      multiply<Into::add>(width, padded / kLanes, steps,
                          scratch.probabilities + begin / kWidth * kKeyBlock + key_begin, 1, kKeyBlock,
                          rows.doutput_steps + step * padded, padded, scratch.dvalues + key_begin * padded,
                          padded);
      multiply<Into::add>(
          width, padded / kLanes, steps, scratch.dscores + begin / kWidth * kKeyBlock + key_begin, 1,
          kKeyBlock, rows.query_steps + step * padded, padded, scratch.dkeys + key_begin * padded, padded);
    }
    for (int spins = 0; turns[qb].load(std::memory_order_acquire) != block; ++spins) {
      if (spins > 64) std::this_thread::yield();
    }
    if (begin < end) {
      multiply<Into::add>(end - begin, padded / kLanes, (key_end - key_begin) / kWidth,
                          scratch.dscores_rows + (begin * kKeyBlock + key_begin) / kWidth, kKeyBlock / kWidth,
                          1, scratch.keys + key_begin / kWidth * padded, padded,
                          rows.dquery + (row0 + begin) * padded, padded);
    }
    turns[qb].store(next_block(mask, block + 1, first, last), std::memory_order_release);
  }

  for (int64_t i = 0; i < keys; ++i) {
    store_scaled(scratch.dkeys + i * padded, size, s.scale, row_of<T>(dk, key0 + i, head));
    store_scaled(scratch.dvalues + i * padded, size, 1.0f, row_of<T>(dv, key0 + i, head));
  }
}

// sum of a[i] * b[i]
template <typename T>
HWY_INLINE float dot(const T* a, const T* b, int64_t n) {
  const MoveTag d;
  auto sum = hn::Zero(d);
  for (int64_t i = 0; i < n; i += kMoveLanes)
    sum = hn::MulAdd(load_as_float(a + i), load_as_float(b + i), sum);
  return hn::GetLane(hn::SumOfLanes(d, sum));
}

template <typename T, typename Operand>
void backward_typed(CpuBackend& backend, const AttentionShape& s, const HeadsView& dout, const HeadsView& q,
                    const HeadsView& k, const HeadsView& v, const HeadsView& out, const float* lse,
                    const HeadsView& dq, const HeadsView& dk, const HeadsView& dv) {
  constexpr int64_t kWidth = kPerOperand<Operand>;
  const MaskSummary mask(s);
  const int64_t size = s.head_size, padded = round_up(size, kLanes), stride = padded / kWidth;
  const int64_t group = s.group, key_blocks = mask.key_blocks();
  const int64_t query_tokens = backward_query_tokens(group);
  const int64_t query_blocks = (s.tokens + query_tokens - 1) / query_tokens;
  const int64_t rows = s.tokens * group;  // of one key/value head
  const int64_t head_steps = round_up(rows, kWidth) / kWidth * padded;
  const int threads = backend.num_threads();
  const int64_t scratch_size = BackwardScratch<Operand>::floats(query_tokens * group, size, padded);

  const Tensor packed_rows = backend.allocate(DType::f32, {2, s.kv_heads * rows, stride});
  const Tensor packed_steps =
      kWidth == 1 ? packed_rows : backend.allocate(DType::f32, {2, s.kv_heads * head_steps});
  const Tensor query_gradients = backend.allocate(DType::f32, {s.kv_heads * rows, padded});
  const Tensor row_sums = backend.allocate(DType::f32, {2, s.kv_heads * rows});
  const Tensor scratch = backend.allocate(DType::f32, {threads, scratch_size});
  auto* query = static_cast<Operand*>(packed_rows.data);
  auto* doutput = query + s.kv_heads * rows * stride;
  auto* query_steps = static_cast<Operand*>(packed_steps.data);
  auto* doutput_steps = query_steps + s.kv_heads * head_steps;
  float* dquery = query_gradients.as<float>();
  float* lse2 = row_sums.as<float>();
  float* delta = lse2 + s.kv_heads * rows;
  std::vector<std::atomic<int32_t>> turns(s.kv_heads * query_blocks);
  std::atomic<int64_t> next_task{0};

#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < s.kv_heads * query_blocks; ++i) {
      const int64_t head = i / query_blocks, first = i % query_blocks * query_tokens;
      const int64_t last = std::min(first + query_tokens, s.tokens) - 1;
      turns[i].store(next_block(mask, 0, first, last), std::memory_order_relaxed);
      const int64_t row0 = head * rows + first * group, count = (last - first + 1) * group;
      for (int64_t r = 0; r < count; ++r) {
        const int64_t row = row0 + r, token = first + r / group, query_head = head * group + r % group;
        const T* q_row = row_of<T>(q, token, query_head);
        const T* dout_row = row_of<T>(dout, token, query_head);
        if constexpr (kWidth == 1) {
          pack_steps(q_row, size, 1, 1, size, padded, query + row * padded);
          pack_steps(dout_row, size, 1, 1, size, padded, doutput + row * padded);
        } else {
          copy_operands(q_row, size, query + row * stride);
          copy_operands(dout_row, size, doutput + row * stride);
        }
        std::fill(dquery + row * padded, dquery + (row + 1) * padded, 0.0f);
        if (token < s.first_query) {
          // All its probabilities are 0.
          lse2[row] = std::numeric_limits<float>::infinity();
          delta[row] = 0.0f;
          continue;
        }
        const float log_sum = lse[query_head * s.tokens + token];
        lse2[row] = log_sum == kMinusInfinity ? 0.0f : log_sum * kLog2e;
        delta[row] = dot(dout_row, row_of<T>(out, token, query_head), size);
      }
      if constexpr (kWidth > 1) {
        const int64_t at = head * head_steps + first * group / kWidth * padded;
        pack_steps(reinterpret_cast<const T*>(query + row0 * stride), padded, count, round_up(count, kWidth),
                   size, padded, query_steps + at);
        pack_steps(reinterpret_cast<const T*>(doutput + row0 * stride), padded, count,
                   round_up(count, kWidth), size, padded, doutput_steps + at);
      }
    }
    const BackwardScratch<Operand> own(scratch.as<float>() + omp_get_thread_num() * scratch_size,
                                       query_tokens * group, size, padded);
    // A task that was taken is done, whatever happens: those behind it wait for its turn.
    for (int64_t task; !backend.interrupted() && (task = next_task.fetch_add(1)) < s.kv_heads * key_blocks;) {
      const int64_t head = task % s.kv_heads, block = task / s.kv_heads, row = head * rows;
      const BackwardRows<Operand> head_rows{query + row * stride,
                                            doutput + row * stride,
                                            query_steps + head * head_steps,
                                            doutput_steps + head * head_steps,
                                            lse2 + row,
                                            delta + row,
                                            dquery + row * padded};
      backward_block<T>(s, mask, k, v, head_rows, padded, head, block, query_tokens,
                        turns.data() + head * query_blocks, own, dk, dv);
    }
#pragma omp barrier
#pragma omp for schedule(static)
    for (int64_t i = 0; i < s.kv_heads * s.tokens; ++i) {
      const int64_t head = i / s.tokens, token = i % s.tokens;
      for (int64_t g = 0; g < group; ++g) {
        store_scaled(dquery + (i * group + g) * padded, size, s.scale,
                     row_of<T>(dq, token, head * group + g));
      }
    }
  }
  backend.check_interrupted();
}

void attention_backward(CpuBackend& backend, const AttentionShape& s, const HeadsView& dout,
                        const HeadsView& q, const HeadsView& k, const HeadsView& v, const HeadsView& out,
                        const float* lse, const HeadsView& dq, const HeadsView& dk, const HeadsView& dv) {
  if (q.dtype == DType::bf16) {
    with_operand<bf16>([&](auto operand) {
      backward_typed<bf16, decltype(operand)>(backend, s, dout, q, k, v, out, lse, dq, dk, dv);
    });
  } else {
    backward_typed<float, float>(backend, s, dout, q, k, v, out, lse, dq, dk, dv);
  }
}

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace merf
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace merf {

HWY_EXPORT(attention_backward);

void CpuBackend::attention_backward(const HeadsView& dout, const HeadsView& q, const HeadsView& k,
                                    const HeadsView& v, const HeadsView& out, const Tensor& lse,
                                    const Tensor&, const std::vector<int32_t>& visible_until_host,
                                    float scale, const HeadsView& dq, const HeadsView& dk,
                                    const HeadsView& dv, int64_t first_query) {
  if (q.tokens == 0) return;
  HWY_DYNAMIC_DISPATCH(attention_backward)
  (*this, AttentionShape(q, k, visible_until_host, scale, first_query), dout, q, k, v, out, lse.as<float>(),
   dq, dk, dv);
}

}  // namespace merf
#endif
