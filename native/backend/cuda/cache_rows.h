// Where a token's keys and values stand in the paged cache.
#pragma once

#include <cstdint>

#include "backend/backend.h"
#include "backend/cuda/primitives/device.h"

namespace merf::cuda {

// The first element of a head of the token in `slot` (0 or more), in pages [pages, kv_heads, kPageTokens, size].
__device__ inline int64_t cached_head(int slot, int kv_heads, int head, int size) {
  constexpr int kPage = static_cast<int>(kPageTokens);
  return ((int64_t{slot / kPage} * kv_heads + head) * kPage + slot % kPage) * size;
}

}  // namespace merf::cuda
