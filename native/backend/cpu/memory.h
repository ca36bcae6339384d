// Aligned blocks that are kept and handed out again.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <list>
#include <memory>
#include <mutex>
#include <string>

#include "backend/tensor.h"

namespace merf {

class MemoryPool : public std::enable_shared_from_this<MemoryPool> {
 public:
  MemoryPool();
  ~MemoryPool();
  MemoryPool(const MemoryPool&) = delete;
  MemoryPool& operator=(const MemoryPool&) = delete;

  // Throws Error("OUT_OF_MEMORY") rather than let the system kill the process for memory it does not have.
  std::shared_ptr<Storage> allocate(size_t bytes);
  // What could be allocated in all.
  int64_t available() const;
  int64_t used() const;
  int64_t peak() const;
  void reset_peak();

 private:
  friend class PooledStorage;
  struct Block {
    void* data;
    size_t bytes;
  };
  void release(void* data, size_t bytes);
  void drop_idle(size_t keep_bytes);

  mutable std::mutex mutex_;
  std::list<Block> idle_;  // most recently freed first
  size_t idle_bytes_ = 0;
  size_t used_ = 0;
  size_t peak_ = 0;
  size_t limit_ = 0;
  size_t unchecked_ = 0;  // taken from the system since it was asked what is left
};

// What the control groups of this process, of either version, leave it; the greatest number where they have no limit.
struct ControlGroupMemory {
  size_t limit = std::numeric_limits<size_t>::max();
  size_t available = std::numeric_limits<size_t>::max();
};
// `root` stands before the paths of /proc and /sys, for tests.
ControlGroupMemory control_group_memory(const std::string& root = "");

// Bytes that could be allocated now without swapping or being killed, as far as the system tells.
size_t available_memory();
size_t total_memory();

}  // namespace merf
