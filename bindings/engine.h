// A thread that owns one backend and runs jobs on it, in order. Everything that touches device memory runs here.
#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>

#include "backend/backend.h"
#include "backend/profile.h"
#include "model/arena.h"

namespace merf {

class Engine {
 public:
  // The engine of this device and number of threads (0: as many as there are processors), made where there is none
  // yet; its thread starts with its first job. One that profiles its operators is another one. Engines live as long as the process: a thread that is being joined while static objects die is worse
  // than one that sleeps.
  static Engine& open(const std::string& device, int threads, bool profile = false);

  Backend& backend() { return *backend_; }
  // The backend as one that profiles its operators; null where the engine does not.
  ProfiledBackend* profiled() { return profiled_; }
  // arena, add_model and remove_model are for jobs only.
  Arena& arena() { return arena_; }
  // Count the models in use; with the last one goes the memory of activations.
  void add_model() { ++models_; }
  void remove_model() {
    if (--models_ == 0) arena_.free();
  }

  void post(std::function<void()> job);
  // Waits until no job is left on any engine, but not longer than this.
  static void wait_until_idle(double seconds);

 private:
  explicit Engine(std::shared_ptr<Backend> backend, ProfiledBackend* profiled);
  void work();

  std::shared_ptr<Backend> backend_;
  ProfiledBackend* profiled_;
  Arena arena_;
  std::mutex mutex_;
  std::condition_variable posted_, idle_;
  std::deque<std::function<void()>> jobs_;
  bool started_ = false, busy_ = false;
  int models_ = 0;
};

}  // namespace merf
