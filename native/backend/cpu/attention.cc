// Attention over the token forest, forward and backward, blockwise as in FlashAttention (Dao 2023), so that memory
// is linear in tokens.
//
// All query heads that share a key/value head are rows of one product: row t * group + g is query head g of token t.
// The forward takes all the scores of a block of rows, and then their weights and outputs (attention-inl.h says what
// that is good for); so many rows that their scores stay in the cache.
// Keys are packed in transposed blocks of kKeyBlock so that scores, outputs and gradients are all outer products of
// register tiles. Blocks that the mask empties are skipped, blocks that it leaves whole are not masked.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "backend/cpu/attention.cc"
#include "backend/cpu/simd_targets.h"
// The targets are chosen above.
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include <omp.h>

#include <atomic>
#include <thread>
#include <vector>

#include "backend/cpu/attention-inl.h"
#include "backend/cpu/cpu_backend.h"

#ifndef MERF_BACKEND_CPU_ATTENTION_ONCE
#define MERF_BACKEND_CPU_ATTENTION_ONCE

namespace merf {
namespace {

struct AttentionShape {
  int64_t tokens, kv_heads, group, head_size;
  const int32_t* visible_until;
  float scale;
  int64_t first_query;
};

template <typename T>
T* row_of(const HeadsView& view, int64_t token, int64_t head) {
  return static_cast<T*>(view.data) + token * view.row_stride + head * view.head_size;
}

}  // namespace
}  // namespace merf

#endif

HWY_BEFORE_NAMESPACE();
namespace merf {
namespace HWY_NAMESPACE {

// ---- the mask by blocks

constexpr int64_t kMaskBlock = 16;  // keys whose visibility is summed up together
constexpr int64_t kMaskBlocks = kKeyBlock / kMaskBlock;
static_assert(kMaskBlock % kLanes == 0);

struct Range {
  int32_t least, most;
};

// Least and most visible_until of every kMaskBlock keys and of every kKeyBlock keys.
struct MaskSummary {
  std::vector<Range> fine, coarse;

  explicit MaskSummary(const AttentionShape& s)
      : fine(summarise(s, kMaskBlock)), coarse(summarise(s, kKeyBlock)) {}

  static std::vector<Range> summarise(const AttentionShape& s, int64_t width) {
    std::vector<Range> ranges;
    for (int64_t begin = 0; begin < s.tokens; begin += width) {
      const auto [least, most] =
          std::minmax_element(s.visible_until + begin, s.visible_until + std::min(begin + width, s.tokens));
      ranges.push_back({*least, *most});
    }
    return ranges;
  }

