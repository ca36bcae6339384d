#include "engine.h"

#include <chrono>
#include <map>
#include <thread>
#include <tuple>

namespace merf {
namespace {

struct Registry {
  std::mutex mutex;
  // The engines by device, by the threads asked for as well as by those there are, and whether they profile.
  std::map<std::tuple<std::string, int, bool>, Engine*> engines;
};

// Never destroyed: threads use it until the process is gone.
Registry& registry() {
  static Registry* const registry = new Registry;
  return *registry;
}

}  // namespace

Engine& Engine::open(const std::string& device, int threads, bool profile) {
  Registry& all = registry();
  std::lock_guard lock(all.mutex);
  if (device == "cuda") threads = 0;  // it has none of the host's
  Engine*& asked = all.engines[{device, threads, profile}];
  if (asked != nullptr) return *asked;
  std::shared_ptr<Backend> backend;
  try {
    backend = open_backend(device, threads);
  } catch (...) {
    all.engines.erase({device, threads, profile});
    throw;
  }
  Engine*& resolved = all.engines[{device, backend->info().threads, profile}];
  if (resolved == nullptr) {
    std::shared_ptr<ProfiledBackend> profiled;
    if (profile) backend = profiled = std::make_shared<ProfiledBackend>(std::move(backend));
    resolved = new Engine(std::move(backend), profiled.get());
  }
  asked = resolved;
  return *asked;
}

Engine::Engine(std::shared_ptr<Backend> backend, ProfiledBackend* profiled)
    : backend_(std::move(backend)), profiled_(profiled), arena_(*backend_) {}

void Engine::post(std::function<void()> job) {
  {
    std::lock_guard lock(mutex_);
    jobs_.push_back(std::move(job));
    if (!started_) {
      std::thread([this] { work(); }).detach();
      started_ = true;
    }
  }
  posted_.notify_one();
}

void Engine::work() {
  std::unique_lock lock(mutex_);
  while (true) {
    posted_.wait(lock, [this] { return !jobs_.empty(); });
    std::function<void()> job = std::move(jobs_.front());
    jobs_.pop_front();
    busy_ = true;
    lock.unlock();
    job();
    job = nullptr;
    lock.lock();
    busy_ = false;
    if (jobs_.empty()) idle_.notify_all();
  }
}

void Engine::wait_until_idle(double seconds) {
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
  Registry& all = registry();
  std::lock_guard lock(all.mutex);
  for (const auto& [key, engine] : all.engines) {
    std::unique_lock engine_lock(engine->mutex_);
    engine->idle_.wait_until(engine_lock, deadline, [e = engine] { return e->jobs_.empty() && !e->busy_; });
  }
}

}  // namespace merf
