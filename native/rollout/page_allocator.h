// Which pages of the key/value cache are in use, and by how many.
#pragma once

#include <cstdint>
#include <vector>

#include "backend/tensor.h"

namespace merf {

class PageAllocator {
 public:
  explicit PageAllocator(int32_t pages) : references_(static_cast<size_t>(pages), 0) {
    free_.reserve(references_.size());
    for (int32_t page = pages; page-- > 0;) free_.push_back(page);
  }

  int32_t total() const { return static_cast<int32_t>(references_.size()); }
  int32_t available() const { return static_cast<int32_t>(free_.size()); }

  // A page with one reference. Throws OUT_OF_MEMORY where none is left.
  int32_t acquire() {
    if (free_.empty()) {
      throw Error("OUT_OF_MEMORY",
                  "All " + std::to_string(total()) + " pages of the key/value cache are in use");
    }
    const int32_t page = free_.back();
    free_.pop_back();
    references_[static_cast<size_t>(page)] = 1;
    return page;
  }
  void retain(int32_t page) { ++references_[static_cast<size_t>(page)]; }
  void release(int32_t page) {
    if (--references_[static_cast<size_t>(page)] == 0) free_.push_back(page);
  }

 private:
  std::vector<int32_t> references_;
  std::vector<int32_t> free_;
};

}  // namespace merf