  int64_t key_blocks() const { return static_cast<int64_t>(coarse.size()); }
  // Whether any query of [first, last] may see a key of the block.
  bool touches(int64_t block, int64_t first, int64_t last) const {
    return block * kKeyBlock <= last && coarse[block].most > first;
  }
};

// The keys of one block that some query of [first, last] sees lie in [begin, end), multiples of kLanes; `masked`
// where not every such query sees all of them. begin == end: none.
struct KeySpan {
  int64_t begin, end;
  bool masked;
};

HWY_INLINE KeySpan visible_span(const MaskSummary& mask, const AttentionShape& s, int64_t block,
                                int64_t first, int64_t last) {
  const int64_t key0 = block * kKeyBlock;
  const bool whole = key0 + kKeyBlock <= s.tokens;
  if (whole && key0 + kKeyBlock - 1 <= first && mask.coarse[block].least > last) return {0, kKeyBlock, false};
  int64_t begin = kKeyBlock, end = 0;
  bool masked = !whole;
  for (int64_t i = 0; i < kMaskBlocks; ++i) {
    const int64_t key = key0 + i * kMaskBlock;
    if (key > last || key >= s.tokens) break;
    const Range& range = mask.fine[block * kMaskBlocks + i];
    if (range.most <= first) continue;
    begin = std::min(begin, i * kMaskBlock);
    end = (i + 1) * kMaskBlock;
  }
  if (end == 0) return {0, 0, false};
  for (int64_t i = begin / kMaskBlock; i < end / kMaskBlock && !masked; ++i) {
    masked = key0 + (i + 1) * kMaskBlock - 1 > first || mask.fine[block * kMaskBlocks + i].least <= last;
  }
  return {begin, end, masked};
}

// Writes `hidden` over those of `values` (one row of a block, from span.begin) whose key the query does not see.
HWY_INLINE void mask_row(const int32_t* HWY_RESTRICT visible_until, int64_t key, int64_t vectors,
                         int64_t query, float hidden, float* HWY_RESTRICT values) {
  const hn::RebindToSigned<FloatTag> di;
  const auto token = hn::Set(di, static_cast<int32_t>(query));
  for (int64_t v = 0; v < vectors; ++v) {
    const auto keys = hn::Iota(di, static_cast<int32_t>(key + v * kLanes));
    const auto until = hn::LoadU(di, visible_until + v * kLanes);
    const auto seen = hn::AndNot(hn::Gt(keys, token), hn::Gt(until, token));
    const FloatVec x = hn::LoadU(kFloatTag, values + v * kLanes);
    hn::StoreU(hn::IfThenElse(hn::RebindMask(kFloatTag, seen), x, hn::Set(kFloatTag, hidden)), kFloatTag,
               values + v * kLanes);
  }
}

// visible_until of one block with nothing visible behind the last token.
HWY_INLINE void block_visibility(const AttentionShape& s, int64_t block, int32_t* out) {
  const int64_t key0 = block * kKeyBlock;
  for (int64_t i = 0; i < kKeyBlock; ++i) out[i] = key0 + i < s.tokens ? s.visible_until[key0 + i] : 0;
}

// ---- forward

// Tokens in a query block: so many rows that their scores stay in the second-level cache, where that leaves enough
// of them for the keys that they share.
HWY_INLINE int64_t forward_query_tokens(const AttentionShape& s) {
  const int64_t rows = std::clamp<int64_t>((int64_t{1} << 16) / s.tokens, 48, 96);
  return std::clamp<int64_t>(rows / s.group, 1, s.tokens);
}

struct ForwardScratch {
  float* query;                 // [rows, head_size] as operands
  float* output;                // [rows, padded]
  float* greatest;              // [rows, kLanes], of the scores, lane by lane
  float* scores;                // [blocks of keys that are seen, rows, kKeyBlock]; weights take their place
  std::vector<double> sums;     // [rows, kWideLanes], of the weights, lane by lane
  std::vector<int32_t> blocks;  // those that are seen
  std::vector<KeySpan> spans;   // [blocks, strips of rows]
  static int64_t floats(int64_t rows, int64_t head_size, int64_t padded, int64_t columns) {
    return round_up(rows * (head_size + padded + kLanes + columns), 16);
  }
  ForwardScratch(float* memory, int64_t rows, int64_t head_size, int64_t padded)
      : query(memory),
        output(query + rows * head_size),
        greatest(output + rows * padded),
        scores(greatest + rows * kLanes),
        sums(rows * kWideLanes) {}
};

template <typename T, typename Operand>
void forward_block(const AttentionShape& s, const MaskSummary& mask, const HeadsView& q, const Operand* keys,
                   const Operand* values, int64_t padded, int64_t kv_head, int64_t first, int64_t last,
                   ForwardScratch& scratch, const HeadsView& out, float* lse) {
  constexpr int64_t kWidth = kPerOperand<Operand>;
  const int64_t group = s.group, size = s.head_size;
  const int64_t rows = (last - first + 1) * group;
  auto* query = reinterpret_cast<Operand*>(scratch.query);
  for (int64_t r = 0; r < rows; ++r) {
    copy_operands(row_of<T>(q, first + r / group, kv_head * group + r % group), size,
                  query + r * (size / kWidth));
  }
  std::fill(scratch.output, scratch.output + rows * padded, 0.0f);
  std::fill(scratch.greatest, scratch.greatest + rows * kLanes, kMinusInfinity);
  std::fill(scratch.sums.begin(), scratch.sums.end(), 0.0);
  scratch.blocks.clear();
  scratch.spans.clear();
  for (int64_t block = 0; block < mask.key_blocks() && block * kKeyBlock <= last; ++block) {
    if (mask.touches(block, first, last)) scratch.blocks.push_back(static_cast<int32_t>(block));
  }
  alignas(64) int32_t visibility[kKeyBlock];
  for (size_t i = 0; i < scratch.blocks.size(); ++i) {
    const int64_t block = scratch.blocks[i];
    bool visibility_ready = false;
    for (int64_t r = 0; r < rows; r += kTileRows) {
      const int64_t count = std::min<int64_t>(kTileRows, rows - r);
      const KeySpan span = visible_span(mask, s, block, first + r / group, first + (r + count - 1) / group);
      scratch.spans.push_back(span);
      if (span.begin == span.end) continue;
      const int64_t vectors = (span.end - span.begin) / kLanes;
      float* scores = scratch.scores + (static_cast<int64_t>(i) * rows + r) * kKeyBlock + span.begin;
      multiply<Into::overwrite_scaled>(count, vectors, size / kWidth, query + r * (size / kWidth),
                                       size / kWidth, 1,
                                       keys + block * (size / kWidth) * kKeyBlock + span.begin, kKeyBlock,
                                       scores, kKeyBlock, s.scale * kLog2e);
      if (span.masked && !visibility_ready) block_visibility(s, block, visibility);
      visibility_ready = visibility_ready || span.masked;
      for (int64_t j = 0; j < count; ++j) {
        if (span.masked) {
          mask_row(visibility + span.begin, block * kKeyBlock + span.begin, vectors, first + (r + j) / group,
                   kMinusInfinity, scores + j * kKeyBlock);
        }
        float* most = scratch.greatest + (r + j) * kLanes;
        hn::StoreU(greatest(vectors, scores + j * kKeyBlock, hn::LoadU(kFloatTag, most)), kFloatTag, most);
      }
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    float* most = scratch.greatest + r * kLanes;
    *most = hn::GetLane(hn::MaxOfLanes(kFloatTag, hn::LoadU(kFloatTag, most)));
  }
  size_t next_span = 0;
  for (size_t i = 0; i < scratch.blocks.size(); ++i) {
    const Operand* block_values = values + scratch.blocks[i] * padded * (kKeyBlock / kWidth);
    for (int64_t r = 0; r < rows; r += kTileRows) {
      const int64_t count = std::min<int64_t>(kTileRows, rows - r);
      const KeySpan span = scratch.spans[next_span++];
      if (span.begin == span.end) continue;
      const int64_t width = span.end - span.begin;
      float* scores = scratch.scores + (static_cast<int64_t>(i) * rows + r) * kKeyBlock + span.begin;
      auto* weights = reinterpret_cast<Operand*>(scores);
      for (int64_t j = 0; j < count; ++j) {
        double* sum = scratch.sums.data() + (r + j) * kWideLanes;
        hn::StoreU(softmax_weights(width / kLanes, scratch.greatest[(r + j) * kLanes], scores + j * kKeyBlock,
                                   weights + j * kKeyBlock, hn::LoadU(WideTag(), sum)),
                   WideTag(), sum);
      }
      multiply<Into::add>(count, padded / kLanes, width / kWidth, weights, kKeyBlock, 1,
                          block_values + span.begin / kWidth * padded, padded, scratch.output + r * padded,
                          padded);
    }
  }

  for (int64_t r = 0; r < rows; ++r) {
    const int64_t token = first + r / group, head = kv_head * group + r % group;
    const double sum = sum_of_lanes(hn::LoadU(WideTag(), scratch.sums.data() + r * kWideLanes));
    store_output(scratch.output + r * padded, size, sum, row_of<T>(out, token, head));
    lse[head * s.tokens + token] =
        sum == 0.0 ? kMinusInfinity
                   : (scratch.greatest[r * kLanes] + std::log2(static_cast<float>(sum))) * kLn2;
  }
}

template <typename T, typename Operand>
void forward_typed(CpuBackend& backend, const AttentionShape& s, const HeadsView& q, const HeadsView& k,
                   const HeadsView& v, const HeadsView& out, float* lse) {
  const MaskSummary mask(s);
  const int64_t size = s.head_size, padded = round_up(size, kLanes);
  const int64_t key_blocks = mask.key_blocks();
  const int64_t query_tokens = forward_query_tokens(s);
  const int64_t query_blocks = (s.tokens + query_tokens - 1) / query_tokens;
  const int threads = backend.num_threads();
  const int64_t scratch_size =
      ForwardScratch::floats(query_tokens * s.group, size, padded, key_blocks * kKeyBlock);

  const int64_t block_keys = size * kKeyBlock / kPerOperand<Operand>;
  const int64_t block_values = padded * kKeyBlock / kPerOperand<Operand>;
  const Tensor packed_keys = backend.allocate(DType::f32, {s.kv_heads * key_blocks, block_keys});
  const Tensor packed_values = backend.allocate(DType::f32, {s.kv_heads * key_blocks, block_values});
  const Tensor scratch = backend.allocate(DType::f32, {threads, scratch_size});
  auto* keys = static_cast<Operand*>(packed_keys.data);
  auto* values = static_cast<Operand*>(packed_values.data);

#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < s.kv_heads * key_blocks; ++i) {
      const int64_t head = i / key_blocks, token = i % key_blocks * kKeyBlock;
      const int64_t count = std::min(kKeyBlock, s.tokens - token);
      pack_transposed(row_of<T>(k, token, head), k.row_stride, count, size, keys + i * block_keys);
      // Weights behind the last token are 0, and 0 * whatever lay here must be 0 too.
      pack_steps(row_of<T>(v, token, head), v.row_stride, count, kKeyBlock, size, padded,
                 values + i * block_values);
    }
    ForwardScratch own(scratch.as<float>() + omp_get_thread_num() * scratch_size, query_tokens * s.group,
                       size, padded);
    // The last queries see the most keys: longest first.
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = s.kv_heads * query_blocks - 1; i >= s.kv_heads * (s.first_query / query_tokens); --i) {
      const int64_t head = i % s.kv_heads, first = i / s.kv_heads * query_tokens;
      forward_block<T>(s, mask, q, keys + head * key_blocks * block_keys,
                       values + head * key_blocks * block_values, padded, head, first,
                       std::min(first + query_tokens, s.tokens) - 1, own, out, lse);
    }
  }
}

