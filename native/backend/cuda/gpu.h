// One graphics processor: its memory pool, its stream, and recordings of work on it. gpu.cu is the real one,
// emulation/gpu.cc the emulated one. Everything is enqueued in order on the one stream; one thread at a time uses it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>

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
  size_t total_bytes = 0;
  std::string driver;   // the CUDA version that the driver knows, such as "13.0"
  std::string runtime;  // that of the runtime linked in
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

  // Memory in the order of the stream: it may be used by what is enqueued after allocate and before free. Null where
  // there is not enough. While recording, what was allocated and freed stays with the recordings.
  void* allocate(size_t bytes);
  void free(void* data) noexcept;

  // `host` may change as soon as upload returns. download waits for everything enqueued before.
  void upload(void* device, const void* host, size_t bytes);
  void download(void* host, const void* device, size_t bytes);
  // For downloads of up to `bytes` bytes, one at a time. It must not outlive this.
  std::unique_ptr<GpuDownload> make_download(size_t bytes);
  void copy(void* to, const void* from, size_t bytes);
  void fill(void* to, int byte, size_t bytes);
  void synchronize();

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
#else
  cudaStream_t stream() const;
  // Lets a kernel have more shared memory than 48 KiB.
  void allow_shared(const void* kernel, size_t bytes);
  // Throws DEVICE_FAILED where the kernel's launch was refused.
  void check_launch(const char* kernel, cudaError_t status);
#endif

 private:
  struct State;
  GpuProperties properties_;
  std::unique_ptr<State> state_;
};

}  // namespace merf::cuda
