#include "engine.h"

#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <system_error>
#include <tuple>

namespace merf {
namespace {

// A running job has this long to end when the process does.
constexpr double kExitSeconds = 2.0;

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
    : backend_(std::move(backend)), profiled_(profiled), arena_(*backend_) {
  halt_at_exit();
}

void Engine::post(std::function<void()> job, std::shared_ptr<Cancel> cancel) {
  {
    std::lock_guard lock(mutex_);
    if (!started_) {
      try {
        std::thread([this] { work(); }).detach();
      } catch (const std::system_error& error) {
        throw Error("OUT_OF_MEMORY", std::string("Could not start the engine's thread: ") + error.what());
      }
      started_ = true;
    }
    jobs_.push_back({std::move(job), std::move(cancel)});
  }
  posted_.notify_one();
}

void Engine::work() {
  std::unique_lock lock(mutex_);
  thread_ = std::this_thread::get_id();
  uint64_t done = 0;
  while (true) {
    posted_.wait(lock, [this] { return !jobs_.empty() && !halted_; });
    Job job = std::move(jobs_.front());
    jobs_.pop_front();
    running_ = job.cancel ? job.cancel : std::make_shared<Cancel>();
    busy_ = true;
    lock.unlock();
    backend_->set_interrupt(&running_->flag());
    job.run();
    job = {};
    backend_->set_interrupt(nullptr);
    // What a job was the first to need may have brought handlers of its own, which run before those that were there.
    ++done;
    if ((done & (done - 1)) == 0) halt_at_exit();
    lock.lock();
    running_ = nullptr;
    busy_ = false;
    idle_.notify_all();
  }
}

void Engine::destroy(std::function<void()> job) noexcept {
  {
    std::unique_lock lock(mutex_);
    if (std::this_thread::get_id() == thread_) {
      lock.unlock();
      job();
      return;
    }
  }
  try {
    post(std::move(job));
  } catch (...) {
    // Without the thread or the memory for it nothing can be destroyed: what is left goes with the process.
  }
}

bool Engine::halt_all(double seconds) {
  const auto deadline =
      std::chrono::steady_clock::now() +
      std::chrono::duration_cast<std::chrono::steady_clock::duration>(std::chrono::duration<double>(seconds));
  Registry& all = registry();
  std::lock_guard lock(all.mutex);
  for (const auto& [key, engine] : all.engines) {
    if (engine == nullptr) continue;
    std::lock_guard engine_lock(engine->mutex_);
    engine->halted_ = true;
    if (engine->running_) engine->running_->abandon();
  }
  bool idle = true;
  for (const auto& [key, engine] : all.engines) {
    if (engine == nullptr) continue;
    std::unique_lock engine_lock(engine->mutex_);
    idle = engine->idle_.wait_until(engine_lock, deadline, [e = engine] { return !e->busy_; }) && idle;
  }
  return idle;
}

// However the process comes to exit(), and whoever listens or no longer does (process.reallyExit tells nobody): what
// its handlers tear down, such as the code that libxsmm has generated, is in use as long as a job runs. The last
// handler that was registered is the first to run.
void Engine::halt_at_exit() {
#if defined(__GLIBC__)
  on_exit(
      [](int status, void*) {
        if (halt_all(kExitSeconds)) return;
        // A job that cannot be ended, such as one that waits for a device: nothing may be torn down.
        std::fflush(nullptr);
        _exit(status);
      },
      nullptr);
#else
  std::atexit([] { halt_all(kExitSeconds); });
#endif
}

}  // namespace merf
