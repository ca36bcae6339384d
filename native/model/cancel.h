// A request to stop, set by one thread and looked at by another between two operators.
#pragma once

#include <atomic>

#include "backend/tensor.h"

namespace merf {

class Cancel {
 public:
  void request() { requested_.store(true, std::memory_order_relaxed); }
  // Requests a stop anywhere: nobody will look at the results or at the state that is left behind.
  void abandon() {
    abandoned_.store(true, std::memory_order_relaxed);
    request();
  }
  bool requested() const { return requested_.load(std::memory_order_relaxed); }
  // What long operators look at (Backend::set_interrupt).
  const std::atomic<bool>& flag() const { return requested_; }
  void check(const char* work) const {
    if (requested()) throw Error("ABORTED", std::string(work) + " was aborted");
  }
  void check_abandoned(const char* work) const {
    if (abandoned_.load(std::memory_order_relaxed))
      throw Error("ABORTED", std::string(work) + " was abandoned");
  }

 private:
  std::atomic<bool> requested_{false};
  std::atomic<bool> abandoned_{false};
};

}  // namespace merf
