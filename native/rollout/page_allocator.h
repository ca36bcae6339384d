// Which pages of the key/value cache are in use.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "backend/tensor.h"

namespace merf {

class PageAllocator {
 public:
  explicit PageAllocator(int32_t pages = 0) { grow_to(pages); }

  int32_t total() const { return total_; }
  int32_t available() const { return static_cast<int32_t>(free_.size()); }

  // Adds pages behind those that there are, up to `pages` in all.
  void grow_to(int32_t pages) {
    if (pages <= total_) return;
    std::vector<int32_t> all;
    all.reserve(static_cast<size_t>(pages));
    for (int32_t page = pages; page-- > total_;) all.push_back(page);
    // The lowest page is handed out first.
    free_.insert(free_.begin(), all.begin(), all.end());
    free_.reserve(static_cast<size_t>(pages));
    total_ = pages;
  }
  // Hands out a page. Throws OUT_OF_MEMORY where none is left.
  int32_t acquire() {
    if (free_.empty()) {
      throw Error("OUT_OF_MEMORY",
                  "All " + std::to_string(total()) + " pages of the key/value cache are in use");
    }
    const int32_t page = free_.back();
    free_.pop_back();
    return page;
  }
  void release(int32_t page) { free_.push_back(page); }

 private:
  int32_t total_ = 0;
  std::vector<int32_t> free_;
};

}  // namespace merf
