// Allocation for the CPU backend. Tensors come and go at every step with much the same sizes, and fresh pages cost
// more than the arithmetic done on them (the kernel clears each), so freed blocks are kept for reuse up to a bound.
#include "backend/cpu/memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <limits>
#include <string>

#include "backend/cpu/cpu_backend.h"
#include "backend/cpu/parallel.h"
#include "backend/in_words.h"

namespace merf {

namespace {

constexpr size_t kAlignment = 64;
constexpr size_t kPage = size_t{64} << 10;
constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kIdleBytes = size_t{96} << 20;
// Asking the system what is left costs some microseconds, so it is done once for so many bytes that are new.
constexpr size_t kCheckedBytes = size_t{32} << 20;
constexpr size_t kReserveBytes = size_t{64} << 20;
constexpr size_t kUnlimited = std::numeric_limits<size_t>::max();

size_t round_up(size_t value, size_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// Steps of an eighth of the power of two below, so that blocks of nearly equal sizes are interchangeable.
size_t block_size(size_t bytes) {
  if (bytes <= 4096) return std::max(kAlignment, round_up(bytes, kAlignment));
  // Large blocks have their addresses aligned to huge pages, not their sizes: rounding those up, too, would cost a fifth
  // of the memory of weights of some megabytes.
  if (bytes >= kHugePage) return round_up(bytes, kPage);
  size_t power = 4096;
  while (power * 2 <= bytes) power *= 2;
  return round_up(bytes, power / 8);
}

// The number that a file holds; unlimited where there is none, as in "max".
size_t read_bytes(const std::string& path) {
  std::ifstream file(path);
  size_t value = 0;
  return file >> value ? value : kUnlimited;
}

size_t read_statistic(const std::string& path, const std::string& name) {
  std::ifstream file(path);
  std::string key;
  for (size_t value = 0; file >> key >> value;) {
    if (key == name) return value;
  }
  return 0;
}

// Aligned as wanted, whatever the size: std::aligned_alloc takes multiples of the alignment alone.
void* allocate_aligned(size_t alignment, size_t bytes) {
  void* data = nullptr;
  return posix_memalign(&data, alignment, bytes) == 0 ? data : nullptr;
}

size_t read_meminfo(const std::string& key) {
  std::ifstream file("/proc/meminfo");
  std::string name, unit;
  size_t value = 0;
  while (file >> name >> value) {
    if (name == key) return value * 1024;
    std::getline(file, unit);
  }
  return std::numeric_limits<size_t>::max();
}

// How the two versions of control groups name things.
struct ControlGroupFiles {
  const char* folder;
  const char* limit;
  const char* used;
  const char* cached;  // of memory.stat
};
constexpr ControlGroupFiles kVersion2 = {"/sys/fs/cgroup", "/memory.max", "/memory.current", "inactive_file"};
constexpr ControlGroupFiles kVersion1 = {"/sys/fs/cgroup/memory", "/memory.limit_in_bytes",
                                         "/memory.usage_in_bytes", "total_inactive_file"};

// Lowers `memory` to what a group and those above it leave. A container may see its group's path from outside of the
// file system that it has, so paths that are not there are passed over.
void apply_limits(const std::string& root, const ControlGroupFiles& files, std::string path,
                  ControlGroupMemory& memory) {
  while (!path.empty() && path.back() == '/') path.pop_back();
  while (true) {
    const std::string group = root + files.folder + path;
    const size_t limit = read_bytes(group + files.limit), used = read_bytes(group + files.used);
    memory.limit = std::min(memory.limit, limit);
    if (limit != kUnlimited && used != kUnlimited) {
      // The page cache counts as used but is given up under pressure.
      const size_t cached = read_statistic(group + "/memory.stat", files.cached);
      const size_t held = used - std::min(used, cached);
      memory.available = std::min(memory.available, limit - std::min(limit, held));
    }
    if (path.empty()) return;
    path.resize(path.find_last_of('/'));
  }
}

}  // namespace

ControlGroupMemory control_group_memory(const std::string& root) {
  ControlGroupMemory memory;
  std::ifstream file(root + "/proc/self/cgroup");
  // A line is "hierarchy:controllers:path"; version 2 has the hierarchy 0 and names no controllers.
  for (std::string line; std::getline(file, line);) {
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    std::string controllers(1, ',');
    controllers.append(line, first + 1, second - first - 1).push_back(',');
    const std::string path = line.substr(second + 1);
    if (path.empty() || path[0] != '/') continue;
    if (controllers == ",,") apply_limits(root, kVersion2, path, memory);
    if (controllers.find(",memory,") != std::string::npos) apply_limits(root, kVersion1, path, memory);
  }
  return memory;
}

size_t total_memory() {
  const long pages = sysconf(_SC_PHYS_PAGES);
  const long page = sysconf(_SC_PAGE_SIZE);
  const size_t physical =
      pages > 0 && page > 0 ? static_cast<size_t>(pages) * static_cast<size_t>(page) : kUnlimited;
  return std::min(physical, control_group_memory().limit);
}

size_t available_memory() {
  return std::min(read_meminfo("MemAvailable:"), control_group_memory().available);
}

class PooledStorage final : public Storage {
 public:
  PooledStorage(std::shared_ptr<MemoryPool> pool, void* block, size_t block_bytes) : pool_(std::move(pool)) {
    data = block;
    bytes = block_bytes;
  }
  ~PooledStorage() override { pool_->release(data, bytes); }

