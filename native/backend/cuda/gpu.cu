// The real GPU behind gpu.h.
#include "backend/cuda/gpu.h"

#include <cuda.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <unordered_map>
#include <vector>

#include "backend/cuda/health.h"

namespace merf::cuda {
namespace {

// The first GPU that CUDA_VISIBLE_DEVICES leaves, which is the one that require_gpu looked at.
constexpr int kDevice = 0;

// The health of all GPUs of the process, which share a context, and with it their end.
Health& health() {
  static Health* const only = new Health;
  return *only;
}

// Whether a failure ends the context, so that every later call fails as well. Most failures that do are known
// by their status; for the others the next harmless call tells.
bool ends_context(cudaError_t status, cudaStream_t idle) {
  switch (status) {
    case cudaErrorIllegalAddress:
    case cudaErrorMisalignedAddress:
    case cudaErrorInvalidAddressSpace:
    case cudaErrorInvalidPc:
    case cudaErrorIllegalInstruction:
    case cudaErrorHardwareStackError:
    case cudaErrorLaunchFailure:
    case cudaErrorLaunchTimeout:
    case cudaErrorAssert:
    case cudaErrorECCUncorrectable:
    case cudaErrorNvlinkUncorrectable:
    case cudaErrorContextIsDestroyed:
      return true;
    case cudaErrorCudartUnloading:  // the process ends
      return false;
    default:
      break;
  }
  if (idle == nullptr) return false;
  const cudaError_t next = cudaStreamQuery(idle);
  cudaGetLastError();
  return next != cudaSuccess && next != cudaErrorNotReady;
}

// Calls of the CUDA runtime go to the thread's device, which others in the process may have chosen on this thread.
void use_device() {
  int current = kDevice;
  if (cudaGetDevice(&current) == cudaSuccess && current != kDevice) cudaSetDevice(kDevice);
}

std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

#if defined(MERF_SM90A)
// The driver's function, by way of the runtime: the plugin is not linked with the driver.
using EncodeTensorMap = decltype(&cuTensorMapEncodeTiled);
EncodeTensorMap find_encode_tensor_map() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  const cudaError_t status =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
#else
  const cudaError_t status =
      cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
  if (status != cudaSuccess) cudaGetLastError();
  const bool usable = status == cudaSuccess && found == cudaDriverEntryPointSuccess;
  return usable ? reinterpret_cast<EncodeTensorMap>(function) : nullptr;
}
#endif

struct Block {
  void* data;
  size_t bytes;
};

// What was allocated and freed while work was recorded. Recordings are played one after another, so all that there are
// use the same memory; it lives as long as one of them.
struct RecordingMemory {
  explicit RecordingMemory(cudaStream_t stream) : stream(stream) {}
  ~RecordingMemory() {
    for (const Block& block : idle) cudaFreeAsync(block.data, stream);
  }
  const cudaStream_t stream;
  std::vector<Block> idle;
};

class GraphRecording final : public Recording {
 public:
  GraphRecording(cudaStream_t stream, std::shared_ptr<RecordingMemory> memory)
      : memory(std::move(memory)), stream_(stream) {}
  ~GraphRecording() override {
    // The recording's last play may still run.
    cudaStreamSynchronize(stream_);
    if (graph != nullptr) cudaGraphExecDestroy(graph);
  }
  cudaGraphExec_t graph = nullptr;
  const std::shared_ptr<RecordingMemory> memory;

 private:
  const cudaStream_t stream_;
};

// Pinned memory that a download goes to, and what is reached when it has.
struct Landing {
  char* data = nullptr;
  size_t bytes = 0;
  cudaEvent_t arrived = nullptr;
};
constexpr size_t kSmallestLanding = size_t{64} << 10;

// Pinned host memory that transfers go through, in a ring: a part is written again once its last transfer is done.
constexpr size_t kPartBytes = size_t{8} << 20;
constexpr size_t kParts = 4;

}  // namespace

struct Gpu::State {
  class PinnedDownload;

  ~State() {
    // These calls fail on a GPU that is lost, and do nothing else then.
    if (stream != nullptr) cudaStreamSynchronize(stream);
    recording.reset();
    for (cudaEvent_t event : part_free) {
      if (event != nullptr) cudaEventDestroy(event);
    }
    if (pinned != nullptr) cudaFreeHost(pinned);
    for (const Landing& landing : idle_landings) {
      cudaEventDestroy(landing.arrived);
      cudaFreeHost(landing.data);
    }
    if (side_stream != nullptr) cudaStreamDestroy(side_stream);
    if (stream != nullptr) cudaStreamDestroy(stream);
    cudaGetLastError();
  }

