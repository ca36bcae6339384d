// The keys and values of all layers in pages, and who uses which page.
#pragma once

#include <vector>

#include "backend/backend.h"
#include "model/arena.h"
#include "model/config.h"
#include "rollout/page_allocator.h"

namespace merf {

class KvCache {
 public:
  KvCache(Arena& arena, const ModelConfig& config, int32_t pages) : pages(pages) {
    for (int64_t i = 0; i < config.layers; ++i) {
      layers.push_back({arena.take(config.dtype, {pages, config.kv_heads, kPageTokens, config.head_size}),
                        arena.take(config.dtype, {pages, config.kv_heads, kPageTokens, config.head_size})});
    }
  }

  static int64_t page_bytes(const ModelConfig& config) {
    return 2 * config.layers * config.kv_heads * kPageTokens * config.head_size *
           static_cast<int64_t>(size_of(config.dtype));
  }
  static int32_t pages_for(int64_t tokens) {
    return static_cast<int32_t>((tokens + kPageTokens - 1) / kPageTokens);
  }

  std::vector<PagedLayer> layers;
  PageAllocator pages;
};

}  // namespace merf