 private:
  std::shared_ptr<MemoryPool> pool_;
};

MemoryPool::MemoryPool() : limit_(available_memory()) {}

MemoryPool::~MemoryPool() { drop_idle(0); }

std::shared_ptr<Storage> MemoryPool::allocate(size_t requested) {
  const auto refuse = [&](const std::string& reason) {
    throw Error("OUT_OF_MEMORY",
                "Could not allocate " + in_words(requested) + " of memory on cpu: " + reason);
  };
  std::lock_guard<std::mutex> lock(mutex_);
  if (requested > limit_) refuse(in_words(limit_) + " were available at the start");
  const size_t bytes = block_size(requested);
  void* data = nullptr;
  size_t found = 0;
  auto best = idle_.end();
  for (auto it = idle_.begin(); it != idle_.end(); ++it) {
    if (it->bytes >= bytes && it->bytes <= bytes + bytes / 4 &&
        (best == idle_.end() || it->bytes < best->bytes)) {
      best = it;
      if (it->bytes == bytes) break;
    }
  }
  if (best != idle_.end()) {
    data = best->data;
    found = best->bytes;
    idle_bytes_ -= found;
    idle_.erase(best);
  } else {
    // Blocks handed out but not yet written to do not show in what the system reports as available, so the sum of
    // all is held against what there was at the start as well.
    if (used_ + bytes > limit_) {
      refuse(in_words(used_) + " are in use of the " + in_words(limit_) + " available at the start");
    }
    unchecked_ += bytes;
    if (unchecked_ >= kCheckedBytes) {
      if (bytes + kReserveBytes > available_memory()) drop_idle(0);
      const size_t available = available_memory();
      if (bytes + kReserveBytes > available) refuse(in_words(available) + " are available");
      unchecked_ = 0;
    }
    const size_t alignment = bytes >= kHugePage ? kHugePage : kAlignment;
    data = allocate_aligned(alignment, bytes);
    if (data == nullptr) {
      drop_idle(0);
      data = allocate_aligned(alignment, bytes);
    }
    if (data == nullptr) refuse("the system has no more");
#ifdef MADV_HUGEPAGE
    if (bytes >= kHugePage) madvise(data, bytes, MADV_HUGEPAGE);
#endif
    found = bytes;
  }
  try {
    auto storage = std::make_shared<PooledStorage>(shared_from_this(), data, found);
    used_ += found;
    peak_ = std::max(peak_, used_);
    return storage;
  } catch (...) {
    std::free(data);
    throw Error("OUT_OF_MEMORY", "Could not allocate memory on cpu: the system has no more");
  }
}

void MemoryPool::release(void* data, size_t bytes) {
  std::lock_guard<std::mutex> lock(mutex_);
  used_ -= bytes;
  if (bytes > kIdleBytes) {
    std::free(data);
    return;
  }
  try {
    idle_.push_front({data, bytes});
  } catch (...) {
    std::free(data);
    return;
  }
  idle_bytes_ += bytes;
  drop_idle(kIdleBytes);
}

void MemoryPool::drop_idle(size_t keep_bytes) {
  while (idle_bytes_ > keep_bytes) {
    idle_bytes_ -= idle_.back().bytes;
    std::free(idle_.back().data);
    idle_.pop_back();
  }
}

int64_t MemoryPool::available() const {
  std::lock_guard<std::mutex> lock(mutex_);
  constexpr size_t most = std::numeric_limits<int64_t>::max();
  const size_t system = std::min(available_memory(), most - idle_bytes_) + idle_bytes_;
  return static_cast<int64_t>(
      std::min({limit_ - std::min(limit_, used_), system - std::min(system, kReserveBytes), most}));
}

int64_t MemoryPool::used() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return static_cast<int64_t>(used_);
}

int64_t MemoryPool::peak() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return static_cast<int64_t>(peak_);
}

