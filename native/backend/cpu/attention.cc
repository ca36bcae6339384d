// Attention over the token forest, blockwise as in FlashAttention (Dao 2023), so that memory is linear in
// tokens. Its backward is in attention_backward.cc.
//
// All query heads that share a key/value head are rows of one product: row t * group + g is query head g of
// token t. The forward takes all the scores of a block of rows, and then their weights and outputs
// (attention-inl.h says what that is good for); so many rows that their scores stay in the cache. Keys are
// packed in transposed blocks of kKeyBlock so that scores and outputs are outer products of register tiles.
// Blocks that the mask empties are skipped, blocks that it leaves whole are not masked
// (attention_mask-inl.h).
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "backend/cpu/attention.cc"
#include "backend/cpu/simd_targets.h"
// The targets are chosen above.
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include <omp.h>

#include <vector>

#include "backend/cpu/attention-inl.h"
#include "backend/cpu/attention_mask-inl.h"
#include "backend/cpu/cpu_backend.h"

HWY_BEFORE_NAMESPACE();
namespace merf {
namespace HWY_NAMESPACE {

// Tokens in a query block: so many rows that their scores stay in the second-level cache, where that leaves
// enough of them for the keys that they share.
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
      if (backend.interrupted()) continue;
      const int64_t head = i % s.kv_heads, first = i / s.kv_heads * query_tokens;
      forward_block<T>(s, mask, q, keys + head * key_blocks * block_keys,
                       values + head * key_blocks * block_values, padded, head, first,
                       std::min(first + query_tokens, s.tokens) - 1, own, out, lse);
    }
  }
  backend.check_interrupted();
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

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace merf
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace merf {

HWY_EXPORT(attention_forward);

void CpuBackend::attention(const HeadsView& q, const HeadsView& k, const HeadsView& v, const Tensor&,
                           const std::vector<int32_t>& visible_until_host, float scale, const HeadsView& out,
                           const Tensor& lse, int64_t first_query) {
  if (q.tokens == 0) return;
  HWY_DYNAMIC_DISPATCH(attention_forward)
  (*this, AttentionShape(q, k, visible_until_host, scale, first_query), q, k, v, out, lse.as<float>());
}

}  // namespace merf
#endif
