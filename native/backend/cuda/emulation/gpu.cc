// The emulated GPU behind gpu.h: work runs as soon as it is enqueued.
//
// The environment says what the emulated GPU is like, for tests:
//   MERF_EMULATION_SEED     the order in which a block's threads run
//   MERF_EMULATION_MEMORY   how many bytes it has
//   MERF_EMULATION_SHORT    what finds no memory at its first try, each time: "an allocation", "a recording", or the
//                           name of a kernel
//   MERF_EMULATION_FAIL_AT  "rms_norm:3": the third run of the kernel rms_norm ends the GPU, as an illegal address does
//   MERF_EMULATION_CAPABILITY  its compute capability, such as 80
//   MERF_EMULATION_SHARED   how many bytes of shared memory its blocks can have
//   MERF_EMULATION_CACHE    how many bytes its second-level cache keeps
#include "backend/cuda/gpu.h"

#include <omp.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <unordered_map>
#include <vector>

#include "backend/cuda/emulation/counts.h"
#include "backend/cuda/emulation/memory.h"
#include "backend/cuda/health.h"

namespace merf::cuda {
namespace {

// Where launches are counted they are an H100's, which has more of both: how work is cut depends on them.
constexpr size_t kMemory = size_t{emulation::kCounts ? 80 : 4} << 30;
constexpr int kMultiprocessors = emulation::kCounts ? 132 : 2;
constexpr size_t kCache = size_t{50} << 20;

uint64_t number_from(const char* variable, uint64_t otherwise) {
  const char* text = std::getenv(variable);
  return text == nullptr || *text == '\0' ? otherwise : std::strtoull(text, nullptr, 10);
}

std::string text_from(const char* variable) {
  const char* text = std::getenv(variable);
  return text == nullptr ? "" : text;
}

struct Block {
  void* data;
  size_t bytes;
};

// All recordings use the same memory, as on a GPU.
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

// The bytes are there when somebody has waited for them, and not before, as on a GPU.
class EmulatedDownload final : public GpuDownload {
 public:
  // `enter` throws where the GPU is lost.
  EmulatedDownload(const std::unique_ptr<EmulatedRecording>& recording, std::function<void()> enter,
                   size_t bytes)
      : recording_(recording), enter_(std::move(enter)), host_(bytes), on_their_way_(bytes) {}
  void start(const void* device, size_t bytes) override {
    enter_();
    if (recording_) throw Error("INTERNAL", "Expected no download while work is recorded");
    std::memcpy(on_their_way_.data(), device, bytes);
    std::memset(host_.data(), emulation::kPoison, host_.size());
    started_ = bytes;
    if constexpr (emulation::kCounts) {
      ++emulation::counts().transfers.downloads;
      emulation::counts().transfers.downloaded += static_cast<int64_t>(bytes);
    }
  }
  const void* wait() override {
    enter_();
    std::memcpy(host_.data(), on_their_way_.data(), started_);
    return host_.data();
  }

 private:
  const std::unique_ptr<EmulatedRecording>& recording_;
  const std::function<void()> enter_;
  std::vector<char> host_, on_their_way_;
  size_t started_ = 0;
};

}  // namespace

struct Gpu::State {
  explicit State(int threads)
      : memory(number_from("MERF_EMULATION_MEMORY", kMemory)),
        shared(std::min<size_t>(number_from("MERF_EMULATION_SHARED", emulation::kMostShared),
                                emulation::kMostShared)),
        emulator(threads, number_from("MERF_EMULATION_SEED", 0), shared),
        short_at(text_from("MERF_EMULATION_SHORT")),
        failing_kernel(text_from("MERF_EMULATION_FAIL_AT")) {
    const size_t colon = failing_kernel.find(':');
    if (colon == std::string::npos) return;
    runs_until_failure = std::strtoull(failing_kernel.c_str() + colon + 1, nullptr, 10);
    failing_kernel.resize(colon);
  }

  // What failed a while ago shows in a call that waits, or moves memory, or allocates, as on a GPU.
  void enter(const char* what) {
    health.check();
    if (broken) health.lose(what, "an illegal memory access was encountered");
  }
  bool with_room(const char* what, const std::function<bool()>& ask) {
    if (short_at != what && ask()) return true;
    if (!ask()) return false;
    health.met_by_second_try(what);
    return true;
  }