  cudaMemPool_t pool = nullptr;
  cudaStream_t stream = nullptr;
  cudaStream_t side_stream = nullptr;  // for memory that is needed while the stream is recorded
  char* pinned = nullptr;              // [kParts, kPartBytes]
  std::array<cudaEvent_t, kParts> part_free{};
  size_t part = 0, used = 0;
  std::vector<Landing> idle_landings;
  std::unordered_map<const void*, size_t> shared_allowed;

  std::unique_ptr<GraphRecording> recording;
  std::weak_ptr<RecordingMemory> recording_memory;
  std::unordered_map<void*, size_t> recorded_memory;  // allocated while recording and not freed yet
  std::vector<void*> freed_while_recording;           // allocated before

  void enter() const {
    health().check();
    use_device();
  }

  void check(cudaError_t status, const char* what) const {
    if (status == cudaSuccess) return;
    cudaGetLastError();  // so that the next call does not report it again
    if (ends_context(status, side_stream)) health().lose(what, cudaGetErrorString(status));
    if (status == cudaErrorMemoryAllocation) {
      throw Error("OUT_OF_MEMORY", std::string("The GPU has no memory left for ") + what);
    }
    throw Error("DEVICE_FAILED",
                std::string("The GPU failed at ") + what + ": " + cudaGetErrorString(status));
  }

  // Returns what the pool holds and nobody uses to the GPU.
  void give_back() const {
    // Freed memory counts as used until the work before it is done. Nothing can be waited for while it is recorded.
    if (!recording) check(cudaStreamSynchronize(stream), "waiting for memory");
    check(cudaMemPoolTrimTo(pool, 0), "giving memory back");
  }

  // What `call` returns: of the second try where the first one lacked memory.
  template <class Call>
  cudaError_t with_room(const char* what, const Call& call) const {
    const cudaError_t first = call();
    if (first != cudaErrorMemoryAllocation) return first;
    cudaGetLastError();
    give_back();
    const cudaError_t second = call();
    if (second == cudaSuccess) health().met_by_second_try(what);
    if (second == cudaErrorMemoryAllocation) cudaGetLastError();
    return second;
  }

  // Room for up to kPartBytes, and the part that it is in.
  char* take_pinned(size_t bytes) {
    if (used + bytes > kPartBytes) {
      check(cudaEventRecord(part_free[part], stream), "an event");
      part = (part + 1) % kParts;
      used = 0;
      check(cudaEventSynchronize(part_free[part]), "waiting for a transfer");
    }
    char* at = pinned + part * kPartBytes + used;
    used += (bytes + 255) / 256 * 256;
    return at;
  }
};

// A download into pinned memory that comes from the idle landings and goes back to them: making some takes as long as a
// step.
class Gpu::State::PinnedDownload final : public GpuDownload {
 public:
  PinnedDownload(Gpu::State& state, size_t bytes);
  ~PinnedDownload() override;
  void start(const void* device, size_t bytes) override;
  const void* wait() override;

 private:
  Gpu::State& state_;
  Landing landing_;
  bool started_ = false;
};

Gpu::State::PinnedDownload::PinnedDownload(Gpu::State& state, size_t bytes) : state_(state) {
  auto& idle = state.idle_landings;
  const auto fits = [&](const Landing& landing) { return landing.bytes >= bytes; };
  const auto found = std::find_if(idle.begin(), idle.end(), fits);
  if (found != idle.end()) {
    landing_ = *found;
    idle.erase(found);
    return;
  }
  state.enter();
  landing_.bytes = std::max(bytes, kSmallestLanding);
  state.check(cudaEventCreateWithFlags(&landing_.arrived, cudaEventDisableTiming), "making an event");
  const auto pin = [&] { return cudaMallocHost(reinterpret_cast<void**>(&landing_.data), landing_.bytes); };
  const cudaError_t status = state.with_room("pinned memory", pin);
  if (status != cudaSuccess) cudaEventDestroy(landing_.arrived);
  state.check(status, "pinned memory");
}

