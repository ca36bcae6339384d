// The real GPU behind gpu.h.
#include "backend/cuda/gpu.h"

#include <cuda.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <unordered_map>
#include <vector>

namespace merf::cuda {
namespace {

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // so that the next call does not report it again
  throw Error("DEVICE_FAILED", std::string("The GPU failed at ") + what + ": " + cudaGetErrorString(status));
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
    // Its last play may still run.
    cudaStreamSynchronize(stream_);
    if (graph != nullptr) cudaGraphExecDestroy(graph);
  }
  cudaGraphExec_t graph = nullptr;
  const std::shared_ptr<RecordingMemory> memory;

 private:
  const cudaStream_t stream_;
};

// Pinned host memory that transfers go through, in a ring: a part is written again once its last transfer is done.
constexpr size_t kPartBytes = size_t{8} << 20;
constexpr size_t kParts = 4;

}  // namespace

struct Gpu::State {
  cudaStream_t stream = nullptr;
  cudaStream_t side_stream = nullptr;  // for memory that is needed while the stream is recorded
  char* pinned = nullptr;              // [kParts, kPartBytes]
  std::array<cudaEvent_t, kParts> part_free{};
  size_t part = 0, used = 0;
  std::unordered_map<const void*, size_t> shared_allowed;

  std::unique_ptr<GraphRecording> recording;
  std::weak_ptr<RecordingMemory> recording_memory;
  std::unordered_map<void*, size_t> recorded_memory;  // allocated while recording and not freed yet
  std::vector<void*> freed_while_recording;           // allocated before

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

Gpu::Gpu(int) : state_(std::make_unique<State>()) {
  int ordinal = 0;
  check(cudaGetDevice(&ordinal), "opening it");
  cudaDeviceProp properties{};
  check(cudaGetDeviceProperties(&properties, ordinal), "reading its properties");
  properties_.name = properties.name;
  properties_.major = properties.major;
  properties_.minor = properties.minor;
  properties_.multiprocessors = properties.multiProcessorCount;
  properties_.shared_bytes = properties.sharedMemPerBlockOptin;
  properties_.total_bytes = properties.totalGlobalMem;
  int version = 0;
  check(cudaDriverGetVersion(&version), "reading the driver's version");
  properties_.driver = version_text(version);
  check(cudaRuntimeGetVersion(&version), "reading the runtime's version");
  properties_.runtime = version_text(version);

  check(cudaStreamCreateWithFlags(&state_->stream, cudaStreamNonBlocking), "making a stream");
  check(cudaStreamCreateWithFlags(&state_->side_stream, cudaStreamNonBlocking), "making a stream");
  // Freed memory stays with the pool instead of going back at every synchronisation.
  cudaMemPool_t pool = nullptr;
  check(cudaDeviceGetDefaultMemPool(&pool, ordinal), "opening its memory pool");
  uint64_t keep = UINT64_MAX;
  check(cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &keep), "its memory pool");
  check(cudaMallocHost(reinterpret_cast<void**>(&state_->pinned), kParts * kPartBytes), "pinned memory");
  for (cudaEvent_t& event : state_->part_free) {
    check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "making an event");
  }
}

Gpu::~Gpu() {
  cudaStreamSynchronize(state_->stream);
  for (cudaEvent_t event : state_->part_free) cudaEventDestroy(event);
  cudaFreeHost(state_->pinned);
  cudaStreamDestroy(state_->side_stream);
  cudaStreamDestroy(state_->stream);
}

cudaStream_t Gpu::stream() const { return state_->stream; }

size_t Gpu::free_bytes() {
  size_t free = 0, total = 0;
  check(cudaMemGetInfo(&free, &total), "reading its free memory");
  // What the pool holds and nobody uses can be had too.
  int ordinal = 0;
  cudaMemPool_t pool = nullptr;
  uint64_t reserved = 0, used = 0;
  check(cudaGetDevice(&ordinal), "its memory pool");
  check(cudaDeviceGetDefaultMemPool(&pool, ordinal), "its memory pool");
  check(cudaMemPoolGetAttribute(pool, cudaMemPoolAttrReservedMemCurrent, &reserved), "its memory pool");
  check(cudaMemPoolGetAttribute(pool, cudaMemPoolAttrUsedMemCurrent, &used), "its memory pool");
  return free + static_cast<size_t>(reserved - used);
}

void* Gpu::allocate(size_t bytes) {
  State& s = *state_;
  bytes = std::max<size_t>(bytes, 1);
  if (s.recording) {
    // What recordings have freed again, else memory from beside the stream that is recorded.
    auto& idle = s.recording->memory->idle;
    auto best = idle.end();
    for (auto it = idle.begin(); it != idle.end(); ++it) {
      if (it->bytes >= bytes && (best == idle.end() || it->bytes < best->bytes)) best = it;
    }
    void* data = nullptr;
    if (best != idle.end()) {
      data = best->data;
      s.recorded_memory[data] = best->bytes;
      idle.erase(best);
      return data;
    }
    if (cudaMallocAsync(&data, bytes, s.side_stream) != cudaSuccess) {
      cudaGetLastError();
      return nullptr;
    }
    check(cudaStreamSynchronize(s.side_stream), "allocating");
    s.recorded_memory[data] = bytes;
    return data;
  }
  void* data = nullptr;
  cudaError_t status = cudaMallocAsync(&data, bytes, s.stream);
  if (status == cudaErrorMemoryAllocation) {
    // Pieces of the pool that are free but not in one: give them back and try again.
    cudaGetLastError();
    check(cudaStreamSynchronize(s.stream), "waiting for memory");
    int ordinal = 0;
    cudaMemPool_t pool = nullptr;
    check(cudaGetDevice(&ordinal), "its memory pool");
    check(cudaDeviceGetDefaultMemPool(&pool, ordinal), "its memory pool");
    check(cudaMemPoolTrimTo(pool, 0), "its memory pool");
    status = cudaMallocAsync(&data, bytes, s.stream);
  }
  if (status == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    return nullptr;
  }
  check(status, "allocating");
  return data;
}

