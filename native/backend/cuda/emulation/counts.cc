#include "backend/cuda/emulation/counts.h"

#if defined(MERF_EMULATION_COUNTS)

#include <sys/mman.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <vector>

namespace merf::cuda::emulation {
namespace {

// Address space, not memory: pages become real where they are first written.
char* reserve(size_t bytes) {
  void* memory =
      mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) {
    std::fputs("Could not reserve addresses for the memory of the device that counts\n", stderr);
    std::abort();
  }
  return static_cast<char*>(memory);
}

// All of the device's memory lies in one range, so that an access is found to be to it by one comparison.
constexpr size_t kReserved = size_t{1} << 40;
char* const device_memory = reserve(kReserved);

// The sectors that the launch touched, one bit each, and the words of it that are not zero.
class SectorSet {
 public:
  void add(size_t offset, size_t bytes) {
    const size_t last = (offset + bytes - 1) / kSectorBytes;
    for (size_t sector = offset / kSectorBytes; sector <= last; ++sector) {
      std::atomic_ref<uint64_t> word(words_[sector / 64]);
      const uint64_t bit = uint64_t{1} << sector % 64;
      if ((word.load(std::memory_order_relaxed) & bit) != 0) continue;
      if (word.fetch_or(bit, std::memory_order_relaxed) == 0) used_[used_count_++] = sector / 64;
    }
  }

  // Bytes of the sectors. Empties the set.
  int64_t take() {
    int64_t sectors = 0;
    const size_t used = used_count_;
    for (size_t i = 0; i < used; ++i) {
      sectors += __builtin_popcountll(words_[used_[i]]);
      words_[used_[i]] = 0;
    }
    used_count_ = 0;
    return sectors * static_cast<int64_t>(kSectorBytes);
  }

 private:
  static constexpr size_t kWords = kReserved / kSectorBytes / 64;
  uint64_t* const words_ = reinterpret_cast<uint64_t*>(reserve(kWords * sizeof(uint64_t)));
  uint64_t* const used_ = reinterpret_cast<uint64_t*>(reserve(kWords * sizeof(uint64_t)));
  std::atomic<size_t> used_count_{0};
};

SectorSet sectors_read, sectors_written;

size_t offset_of(const void* at) {
  return reinterpret_cast<uintptr_t>(at) - reinterpret_cast<uintptr_t>(device_memory);
}

struct Reserved {
  std::mutex mutex;
  size_t taken = 0;
  std::map<size_t, std::vector<char*>> returned;  // by bytes
};
Reserved& reserved() {
  static Reserved* const all = new Reserved;
  return *all;
}

size_t whole_pages(size_t bytes) {
  constexpr size_t kPage = 4096;
  return (bytes + kPage - 1) / kPage * kPage;
}

}  // namespace

Counts& counts() {
  static Counts* const all = new Counts;
  return *all;
}

namespace {
bool passed_over = false;
}
void pass_over_kernels(bool yes) { passed_over = yes; }
bool kernels_passed_over() { return passed_over; }

void count_read(const void* at, size_t bytes) {
  const size_t offset = offset_of(at);
  if (offset < kReserved) sectors_read.add(offset, bytes);
}

void count_written(const void* at, size_t bytes) {
  const size_t offset = offset_of(at);
  if (offset < kReserved) sectors_written.add(offset, bytes);
}

void count_launch(const char* kernel) {
  const size_t read = static_cast<size_t>(sectors_read.take());
  const size_t written = static_cast<size_t>(sectors_written.take());
  count_launch(kernel, read, written);
}

void count_launch(const char* kernel, size_t read, size_t written) {
  Traffic& of = counts().kernels[kernel];
  ++of.launches;
  of.read += static_cast<int64_t>(read);
  of.written += static_cast<int64_t>(written);
}

void* reserve_memory(size_t bytes) {
  bytes = whole_pages(bytes);
  Reserved& all = reserved();
  std::lock_guard<std::mutex> lock(all.mutex);
  std::vector<char*>& returned = all.returned[bytes];
  if (!returned.empty()) {
    char* data = returned.back();
    returned.pop_back();
    return data;
  }
  if (bytes > kReserved - all.taken) return nullptr;
  char* data = device_memory + all.taken;
  all.taken += bytes;
  return data;
}

