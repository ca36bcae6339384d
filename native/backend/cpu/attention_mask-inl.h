// The mask of a token forest by blocks of keys, which attention's forward and backward share: which blocks a
// stretch of queries sees, whole or in part. Include after attention-inl.h, once a target.

#ifndef MERF_BACKEND_CPU_ATTENTION_SHAPE_
#define MERF_BACKEND_CPU_ATTENTION_SHAPE_

#include <algorithm>
#include <cstdint>
#include <vector>

#include "backend/tensor.h"

namespace merf {

struct AttentionShape {
  int64_t tokens, kv_heads, group, head_size;
  const int32_t* visible_until;
  float scale;
  int64_t first_query;

  AttentionShape(const HeadsView& q, const HeadsView& k, const std::vector<int32_t>& visible_until,
                 float scale, int64_t first_query)
      : tokens(q.tokens),
        kv_heads(k.heads),
        group(q.heads / k.heads),
        head_size(q.head_size),
        visible_until(visible_until.data()),
        scale(scale),
        first_query(first_query) {}
};

template <typename T>
T* row_of(const HeadsView& view, int64_t token, int64_t head) {
  return static_cast<T*>(view.data) + token * view.row_stride + head * view.head_size;
}

}  // namespace merf

#endif

#if defined(MERF_BACKEND_CPU_ATTENTION_MASK_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MERF_BACKEND_CPU_ATTENTION_MASK_INL_H_
#undef MERF_BACKEND_CPU_ATTENTION_MASK_INL_H_
#else
#define MERF_BACKEND_CPU_ATTENTION_MASK_INL_H_
#endif

HWY_BEFORE_NAMESPACE();
namespace merf {
namespace HWY_NAMESPACE {

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

// The keys of one block that some query of [first, last] sees lie in [begin, end), multiples of kLanes;
// `masked` where not every such query sees all of them. begin == end: none.
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

// Writes `hidden` over those of `values` (one row of a block, from span.begin) whose key the query does not
// see.
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

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace merf
HWY_AFTER_NAMESPACE();

#endif