void attention_forward(CpuBackend& backend, const AttentionShape& s, const HeadsView& q, const HeadsView& k,
                       const HeadsView& v, const HeadsView& out, float* lse) {
  if (q.dtype == DType::bf16) {
    with_operand<bf16>(
        [&](auto operand) { forward_typed<bf16, decltype(operand)>(backend, s, q, k, v, out, lse); });
  } else {
    forward_typed<float, float>(backend, s, q, k, v, out, lse);
  }
}

// ---- backward
//
// With P = exp(S - lse), D = rowsum(dO * O):
//   dV = P^T dO,  dS = P * (dO V^T - D),  dK = scale * dS^T Q,  dQ = scale * dS K.
// One task is a block of keys: it walks the query blocks that see it upwards and owns its dK and dV. Each query
// block's dQ takes the contributions of its key blocks in rising order: a task waits its turn. Tasks are claimed in
// rising order too, so the one that is waited for is always running; they follow each other as in a pipeline.

// An even number, so that no pair of rows lies in two blocks.
HWY_INLINE int64_t backward_query_tokens(int64_t group) {
  return std::clamp<int64_t>(96 / group, 8, 64) / 2 * 2;
}

// What products take as it is where operands are float32, and in two layouts where they are pairs: as rows, and as
// steps of a product.
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