void Gpu::free(void* data) noexcept {
  State& s = *state_;
  if (data == nullptr) return;
  if (!s.recording) {
    cudaFreeAsync(data, s.stream);
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
  if (state_->recording) throw Error("INTERNAL", "Expected no upload while work is recorded");
  for (size_t done = 0; done < bytes;) {
    const size_t count = std::min(kPartBytes, bytes - done);
    char* pinned = state_->take_pinned(count);
    std::memcpy(pinned, static_cast<const char*>(host) + done, count);
    check(cudaMemcpyAsync(static_cast<char*>(device) + done, pinned, count, cudaMemcpyHostToDevice,
                          state_->stream),
          "an upload");
    done += count;
  }
}

void Gpu::download(void* host, const void* device, size_t bytes) {
  if (state_->recording) throw Error("INTERNAL", "Expected no download while work is recorded");
  for (size_t done = 0; done < bytes;) {
    const size_t count = std::min(kPartBytes, bytes - done);
    char* pinned = state_->take_pinned(count);
    check(cudaMemcpyAsync(pinned, static_cast<const char*>(device) + done, count, cudaMemcpyDeviceToHost,
                          state_->stream),
          "a download");
    check(cudaStreamSynchronize(state_->stream), "a download");
    std::memcpy(static_cast<char*>(host) + done, pinned, count);
    done += count;
  }
}

void Gpu::copy(void* to, const void* from, size_t bytes) {
  if (bytes > 0) check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, state_->stream), "a copy");
}
void Gpu::fill(void* to, int byte, size_t bytes) {
  if (bytes > 0) check(cudaMemsetAsync(to, byte, bytes, state_->stream), "clearing memory");
}
void Gpu::synchronize() {
  if (state_->recording) throw Error("INTERNAL", "Expected no synchronisation while work is recorded");
  check(cudaStreamSynchronize(state_->stream), "waiting for it");
}

void Gpu::begin_recording() {
  State& s = *state_;
  // What was freed before is free for the side stream too.
  check(cudaStreamSynchronize(s.stream), "waiting for it");
  std::shared_ptr<RecordingMemory> memory = s.recording_memory.lock();
  if (!memory) s.recording_memory = memory = std::make_shared<RecordingMemory>(s.stream);
  auto recording = std::make_unique<GraphRecording>(s.stream, std::move(memory));
  // Relaxed: memory is allocated meanwhile, and other threads may use CUDA.
  check(cudaStreamBeginCapture(s.stream, cudaStreamCaptureModeRelaxed), "beginning a recording");
  s.recording = std::move(recording);
}

std::unique_ptr<Recording> Gpu::end_recording() {
  State& s = *state_;
  std::unique_ptr<GraphRecording> recording = std::move(s.recording);
  const bool held = !s.recorded_memory.empty();
  s.recorded_memory.clear();
  cudaGraph_t graph = nullptr;
  const cudaError_t ended = cudaStreamEndCapture(s.stream, &graph);
  for (void* data : s.freed_while_recording) cudaFreeAsync(data, s.stream);
  s.freed_while_recording.clear();
  check(ended, "ending a recording");
  const cudaError_t made = held ? cudaSuccess : cudaGraphInstantiate(&recording->graph, graph, 0);
  cudaGraphDestroy(graph);
  if (held)
    throw Error("INTERNAL",
                "Expected memory that is allocated while work is recorded to be freed before its end");
  check(made, "making a recording playable");
  return recording;
}

void Gpu::play(Recording& recording) {
  check(cudaGraphLaunch(static_cast<GraphRecording&>(recording).graph, state_->stream),
        "playing a recording");
}

void Gpu::allow_shared(const void* kernel, size_t bytes) {
  size_t& allowed = state_->shared_allowed[kernel];
  if (bytes <= allowed) return;
  if (bytes > properties_.shared_bytes) {
    throw Error("UNSUPPORTED", "A kernel for this model needs " + std::to_string(bytes) +
                                   " bytes of shared memory and the " + properties_.name + " has " +
                                   std::to_string(properties_.shared_bytes) +
                                   ": use bf16, a model of smaller heads, or another GPU");
  }
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
        "giving a kernel shared memory");
  allowed = bytes;
}

void Gpu::check_launch(const char* kernel, cudaError_t status) {
  if (status == cudaSuccess) return;
  cudaGetLastError();
  throw Error("DEVICE_FAILED",
              std::string("The GPU refused to run ") + kernel + ": " + cudaGetErrorString(status));
}

}  // namespace merf::cuda
