// What has gone wrong on a GPU so far. Some failures end a CUDA context: every later call fails as well, with the same
// words or with others, and whatever it holds is lost. The first of them is kept here and told by all that follows.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <mutex>
#include <string>

#include "backend/tensor.h"

namespace merf::cuda {

class Health {
 public:
  // Notes the kernel, or other work, that is being started; the name outlives this. A failure shows in a later call
  // than the one that started what failed.
  void started(const char* work) {
    const uint64_t at = started_.fetch_add(1, std::memory_order_relaxed);
    last_[at % last_.size()].store(work, std::memory_order_relaxed);
  }

  bool lost() const { return lost_.load(std::memory_order_acquire); }
  // Throws DEVICE_LOST, with the first failure, where the GPU is lost.
  void check() const {
    if (lost()) throw Error("DEVICE_LOST", message_);
  }
  // Keeps the failure where it is the first, and throws as check does. `what` is the call in which it showed.
  [[noreturn]] void lose(const std::string& what, const std::string& failure) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (!lost()) {
        message_ = "The GPU was lost: " + failure + ", seen at " + what + "; " + last_started() +
                   ". What was on it is gone, and only another process can use it";
        lost_.store(true, std::memory_order_release);
      }
    }
    throw Error("DEVICE_LOST", message_);
  }

  // Counts a request that was met only after the memory pool had given back what it held unused; `what` is told on
  // stderr, the first time.
  void met_by_second_try(const char* what) {
    if (memory_retries_.fetch_add(1, std::memory_order_relaxed) > 0) return;
    std::fprintf(
        stderr,
        "merf: the GPU had no memory left for %s until its pool gave back what it held unused; this is "
        "slow and is counted from now on (memoryRetries)\n",
        what);
  }
  int64_t memory_retries() const { return memory_retries_.load(std::memory_order_relaxed); }

 private:
  // The oldest first.
  std::string last_started() const {
    const uint64_t count = started_.load(std::memory_order_relaxed);
    if (count == 0) return "no kernel had been started";
    std::string names;
    for (uint64_t at = count > last_.size() ? count - last_.size() : 0; at < count; ++at) {
      names +=
          (names.empty() ? "" : ", ") + std::string(last_[at % last_.size()].load(std::memory_order_relaxed));
    }
    return "started last: " + names + " (CUDA_LAUNCH_BLOCKING=1 tells which of them failed)";
  }

  std::array<std::atomic<const char*>, 6> last_{};
  std::atomic<uint64_t> started_{0};
  std::atomic<bool> lost_{false};
  std::mutex mutex_;
  std::string message_;
  std::atomic<int64_t> memory_retries_{0};
};

}  // namespace merf::cuda