void MemoryPool::reset_peak() {
  std::lock_guard<std::mutex> lock(mutex_);
  peak_ = used_;
}

Tensor CpuBackend::allocate(DType dtype, std::initializer_list<int64_t> shape) {
  Tensor tensor = shaped(dtype, shape, info_.name);
  tensor.storage = pool_->allocate(tensor.bytes());
  tensor.data = tensor.storage->data;
  return tensor;
}

namespace {
constexpr int64_t kCopyGrain = 1 << 18;

void copy_bytes(int threads, void* destination, const void* source, size_t bytes) {
  parallel_for(threads, static_cast<int64_t>(bytes), kCopyGrain, [&](int64_t begin, int64_t end) {
    std::memcpy(static_cast<char*>(destination) + begin, static_cast<const char*>(source) + begin,
                static_cast<size_t>(end - begin));
  });
}

void check_size(const char* what, size_t bytes, const Tensor& tensor) {
  if (bytes > tensor.bytes()) {
    throw Error("INTERNAL", std::string("Expected ") + std::to_string(tensor.bytes()) +
                                " bytes at most for " + what + " but received " + std::to_string(bytes));
  }
}
}  // namespace

void CpuBackend::upload(const Tensor& destination, const void* host, size_t bytes) {
  check_size("upload", bytes, destination);
  copy_bytes(num_threads(), destination.data, host, bytes);
}

void CpuBackend::download(void* host, const Tensor& source, size_t bytes) {
  check_size("download", bytes, source);
  copy_bytes(num_threads(), host, source.data, bytes);
}

namespace {

// Operators have run when they return, so there is nothing to wait for.
class CpuDownload final : public Download {
 public:
  CpuDownload(CpuBackend& backend, size_t bytes) : backend_(backend), bytes_(bytes) {}
  void start(const Tensor& source, size_t bytes) override {
    bytes_.resize(bytes);
    backend_.download(bytes_.data(), source, bytes);
  }
  const void* wait() override { return bytes_.data(); }

 private:
  CpuBackend& backend_;
  std::vector<char> bytes_;
};

}  // namespace

std::unique_ptr<Download> CpuBackend::make_download(size_t bytes) {
  return std::make_unique<CpuDownload>(*this, bytes);
}

void CpuBackend::copy(const Tensor& destination, const Tensor& source) {
  copy_bytes(num_threads(), destination.data, source.data, source.bytes());
}

void CpuBackend::zero(const Tensor& destination) {
  parallel_for(
      num_threads(), static_cast<int64_t>(destination.bytes()), kCopyGrain, [&](int64_t begin, int64_t end) {
        std::memset(static_cast<char*>(destination.data) + begin, 0, static_cast<size_t>(end - begin));
      });
}

int64_t CpuBackend::memory_free() const { return pool_->available(); }
int64_t CpuBackend::memory_used() const { return pool_->used(); }
int64_t CpuBackend::memory_peak() const { return pool_->peak(); }
void CpuBackend::reset_peak_memory() { pool_->reset_peak(); }

}  // namespace merf
