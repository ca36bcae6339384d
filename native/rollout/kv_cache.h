// The keys and values of all layers in pages.
//
// Everything of one page, the keys of each layer and then the values of each, is one piece of memory, so that
// a cache grows by memory behind it and what it holds stays where it is. The operators see one layer at a
// time: pages of that layer are as many numbers apart as a piece has parts.
#pragma once

#include <vector>

#include "backend/backend.h"
#include "model/config.h"

namespace merf {

class KvCache {
 public:
  // A cache without pages.
  explicit KvCache(const ModelConfig& config) : config_(config) {}

  static int64_t page_bytes(const ModelConfig& config) {
    return 2 * config.layers * part_size(config) * static_cast<int64_t>(size_of(config.dtype));
  }
  static int32_t pages_for(int64_t tokens) {
    return static_cast<int32_t>((tokens + kPageTokens - 1) / kPageTokens);
  }

  // The cache of `pages` pages stands in `memory` from now on.
  void stand_in(const Tensor& memory, int32_t pages) {
    layers_.clear();
    const int64_t parts = 2 * config_.layers;
    for (int64_t i = 0; i < config_.layers; ++i) {
      layers_.push_back({part(memory, pages, i), part(memory, pages, parts / 2 + i)});
    }
  }

  const PagedLayer& layer(int64_t i) const { return layers_[static_cast<size_t>(i)]; }
  // The page's number for operators on one layer.
  int32_t number_of(int32_t page) const { return page * static_cast<int32_t>(2 * config_.layers); }
  // The slot of a token in a page, as in cache_write.
  int32_t slot_of(int32_t page, int32_t offset) const {
    return number_of(page) * static_cast<int32_t>(kPageTokens) + offset;
  }

 private:
  static int64_t part_size(const ModelConfig& config) {
    return config.kv_heads * kPageTokens * config.head_size;
  }
  // Part `index` of every page.
  Tensor part(const Tensor& memory, int64_t pages, int64_t index) const {
    Tensor tensor = memory;
    // The arena owns the memory: it can give it back to the device though the cache still names it.
    tensor.storage.reset();
    tensor.dtype = config_.dtype;
    tensor.rank = 4;
    tensor.shape = {2 * config_.layers * pages - index, config_.kv_heads, kPageTokens, config_.head_size};
    tensor.data = static_cast<char*>(memory.data) +
                  static_cast<size_t>(index * part_size(config_)) * size_of(config_.dtype);
    return tensor;
  }

  const ModelConfig& config_;
  std::vector<PagedLayer> layers_;
};

}  // namespace merf
