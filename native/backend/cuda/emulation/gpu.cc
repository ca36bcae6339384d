// The emulated GPU behind gpu.h: work runs as soon as it is enqueued.
//
// MERF_EMULATION_SEED chooses the order in which a block's threads run, MERF_EMULATION_MEMORY how many bytes the
// emulated GPU has; both are for tests.
#include "backend/cuda/gpu.h"

#include <omp.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <unordered_map>
#include <vector>

#include "backend/cuda/emulation/memory.h"

namespace merf::cuda {
namespace {

constexpr size_t kMemory = size_t{4} << 30;

uint64_t number_from(const char* variable, uint64_t otherwise) {
  const char* text = std::getenv(variable);
  return text == nullptr || *text == '\0' ? otherwise : std::strtoull(text, nullptr, 10);
}

struct Block {
  void* data;
  size_t bytes;
};

// As on the real one, all recordings use the same memory.
struct RecordingMemory {
  ~RecordingMemory() {
    for (const Block& block : idle) emulation::free(block.data);
  }
  std::vector<Block> idle;  // allocated and freed while work was recorded
};

class EmulatedRecording final : public Recording {
 public:
  explicit EmulatedRecording(std::shared_ptr<RecordingMemory> memory) : memory(std::move(memory)) {}
  std::vector<std::function<void()>> work;
  const std::shared_ptr<RecordingMemory> memory;
};

// As on a real one the bytes are there when somebody has waited for them, and not before.
class EmulatedDownload final : public GpuDownload {
 public:
  explicit EmulatedDownload(const std::unique_ptr<EmulatedRecording>& recording, size_t bytes)
      : recording_(recording), host_(bytes), on_their_way_(bytes) {}
  void start(const void* device, size_t bytes) override {
    if (recording_) throw Error("INTERNAL", "Expected no download while work is recorded");
    std::memcpy(on_their_way_.data(), device, bytes);
    std::memset(host_.data(), emulation::kPoison, host_.size());
    started_ = bytes;
  }
  const void* wait() override {
    std::memcpy(host_.data(), on_their_way_.data(), started_);
    return host_.data();
  }

 private:
  const std::unique_ptr<EmulatedRecording>& recording_;
  std::vector<char> host_, on_their_way_;
  size_t started_ = 0;
};

}  // namespace

struct Gpu::State {
  explicit State(int threads)
      : memory(number_from("MERF_EMULATION_MEMORY", kMemory)),
        emulator(threads, number_from("MERF_EMULATION_SEED", 0)) {}
  const size_t memory;
  emulation::Emulator emulator;
  std::unique_ptr<EmulatedRecording> recording;
  std::weak_ptr<RecordingMemory> recording_memory;
  std::unordered_map<void*, size_t> recorded_memory;  // allocated while recording and not freed yet
  std::vector<void*> freed_while_recording;           // allocated before
};

Gpu::Gpu(int threads) {
  properties_.host_threads = threads > 0 ? threads : std::max(1, omp_get_num_procs());
  state_ = std::make_unique<State>(properties_.host_threads);
  properties_.name = "emulated on the host";
  properties_.major = 9;
  properties_.multiprocessors = 2;
  properties_.shared_bytes = 227 << 10;
  properties_.total_bytes = state_->memory;
}

Gpu::~Gpu() = default;

emulation::Emulator& Gpu::emulator() { return state_->emulator; }

size_t Gpu::free_bytes() {
  const size_t used = emulation::allocated();
  return used > state_->memory ? 0 : state_->memory - used;
}

void Gpu::enqueue(std::function<void()> work) {
  if (state_->recording) {
    state_->recording->work.push_back(std::move(work));
  } else {
    work();
  }
}

void* Gpu::allocate(size_t bytes) {
  State& s = *state_;
  if (s.recording) {
    auto& idle = s.recording->memory->idle;
    auto best = idle.end();
    for (auto it = idle.begin(); it != idle.end(); ++it) {
      if (it->bytes >= bytes && (best == idle.end() || it->bytes < best->bytes)) best = it;
    }
    if (best != idle.end()) {
      void* data = best->data;
      s.recorded_memory[data] = best->bytes;
      idle.erase(best);
      return data;
    }
  }
  void* data = emulation::allocate(bytes, s.memory);
  if (data != nullptr && s.recording) s.recorded_memory[data] = bytes;
  return data;
}

void Gpu::free(void* data) noexcept {
  State& s = *state_;
  if (!s.recording) {
    emulation::free(data);
    return;
  }
  const auto found = s.recorded_memory.find(data);
  if (found == s.recorded_memory.end()) {
    s.freed_while_recording.push_back(data);
    return;
  }
  s.recording->memory->idle.push_back({data, found->second});
  s.recorded_memory.erase(found);
}

void Gpu::upload(void* device, const void* host, size_t bytes) {
  if (state_->recording) throw Error("INTERNAL", "Expected no upload while work is recorded");
  std::memcpy(device, host, bytes);
}
void Gpu::download(void* host, const void* device, size_t bytes) {
  if (state_->recording) throw Error("INTERNAL", "Expected no download while work is recorded");
  std::memcpy(host, device, bytes);
}
std::unique_ptr<GpuDownload> Gpu::make_download(size_t bytes) {
  return std::make_unique<EmulatedDownload>(state_->recording, bytes);
}
void Gpu::copy(void* to, const void* from, size_t bytes) {
  enqueue([=] { std::memmove(to, from, bytes); });
}
void Gpu::fill(void* to, int byte, size_t bytes) {
  enqueue([=] { std::memset(to, byte, bytes); });
}
void Gpu::synchronize() {
  if (state_->recording) throw Error("INTERNAL", "Expected no synchronisation while work is recorded");
}

void Gpu::begin_recording() {
  State& s = *state_;
  std::shared_ptr<RecordingMemory> memory = s.recording_memory.lock();
  if (!memory) s.recording_memory = memory = std::make_shared<RecordingMemory>();
  s.recording = std::make_unique<EmulatedRecording>(std::move(memory));
}

std::unique_ptr<Recording> Gpu::end_recording(std::unique_ptr<Recording> before) {
  State& s = *state_;
  std::unique_ptr<EmulatedRecording> recording = std::move(s.recording);
  const bool held = !s.recorded_memory.empty();
  s.recorded_memory.clear();
  for (void* data : s.freed_while_recording) emulation::free(data);
  s.freed_while_recording.clear();
  if (held)
    throw Error("INTERNAL",
                "Expected memory that is allocated while work is recorded to be freed before its end");
  if (before) {
    auto& work = static_cast<EmulatedRecording&>(*before).work;
    if (work.size() == recording->work.size()) {
      work = std::move(recording->work);
      return before;
    }
  }
  return recording;
}

void Gpu::play(Recording& recording) {
  for (const auto& work : static_cast<EmulatedRecording&>(recording).work) work();
}

}  // namespace merf::cuda
