// One graphics processor: its memory pool, its stream, and recordings of work on it. gpu.cu is the real one,
// emulation/gpu.cc the emulated one. Everything is enqueued in order on the one stream; one thread at a time uses it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>

#include "backend/cuda/primitives/tensor_copy.h"
#include "backend/tensor.h"

#if defined(MERF_CUDA_EMULATION)
#include "backend/cuda/emulation/emulator.h"
#else
#include <cuda_runtime.h>
#endif

namespace merf::cuda {

// Enqueued work that can be enqueued again (a CUDA graph).
class Recording {
 public:
  virtual ~Recording() = default;
};

// Pinned memory of the host that one download after another goes to while the host goes on.
class GpuDownload {
 public:
  virtual ~GpuDownload() = default;
  virtual void start(const void* device, size_t bytes) = 0;
  virtual const void* wait() = 0;
};

struct GpuProperties {
  std::string name;  // as its maker names it
  int major = 0;     // compute capability
  int minor = 0;
  int multiprocessors = 0;
  int host_threads = 1;     // of the emulation
  size_t shared_bytes = 0;  // shared memory that a block can have
  size_t cache_bytes = 0;   // of the second-level cache, which all multiprocessors share
  size_t total_bytes = 0;
  std::string driver;   // the CUDA version that the driver knows, such as "13.0"
  std::string runtime;  // that of the runtime linked in
};

// While it lives, the calling thread has the GPU that Gpu opens for its CUDA device, whichever it had chosen before.
class DeviceScope {
 public:
#if defined(MERF_CUDA_EMULATION)
  DeviceScope() {}
#else
  DeviceScope();
  ~DeviceScope();
#endif
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 private:
  int before_ = 0;
};

class Gpu {
 public:
  // `threads`: on which the emulation runs blocks; no meaning on a real one.
  explicit Gpu(int threads);
  ~Gpu();
  Gpu(const Gpu&) = delete;
  Gpu& operator=(const Gpu&) = delete;

  const GpuProperties& properties() const { return properties_; }
  size_t free_bytes();

  // Where a failure has ended the GPU's context, this and everything below but free throws DEVICE_LOST with the first
  // failure. Asks the driver; `what` is the call that seems to have failed.
  void check_alive(const char* what);

  // Whether `ask`, which says whether there was memory for it, succeeds: at once, or once the pool has given back what
  // it holds unused. `what` is what wants the memory.
  bool with_room(const char* what, const std::function<bool()>& ask);
  // How often the second try was what succeeded.
  int64_t memory_retries() const;

  // Memory in the order of the stream: it may be used by what is enqueued after allocate and before free. Null where
  // there is not enough. While recording, what was allocated and freed stays with the recordings.
  void* allocate(size_t bytes);
  void free(void* data) noexcept;

  // `host` may change as soon as upload returns. download waits for everything enqueued before.
  void upload(void* device, const void* host, size_t bytes);
  void download(void* host, const void* device, size_t bytes);
  // Makes a place for downloads of up to `bytes` bytes, one at a time. It must not outlive this.
  std::unique_ptr<GpuDownload> make_download(size_t bytes);
  void copy(void* to, const void* from, size_t bytes);
  void fill(void* to, int byte, size_t bytes);
  void synchronize();

  // What copy_tensor needs to copy `rows` rows at a time of a view of bfloat16, whose columns are those of a head; nothing
  // where the driver has no such copies or this GPU none of the machine code sm_90a that the kernels which use them are
  // compiled to.
  std::optional<TensorMap> tensor_map(const HeadsView& view, int rows);

  // What is enqueued between the two is recorded instead of run. Neither upload, download nor synchronize between, and
  // what is allocated between is freed between; what was allocated before and is freed between is freed at the end.
  // Returns `before` where it could take over what was recorded, which it can if that is the same kernels in the same
  // order over whatever memory, else a new one. Plays of `before` that are enqueued stay as they were.
  void begin_recording();
  std::unique_ptr<Recording> end_recording(std::unique_ptr<Recording> before = nullptr);
  void play(Recording& recording);

#if defined(MERF_CUDA_EMULATION)
  void enqueue(std::function<void()> work);
  emulation::Emulator& emulator();
  // What stands for the stream before a library: a pointer to this function, which enqueues.
  using Enqueue = std::function<void(std::function<void()>)>;
  void* stream() const;
  // What a launch does before the kernel is enqueued.
  void begin_launch(const char* kernel);
  // Whether the kernel does its work: not once a failure has ended the GPU, be it at this very kernel.
  bool begin_kernel(const char* kernel);
#else
  cudaStream_t stream() const;
  // Lets a kernel have more shared memory than 48 KiB.
  void allow_shared(const void* kernel, size_t bytes);
  // Throws DEVICE_FAILED where the launch is refused. The arrays are those of cudaLaunchKernel. overlaps: as
  // LaunchShape's.
  void launch(const char* name, const void* kernel, dim3 grid, int threads, size_t shared, void** arguments,
              bool overlaps);
#endif

 private:
  struct State;
  GpuProperties properties_;
  std::unique_ptr<State> state_;
};

}  // namespace merf::cuda