  const size_t memory, shared;
  emulation::Emulator emulator;
  Enqueue enqueue;
  Health health;
  const std::string short_at;
  std::string failing_kernel;
  uint64_t runs_until_failure = 0;
  bool broken = false;
  std::unique_ptr<EmulatedRecording> recording;
  std::weak_ptr<RecordingMemory> recording_memory;
  std::unordered_map<void*, size_t> recorded_memory;  // allocated while recording and not freed yet
  std::vector<void*> freed_while_recording;           // allocated before
};

Gpu::Gpu(int threads) {
  properties_.host_threads = threads > 0 ? threads : std::max(1, omp_get_num_procs());
  state_ = std::make_unique<State>(properties_.host_threads);
  properties_.name = "emulated on the host";
  const auto capability = static_cast<int>(number_from("MERF_EMULATION_CAPABILITY", 90));
  properties_.major = capability / 10;
  properties_.minor = capability % 10;
  properties_.multiprocessors = kMultiprocessors;
  properties_.shared_bytes = state_->shared;
  properties_.cache_bytes = number_from("MERF_EMULATION_CACHE", kCache);
  properties_.total_bytes = state_->memory;
  state_->enqueue = [this](std::function<void()> work) { enqueue(std::move(work)); };
}

Gpu::~Gpu() = default;

std::optional<TensorMap> Gpu::tensor_map(const HeadsView& view, int rows) {
  return TensorMap{static_cast<const char*>(view.data),
                   {view.head_size, view.heads, view.tokens},
                   {2, 2 * view.head_size, 2 * view.row_stride},
                   rows};
}

emulation::Emulator& Gpu::emulator() { return state_->emulator; }

void* Gpu::stream() const { return &state_->enqueue; }

void Gpu::check_alive(const char* what) { state_->enter(what); }
bool Gpu::with_room(const char* what, const std::function<bool()>& ask) {
  return state_->with_room(what, ask);
}
int64_t Gpu::memory_retries() const { return state_->health.memory_retries(); }

size_t Gpu::free_bytes() {
  state_->enter("reading its free memory");
  const size_t used = emulation::allocated();
  return used > state_->memory ? 0 : state_->memory - used;
}

void Gpu::enqueue(std::function<void()> work) {
  if (state_->recording) {
    state_->recording->work.push_back(std::move(work));
  } else if (!state_->broken) {
    work();
  }
}

void Gpu::begin_launch(const char* kernel) {
  state_->health.check();
  state_->with_room(kernel, [] { return true; });
  state_->health.started(kernel);
}

bool Gpu::begin_kernel(const char* kernel) {
  State& s = *state_;
  if (s.failing_kernel == kernel && s.runs_until_failure > 0 && --s.runs_until_failure == 0) s.broken = true;
  return !s.broken;
}

void* Gpu::allocate(size_t bytes) {
  State& s = *state_;
  s.enter("an allocation");
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
  void* data = nullptr;
  s.with_room("an allocation", [&] {
    data = emulation::allocate(bytes, s.memory);
    return data != nullptr;
  });
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
  state_->enter("an upload");
  if (state_->recording) throw Error("INTERNAL", "Expected no upload while work is recorded");
  std::memcpy(device, host, bytes);
  if constexpr (emulation::kCounts) {
    ++emulation::counts().transfers.uploads;
    emulation::counts().transfers.uploaded += static_cast<int64_t>(bytes);
  }
}
void Gpu::download(void* host, const void* device, size_t bytes) {
  state_->enter("a download");
  if (state_->recording) throw Error("INTERNAL", "Expected no download while work is recorded");
  std::memcpy(host, device, bytes);
  if constexpr (emulation::kCounts) {
    ++emulation::counts().transfers.downloads;
    emulation::counts().transfers.downloaded += static_cast<int64_t>(bytes);
  }
}
std::unique_ptr<GpuDownload> Gpu::make_download(size_t bytes) {
  return std::make_unique<EmulatedDownload>(
      state_->recording, [state = state_.get()] { state->enter("a download"); }, bytes);
}
void Gpu::copy(void* to, const void* from, size_t bytes) {
  state_->enter("a copy");
  enqueue([=] {
    if (!emulation::kernels_passed_over()) std::memmove(to, from, bytes);
    if (bytes > 0) emulation::count_launch("copy", bytes, bytes);
  });
}
void Gpu::fill(void* to, int byte, size_t bytes) {
  state_->enter("clearing memory");
  enqueue([=] {
    if (!emulation::kernels_passed_over()) std::memset(to, byte, bytes);
    if (bytes > 0) emulation::count_launch("fill", 0, bytes);
  });
}
void Gpu::synchronize() {
  state_->enter("waiting for it");
  if (state_->recording) throw Error("INTERNAL", "Expected no synchronisation while work is recorded");
  if constexpr (emulation::kCounts) ++emulation::counts().transfers.synchronizations;
}

void Gpu::begin_recording() {
  State& s = *state_;
  s.enter("waiting for it");
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
  s.with_room("a recording", [] { return true; });
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
  state_->enter("playing a recording");
  if constexpr (emulation::kCounts) ++emulation::counts().transfers.plays;
  for (const auto& work : static_cast<EmulatedRecording&>(recording).work) work();
}

}  // namespace merf::cuda
