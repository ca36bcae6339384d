#include "backend/cuda/emulation/memory.h"

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

namespace merf::cuda::emulation {
namespace {

struct Allocations {
  std::mutex mutex;
  std::map<char*, size_t> sizes;  // of the data, without guards
  size_t bytes = 0;
};

Allocations& allocations() {
  static Allocations* const all = new Allocations;
  return *all;
}

constexpr size_t kAlignment = 256;

// NaN in bfloat16 and float32, and no small integer.
unsigned char guard_byte(size_t i) { return i % 2 == 0 ? 0xa5 : 0xff; }

size_t padded(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

}  // namespace

void write_guard(void* zone, size_t bytes) {
  unsigned char* at = static_cast<unsigned char*>(zone);
  for (size_t i = 0; i < bytes; ++i) at[i] = guard_byte(reinterpret_cast<uintptr_t>(at + i));
}

bool guard_intact(const void* zone, size_t bytes) {
  const unsigned char* at = static_cast<const unsigned char*>(zone);
  for (size_t i = 0; i < bytes; ++i) {
    if (at[i] != guard_byte(reinterpret_cast<uintptr_t>(at + i))) return false;
  }
  return true;
}

void* allocate(size_t bytes, size_t limit) {
  Allocations& all = allocations();
  std::lock_guard<std::mutex> lock(all.mutex);
  if (bytes > limit || all.bytes > limit - bytes) return nullptr;
  // The guard behind begins at the last byte's heels, not at the next multiple of the alignment.
  char* block =
      static_cast<char*>(std::aligned_alloc(kAlignment, kGuardBytes + padded(bytes) + padded(kGuardBytes)));
  if (block == nullptr) return nullptr;
  char* data = block + kGuardBytes;
  write_guard(block, kGuardBytes);
  std::memset(data, kPoison, bytes);
  write_guard(data + bytes, padded(bytes) - bytes + kGuardBytes);
  all.sizes[data] = bytes;
  all.bytes += bytes;
  return data;
}

void free(void* data) {
  if (data == nullptr) return;
  Allocations& all = allocations();
  std::lock_guard<std::mutex> lock(all.mutex);
  const auto found = all.sizes.find(static_cast<char*>(data));
  if (found == all.sizes.end()) std::abort();
  all.bytes -= found->second;
  all.sizes.erase(found);
  std::free(static_cast<char*>(data) - kGuardBytes);
}

size_t allocated() {
  Allocations& all = allocations();
  std::lock_guard<std::mutex> lock(all.mutex);
  return all.bytes;
}

Range allocation_of(const void* at) {
  Allocations& all = allocations();
  std::lock_guard<std::mutex> lock(all.mutex);
  auto next = all.sizes.upper_bound(static_cast<char*>(const_cast<void*>(at)));
  if (next == all.sizes.begin()) return {};
  const auto& [data, bytes] = *--next;
  const Range range{data, data + bytes};
  return range.contains(at, 0) ? range : Range{};
}

std::string find_overrun() {
  Allocations& all = allocations();
  std::lock_guard<std::mutex> lock(all.mutex);
  for (const auto& [data, bytes] : all.sizes) {
    const bool before = guard_intact(data - kGuardBytes, kGuardBytes);
    const bool behind = guard_intact(data + bytes, padded(bytes) - bytes + kGuardBytes);
    if (before && behind) continue;
    // Said once: what follows is another kernel's doing.
    write_guard(data - kGuardBytes, kGuardBytes);
    write_guard(data + bytes, padded(bytes) - bytes + kGuardBytes);
    return std::string(before ? "behind" : "before") + " an allocation of " + std::to_string(bytes) +
           " bytes";
  }
  return {};
}

}  // namespace merf::cuda::emulation
