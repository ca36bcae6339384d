// Tensors on the GPU, transfers, and recordings of steps.
#include <algorithm>
#include <map>
#include <vector>

#include "backend/cuda/cuda_backend.h"
#include "backend/in_words.h"

namespace merf::cuda {

namespace {

class DeviceStorage final : public Storage {
 public:
  DeviceStorage(std::shared_ptr<Device> device, size_t wanted) : device_(std::move(device)) {
    std::lock_guard<std::mutex> lock(device_->mutex);
    data = device_->gpu.allocate(wanted);
    if (data == nullptr) return;
    bytes = wanted;
    device_->used += bytes;
    device_->peak = std::max(device_->peak, device_->used);
  }
  ~DeviceStorage() override {
    if (data == nullptr) return;
    std::lock_guard<std::mutex> lock(device_->mutex);
    device_->used -= bytes;
    device_->gpu.free(data);
  }

 private:
  std::shared_ptr<Device> device_;
};

void check_size(const char* what, size_t bytes, const Tensor& tensor) {
  if (bytes > tensor.bytes()) {
    throw Error("INTERNAL", std::string("Expected ") + std::to_string(tensor.bytes()) +
                                " bytes at most for " + what + " but received " + std::to_string(bytes));
  }
}

}  // namespace

Tensor CudaBackend::allocate(DType dtype, std::initializer_list<int64_t> shape) {
  Tensor tensor = shaped(dtype, shape, info_.name);
  const size_t bytes = tensor.bytes();
  auto storage = std::make_shared<DeviceStorage>(device_, bytes);
  if (storage->data == nullptr) {
    throw Error("OUT_OF_MEMORY", "Could not allocate " + in_words(bytes) + " of memory on " + info_.name +
                                     ": " + in_words(gpu().free_bytes()) + " are free of " +
                                     in_words(gpu().properties().total_bytes) + ", and " +
                                     in_words(static_cast<size_t>(memory_used())) + " are in use here");
  }
  tensor.data = storage->data;
  tensor.storage = std::move(storage);
  return tensor;
}

void CudaBackend::upload(const Tensor& destination, const void* host, size_t bytes) {
  check_size("upload", bytes, destination);
  if (bytes > 0) gpu().upload(destination.data, host, bytes);
}

void CudaBackend::download(void* host, const Tensor& source, size_t bytes) {
  check_size("download", bytes, source);
  if (bytes > 0) gpu().download(host, source.data, bytes);
}

void CudaBackend::copy(const Tensor& destination, const Tensor& source) {
  gpu().copy(destination.data, source.data, source.bytes());
}

void CudaBackend::zero(const Tensor& destination) { gpu().fill(destination.data, 0, destination.bytes()); }

void CudaBackend::synchronize() { gpu().synchronize(); }

Tensor CudaBackend::make(const std::vector<int32_t>& values) {
  const Tensor tensor = allocate(DType::i32, {static_cast<int64_t>(values.size())});
  upload(tensor, values.data(), tensor.bytes());
  return tensor;
}

int64_t CudaBackend::memory_free() const { return static_cast<int64_t>(device_->gpu.free_bytes()); }
int64_t CudaBackend::memory_used() const {
  std::lock_guard<std::mutex> lock(device_->mutex);
  return static_cast<int64_t>(device_->used);
}
int64_t CudaBackend::memory_peak() const {
  std::lock_guard<std::mutex> lock(device_->mutex);
  return static_cast<int64_t>(device_->peak);
}
void CudaBackend::reset_peak_memory() {
  std::lock_guard<std::mutex> lock(device_->mutex);
  device_->peak = device_->used;
}

// ---- downloads that nobody waits for

namespace {

class CudaDownload final : public Download {
 public:
  CudaDownload(std::shared_ptr<Device> device, size_t bytes)
      : device_(std::move(device)), bytes_(bytes), download_(device_->gpu.make_download(bytes)) {}
  void start(const Tensor& source, size_t bytes) override {
    check_size("download", bytes, source);
    if (bytes > bytes_) {
      throw Error("INTERNAL", "Expected a download of " + std::to_string(bytes_) +
                                  " bytes at most but received " + std::to_string(bytes));
    }
    download_->start(source.data, bytes);
  }
  const void* wait() override { return download_->wait(); }

 private:
  std::shared_ptr<Device> device_;
  size_t bytes_;
  std::unique_ptr<GpuDownload> download_;
};

}  // namespace

std::unique_ptr<Download> CudaBackend::make_download(size_t bytes) {
  return std::make_unique<CudaDownload>(device_, bytes);
}

// ---- recordings

class GpuRecorder final : public Recorder {
 public:
  explicit GpuRecorder(CudaBackend& backend) : backend_(backend) { backend.recorders_.push_back(this); }
  ~GpuRecorder() override { std::erase(backend_.recorders_, this); }

  // The first call with a key runs as it is, so that whatever is made once (library handles, attributes, growing
  // buffers) is made outside of a recording; the second one records. What was recorded before the last renew, or
  // before buffers of the backend moved, is recorded again: one pass over the operators and an update of what there is.
  void run(int64_t key, const std::function<void()>& body) override {
    Entry& entry = entries_[key];
    if (!entry.warm) {
      body();
      entry.warm = true;
      return;
    }
    if (!entry.recording || entry.renewals != renewals_ ||
        entry.generation != backend_.recording_generation_) {
      record(entry.recording, body);
      entry.renewals = renewals_;
      entry.generation = backend_.recording_generation_;
    }
    backend_.gpu().play(*entry.recording);
    ++counts_.played;
  }

  void renew() override { ++renewals_; }
  bool records() const override { return true; }
  Counts counts() const override { return counts_; }

  int64_t step_rows(int64_t rows) const override {
    const int64_t step = rows <= 64 ? 8 : rows <= 256 ? 32 : 64;
    return (rows + step - 1) / step * step;
  }

  void clear() { entries_.clear(); }

 private:
  struct Entry {
    bool warm = false;
    int64_t renewals = 0, generation = 0;  // when it was recorded last
    std::unique_ptr<Recording> recording;
  };

  // `recording` becomes what the body enqueues.
  void record(std::unique_ptr<Recording>& recording, const std::function<void()>& body) {
    // Tensors that are given back on other threads meanwhile must find a recording that has begun or ended.
    Device& device = *backend_.device_;
    {
      std::lock_guard<std::mutex> lock(device.mutex);
      device.gpu.begin_recording();
    }
    try {
      body();
    } catch (...) {
      // Throws itself where the failure left the recording unusable; what failed first is what to say.
      try {
        std::lock_guard<std::mutex> lock(device.mutex);
        device.gpu.end_recording();
      } catch (const Error&) {
      }
      throw;
    }
    std::lock_guard<std::mutex> lock(device.mutex);
    Recording* const before = recording.get();
    recording = device.gpu.end_recording(std::move(recording));
    ++(recording.get() == before ? counts_.updated : counts_.made);
  }

  CudaBackend& backend_;
  int64_t renewals_ = 0;
  std::map<int64_t, Entry> entries_;
  Counts counts_;
};

std::unique_ptr<Recorder> CudaBackend::make_recorder() { return std::make_unique<GpuRecorder>(*this); }

void CudaBackend::release_recordings() {
  for (GpuRecorder* recorder : recorders_) recorder->clear();
}

}  // namespace merf::cuda