// Rows are read six at a time, a pattern that no hardware prefetcher follows; from the third-level cache each strip
// would wait for its first touch.
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
    for (int64_t task; (task = next_task.fetch_add(1)) < s.kv_heads * key_blocks;) {
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
namespace {

HWY_EXPORT(attention_forward);
HWY_EXPORT(attention_backward);

AttentionShape shape_of(const HeadsView& q, const HeadsView& k, const std::vector<int32_t>& visible_until,
                        float scale, int64_t first_query) {
  return {q.tokens, k.heads, q.heads / k.heads, q.head_size, visible_until.data(), scale, first_query};
}

}  // namespace

void CpuBackend::attention(const HeadsView& q, const HeadsView& k, const HeadsView& v, const Tensor&,
                           const std::vector<int32_t>& visible_until_host, float scale, const HeadsView& out,
                           const Tensor& lse, int64_t first_query) {
  if (q.tokens == 0) return;
  HWY_DYNAMIC_DISPATCH(attention_forward)
  (*this, shape_of(q, k, visible_until_host, scale, first_query), q, k, v, out, lse.as<float>());
}

void CpuBackend::attention_backward(const HeadsView& dout, const HeadsView& q, const HeadsView& k,
                                    const HeadsView& v, const HeadsView& out, const Tensor& lse,
                                    const Tensor&, const std::vector<int32_t>& visible_until_host,
                                    float scale, const HeadsView& dq, const HeadsView& dk,
                                    const HeadsView& dv, int64_t first_query) {
  if (q.tokens == 0) return;
  HWY_DYNAMIC_DISPATCH(attention_backward)
  (*this, shape_of(q, k, visible_until_host, scale, first_query), dout, q, k, v, out, lse.as<float>(), dq, dk,
   dv);
}

}  // namespace merf
#endif
