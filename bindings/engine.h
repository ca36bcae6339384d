// A thread that owns one backend and runs jobs on it, in order. Everything that touches device memory runs here.
#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>

#include "backend/backend.h"
#include "backend/profile.h"
#include "model/arena.h"
#include "model/cancel.h"

namespace merf {

class Engine {
 public:
  // The engine of this device and number of threads (0: as many as there are processors), made where there is none
  // yet; its thread starts with its first job. One that profiles its operators is another one. Engines live as long as
  // the process: a thread that is being joined while static objects die is worse than one that sleeps.
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

  // `cancel` ends the long operators of the job; it may be null.
  void post(std::function<void()> job, std::shared_ptr<Cancel> cancel = nullptr);

  // A state that jobs share with JavaScript, which is destroyed on the engine's thread whoever lets go of it last.
  template <typename State>
  std::shared_ptr<State> make_shared_state() {
    return std::shared_ptr<State>(new State, [this](State* state) { destroy([state] { delete state; }); });
  }

 private:
  struct Job {
    std::function<void()> run;
    std::shared_ptr<Cancel> cancel;
  };

  explicit Engine(std::shared_ptr<Backend> backend, ProfiledBackend* profiled);
  void work();
  void destroy(std::function<void()> job) noexcept;
  // Ends the running job of every engine, and lets none begin any more. Whether all have ended within that time.
  static bool halt_all(double seconds);
  static void halt_at_exit();

  std::shared_ptr<Backend> backend_;
  ProfiledBackend* profiled_;
  Arena arena_;
  std::mutex mutex_;
  std::condition_variable posted_, idle_;
  std::deque<Job> jobs_;
  std::shared_ptr<Cancel> running_;
  std::thread::id thread_;
  bool started_ = false, busy_ = false, halted_ = false;
  int models_ = 0;
};

}  // namespace merf