Gpu::State::PinnedDownload::~PinnedDownload() {
  // Whoever has the memory next must not find this download still on its way.
  if (started_) cudaEventSynchronize(landing_.arrived);
  state_.idle_landings.push_back(landing_);
}

void Gpu::State::PinnedDownload::start(const void* device, size_t bytes) {
  state_.enter();
  if (state_.recording) throw Error("INTERNAL", "Expected no download while work is recorded");
  state_.check(cudaMemcpyAsync(landing_.data, device, bytes, cudaMemcpyDeviceToHost, state_.stream),
               "a download");
  state_.check(cudaEventRecord(landing_.arrived, state_.stream), "an event");
  started_ = true;
}

const void* Gpu::State::PinnedDownload::wait() {
  if (started_) {
    state_.enter();
    state_.check(cudaEventSynchronize(landing_.arrived), "a download");
  }
  started_ = false;
  return landing_.data;
}

Gpu::Gpu(int) : state_(std::make_unique<State>()) {
  State& s = *state_;
  health().check();
  // Other threads choose for themselves; this one may have a choice of its own to go back to.
  const DeviceScope scope;
  cudaDeviceProp properties{};
  s.check(cudaGetDeviceProperties(&properties, kDevice), "reading its properties");
  properties_.name = properties.name;
  properties_.major = properties.major;
  properties_.minor = properties.minor;
  properties_.multiprocessors = properties.multiProcessorCount;
  properties_.shared_bytes = properties.sharedMemPerBlockOptin;
  properties_.cache_bytes = static_cast<size_t>(properties.l2CacheSize);
  properties_.total_bytes = properties.totalGlobalMem;
  int version = 0;
  s.check(cudaDriverGetVersion(&version), "reading the driver's version");
  properties_.driver = version_text(version);
  s.check(cudaRuntimeGetVersion(&version), "reading the runtime's version");
  properties_.runtime = version_text(version);
  int pools = 0;
  s.check(cudaDeviceGetAttribute(&pools, cudaDevAttrMemoryPoolsSupported, kDevice), "reading its properties");
  if (pools == 0) {
    throw Error("DEVICE_UNAVAILABLE", "The GPU " + properties_.name +
                                          " has no memory pools as it is set up here (some virtual GPUs have "
                                          "none without unified memory)");
  }

  s.check(cudaStreamCreateWithFlags(&s.stream, cudaStreamNonBlocking), "making a stream");
  s.check(cudaStreamCreateWithFlags(&s.side_stream, cudaStreamNonBlocking), "making a stream");
  // Freed memory stays with the pool instead of going back at every synchronisation.
  s.check(cudaDeviceGetDefaultMemPool(&s.pool, kDevice), "opening its memory pool");
  uint64_t keep = UINT64_MAX;
  s.check(cudaMemPoolSetAttribute(s.pool, cudaMemPoolAttrReleaseThreshold, &keep), "its memory pool");
  const auto pin = [&] { return cudaMallocHost(reinterpret_cast<void**>(&s.pinned), kParts * kPartBytes); };
  s.check(s.with_room("pinned memory", pin), "pinned memory");
  for (cudaEvent_t& event : s.part_free) {
    s.check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "making an event");
  }
}

Gpu::~Gpu() = default;

DeviceScope::DeviceScope() {
  if (cudaGetDevice(&before_) != cudaSuccess) before_ = kDevice;
  if (before_ != kDevice) cudaSetDevice(kDevice);
}
DeviceScope::~DeviceScope() {
  if (before_ != kDevice) cudaSetDevice(before_);
}

void Gpu::check_alive(const char* what) {
  health().check();
  const cudaError_t status = cudaStreamQuery(state_->side_stream);
  if (status != cudaErrorNotReady) state_->check(status, what);
}

bool Gpu::with_room(const char* what, const std::function<bool()>& ask) {
  if (ask()) return true;
  state_->enter();
  state_->give_back();
  if (!ask()) return false;
  health().met_by_second_try(what);
  return true;
}

int64_t Gpu::memory_retries() const { return health().memory_retries(); }

cudaStream_t Gpu::stream() const { return state_->stream; }