void return_memory(void* data, size_t bytes) {
  bytes = whole_pages(bytes);
  // The pages go back and read as zero from now on.
  madvise(data, bytes, MADV_DONTNEED);
  Reserved& all = reserved();
  std::lock_guard<std::mutex> lock(all.mutex);
  all.returned[bytes].push_back(static_cast<char*>(data));
}

}  // namespace merf::cuda::emulation

// ---- what instrumented code calls

using merf::cuda::emulation::count_read;
using merf::cuda::emulation::count_written;

// NOLINTBEGIN: the compiler chose the names.
extern "C" {

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_read_range(void* at, size_t bytes) { count_read(at, bytes); }
void __tsan_write_range(void* at, size_t bytes) { count_written(at, bytes); }

#define ACCESS(bytes)                                                        \
  void __tsan_read##bytes(void* at) { count_read(at, bytes); }               \
  void __tsan_write##bytes(void* at) { count_written(at, bytes); }           \
  void __tsan_unaligned_read##bytes(void* at) { count_read(at, bytes); }     \
  void __tsan_unaligned_write##bytes(void* at) { count_written(at, bytes); } \
  void __tsan_volatile_read##bytes(void* at) { count_read(at, bytes); }      \
  void __tsan_volatile_write##bytes(void* at) { count_written(at, bytes); }
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)
#undef ACCESS

// Atomic operations of host code, such as a shared pointer's: carried out and not counted. Kernels have their own.
#define ATOMIC(bits, type)                                                                               \
  type __tsan_atomic##bits##_load(const volatile type* at, int) {                                        \
    return __atomic_load_n(at, __ATOMIC_SEQ_CST);                                                        \
  }                                                                                                      \
  void __tsan_atomic##bits##_store(volatile type* at, type value, int) {                                 \
    __atomic_store_n(at, value, __ATOMIC_SEQ_CST);                                                       \
  }                                                                                                      \
  type __tsan_atomic##bits##_exchange(volatile type* at, type value, int) {                              \
    return __atomic_exchange_n(at, value, __ATOMIC_SEQ_CST);                                             \
  }                                                                                                      \
  type __tsan_atomic##bits##_fetch_add(volatile type* at, type value, int) {                             \
    return __atomic_fetch_add(at, value, __ATOMIC_SEQ_CST);                                              \
  }                                                                                                      \
  type __tsan_atomic##bits##_fetch_sub(volatile type* at, type value, int) {                             \
    return __atomic_fetch_sub(at, value, __ATOMIC_SEQ_CST);                                              \
  }                                                                                                      \
  type __tsan_atomic##bits##_fetch_and(volatile type* at, type value, int) {                             \
    return __atomic_fetch_and(at, value, __ATOMIC_SEQ_CST);                                              \
  }                                                                                                      \
  type __tsan_atomic##bits##_fetch_or(volatile type* at, type value, int) {                              \
    return __atomic_fetch_or(at, value, __ATOMIC_SEQ_CST);                                               \
  }                                                                                                      \
  bool __tsan_atomic##bits##_compare_exchange_strong(volatile type* at, type* expected, type value, int, \
                                                     int) {                                              \
    return __atomic_compare_exchange_n(at, expected, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);  \
  }                                                                                                      \
  bool __tsan_atomic##bits##_compare_exchange_weak(volatile type* at, type* expected, type value, int,   \
                                                   int) {                                                \
    return __atomic_compare_exchange_n(at, expected, value, true, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);   \
  }
ATOMIC(8, uint8_t)
ATOMIC(16, uint16_t)
ATOMIC(32, uint32_t)
ATOMIC(64, uint64_t)
#undef ATOMIC
void __tsan_atomic_thread_fence(int) { std::atomic_thread_fence(std::memory_order_seq_cst); }
void __tsan_atomic_signal_fence(int) { std::atomic_signal_fence(std::memory_order_seq_cst); }
}
// NOLINTEND

#endif