size_t Gpu::free_bytes() {
  const State& s = *state_;
  health().check();
  const DeviceScope scope;  // any thread may ask
  size_t free = 0, total = 0;
  s.check(cudaMemGetInfo(&free, &total), "reading its free memory");
  // What the pool holds and nobody uses can be had too.
  uint64_t reserved = 0, used = 0;
  s.check(cudaMemPoolGetAttribute(s.pool, cudaMemPoolAttrReservedMemCurrent, &reserved), "its memory pool");
  s.check(cudaMemPoolGetAttribute(s.pool, cudaMemPoolAttrUsedMemCurrent, &used), "its memory pool");
  return free + static_cast<size_t>(reserved > used ? reserved - used : 0);
}

void* Gpu::allocate(size_t bytes) {
  State& s = *state_;
  s.enter();
  // A driver may find such a size invalid rather than too large.
  if (bytes > properties_.total_bytes) return nullptr;
  bytes = std::max<size_t>(bytes, 1);
  if (s.recording) {
    // What recordings have freed again, else memory from beside the stream that is recorded.
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
  const cudaStream_t stream = s.recording ? s.side_stream : s.stream;
  void* data = nullptr;
  const cudaError_t status =
      s.with_room("an allocation", [&] { return cudaMallocAsync(&data, bytes, stream); });
  if (status == cudaErrorMemoryAllocation) return nullptr;
  s.check(status, "allocating");
  if (s.recording) {
    s.check(cudaStreamSynchronize(s.side_stream), "allocating");
    s.recorded_memory[data] = bytes;
  }
  return data;
}

void Gpu::free(void* data) noexcept {
  State& s = *state_;
  if (data == nullptr || health().lost()) return;
  if (!s.recording) {
    // Any thread may come here. Should the call fail, so will the next one that can say so.
    if (cudaFreeAsync(data, s.stream) != cudaSuccess) cudaGetLastError();
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

std::optional<TensorMap> Gpu::tensor_map(const HeadsView& view, int rows) {
#if defined(MERF_SM90A)
  if (properties_.major != 9 || properties_.minor != 0) return std::nullopt;
  static const EncodeTensorMap encode = find_encode_tensor_map();
  if (encode == nullptr) return std::nullopt;
  static_assert(sizeof(TensorMap) == sizeof(CUtensorMap) && alignof(TensorMap) >= alignof(CUtensorMap));
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(view.head_size), static_cast<cuuint64_t>(view.heads),
                              static_cast<cuuint64_t>(view.tokens)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(2 * view.head_size),
                                static_cast<cuuint64_t>(2 * view.row_stride)};
  const cuuint32_t box[] = {64, 1, static_cast<cuuint32_t>(rows)}, steps[] = {1, 1, 1};
  TensorMap map;
  const CUresult status =
      encode(reinterpret_cast<CUtensorMap*>(&map), CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, view.data, sizes,
             strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) return std::nullopt;
  return map;
#else
  static_cast<void>(view);
  static_cast<void>(rows);
  return std::nullopt;
#endif
}

void Gpu::upload(void* device, const void* host, size_t bytes) {
  state_->enter();
  if (state_->recording) throw Error("INTERNAL", "Expected no upload while work is recorded");
  for (size_t done = 0; done < bytes;) {
    const size_t count = std::min(kPartBytes, bytes - done);
    char* pinned = state_->take_pinned(count);
    std::memcpy(pinned, static_cast<const char*>(host) + done, count);
    state_->check(cudaMemcpyAsync(static_cast<char*>(device) + done, pinned, count, cudaMemcpyHostToDevice,
                                  state_->stream),
                  "an upload");
    done += count;
  }
}

void Gpu::download(void* host, const void* device, size_t bytes) {
  state_->enter();
  if (state_->recording) throw Error("INTERNAL", "Expected no download while work is recorded");
  for (size_t done = 0; done < bytes;) {
    const size_t count = std::min(kPartBytes, bytes - done);
    char* pinned = state_->take_pinned(count);
    state_->check(cudaMemcpyAsync(pinned, static_cast<const char*>(device) + done, count,
                                  cudaMemcpyDeviceToHost, state_->stream),
                  "a download");
    state_->check(cudaStreamSynchronize(state_->stream), "a download");
    std::memcpy(static_cast<char*>(host) + done, pinned, count);
    done += count;
  }
}

std::unique_ptr<GpuDownload> Gpu::make_download(size_t bytes) {
  return std::make_unique<State::PinnedDownload>(*state_, bytes);
}

void Gpu::copy(void* to, const void* from, size_t bytes) {
  state_->enter();
  if (bytes > 0)
    state_->check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, state_->stream), "a copy");
}
void Gpu::fill(void* to, int byte, size_t bytes) {
  state_->enter();
  if (bytes > 0) state_->check(cudaMemsetAsync(to, byte, bytes, state_->stream), "clearing memory");
}
void Gpu::synchronize() {
  state_->enter();
  if (state_->recording) throw Error("INTERNAL", "Expected no synchronisation while work is recorded");
  state_->check(cudaStreamSynchronize(state_->stream), "waiting for it");
}

void Gpu::begin_recording() {
  State& s = *state_;
  s.enter();
  std::shared_ptr<RecordingMemory> memory = s.recording_memory.lock();
  if (!memory) {
    // What was freed before is free for the side stream too. Later recordings find most of their memory here already,
    // and get the rest in any case once the stream is so far.
    s.check(cudaStreamSynchronize(s.stream), "waiting for it");
    s.recording_memory = memory = std::make_shared<RecordingMemory>(s.stream);
  }
  auto recording = std::make_unique<GraphRecording>(s.stream, std::move(memory));
  // Relaxed: memory is allocated meanwhile, and other threads may use CUDA.
  s.check(cudaStreamBeginCapture(s.stream, cudaStreamCaptureModeRelaxed), "beginning a recording");
  s.recording = std::move(recording);
}

std::unique_ptr<Recording> Gpu::end_recording(std::unique_ptr<Recording> before) {
  State& s = *state_;
  std::unique_ptr<GraphRecording> recording = std::move(s.recording);
  const bool held = !s.recorded_memory.empty();
  s.recorded_memory.clear();
  cudaGraph_t graph = nullptr;
  const cudaError_t ended = cudaStreamEndCapture(s.stream, &graph);
  for (void* data : s.freed_while_recording) cudaFreeAsync(data, s.stream);
  s.freed_while_recording.clear();
  s.check(ended, "ending a recording");
  if (before && !held) {
    cudaGraphExecUpdateResultInfo info{};
    if (cudaGraphExecUpdate(static_cast<GraphRecording&>(*before).graph, graph, &info) == cudaSuccess) {
      cudaGraphDestroy(graph);
      return before;
    }
    cudaGetLastError();  // other kernels than before, or in another order
  }
  const auto make = [&] { return cudaGraphInstantiate(&recording->graph, graph, 0); };
  const cudaError_t made = held ? cudaSuccess : s.with_room("a recording", make);
  cudaGraphDestroy(graph);
  if (held)
    throw Error("INTERNAL",
                "Expected memory that is allocated while work is recorded to be freed before its end");
  s.check(made, "making a recording playable");
  return recording;
}

void Gpu::play(Recording& recording) {
  State& s = *state_;
  s.enter();
  health().started("a recording");
  const cudaGraphExec_t graph = static_cast<GraphRecording&>(recording).graph;
  s.check(s.with_room("a recording", [&] { return cudaGraphLaunch(graph, s.stream); }),
          "playing a recording");
}

void Gpu::allow_shared(const void* kernel, size_t bytes) {
  State& s = *state_;
  size_t& allowed = s.shared_allowed[kernel];
  if (bytes <= allowed) return;
  if (bytes > properties_.shared_bytes) {
    throw Error("UNSUPPORTED", "A kernel for this model needs " + std::to_string(bytes) +
                                   " bytes of shared memory and the " + properties_.name + " has " +
                                   std::to_string(properties_.shared_bytes) +
                                   ": use bf16, a model of smaller heads, or another GPU");
  }
  s.enter();
  const auto allow = [&] {
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  };
  s.check(s.with_room("a kernel's code", allow), "giving a kernel shared memory");
  allowed = bytes;
}

void Gpu::launch(const char* name, const void* kernel, dim3 grid, int threads, size_t shared,
                 void** arguments, bool overlaps) {
  State& s = *state_;
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared;
  config.stream = s.stream;
  config.attrs = &overlap;
  config.numAttrs = overlaps && properties_.major >= 9 ? 1 : 0;
  s.enter();
  // The first launch loads the kernel's code, which takes memory.
  const cudaError_t status =
      s.with_room(name, [&] { return cudaLaunchKernelExC(&config, kernel, arguments); });
  if (status != cudaSuccess) s.check(status, (std::string("starting ") + name).c_str());
  health().started(name);
}

}  // namespace merf::cuda
