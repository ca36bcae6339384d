#include "backend/cuda/emulation/memory.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

#include "backend/cuda/emulation/counts.h"

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

// NaN in bfloat16 and float32, and no small integer: 0xa5 at even addresses, 0xff at odd ones. Eight bytes from `at`.
uint64_t guard_bytes(const char* at) {
  return reinterpret_cast<uintptr_t>(at) % 2 == 0 ? 0xffa5ffa5ffa5ffa5u : 0xa5ffa5ffa5ffa5ffu;
}

size_t padded(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

// An allocation of so many bytes with its guards.
size_t block_bytes(size_t bytes) { return kGuardBytes + padded(bytes) + padded(kGuardBytes); }
#if defined(MERF_EMULATION_COUNTS)
// Not poisoned: what no product writes stays finite, and weights of which nothing is read take no memory.
char* take_block(size_t bytes) { return static_cast<char*>(reserve_memory(block_bytes(bytes))); }
void give_block(char* block, size_t bytes) { return_memory(block, block_bytes(bytes)); }
#else
char* take_block(size_t bytes) {
  char* block = static_cast<char*>(std::aligned_alloc(kAlignment, block_bytes(bytes)));
  if (block != nullptr) std::memset(block + kGuardBytes, kPoison, bytes);
  return block;
}
void give_block(char* block, size_t) { std::free(block); }
#endif

}  // namespace

void write_guard(void* zone, size_t bytes) {
  char* at = static_cast<char*>(zone);
  const uint64_t wanted = guard_bytes(at);
  for (size_t i = 0; i < bytes; i += sizeof(wanted)) {
    std::memcpy(at + i, &wanted, std::min(sizeof(wanted), bytes - i));
  }
}

// All guards are looked at after every kernel, so eight bytes at a time.
bool guard_intact(const void* zone, size_t bytes) {
  const char* at = static_cast<const char*>(zone);
  const uint64_t wanted = guard_bytes(at);
  uint64_t difference = 0;
  size_t i = 0;
  for (; i + sizeof(wanted) <= bytes; i += sizeof(wanted)) {
    uint64_t found;
    std::memcpy(&found, at + i, sizeof(found));
    difference |= found ^ wanted;
  }
  return difference == 0 && std::memcmp(at + i, &wanted, bytes - i) == 0;
}

void* allocate(size_t bytes, size_t limit) {
  Allocations& all = allocations();
  std::lock_guard<std::mutex> lock(all.mutex);
  if (bytes > limit || all.bytes > limit - bytes) return nullptr;
  // The guard behind begins at the last byte's heels, not at the next multiple of the alignment.
  char* block = take_block(bytes);
  if (block == nullptr) return nullptr;
  char* data = block + kGuardBytes;
  write_guard(block, kGuardBytes);
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
  const size_t bytes = found->second;
  all.bytes -= bytes;
  all.sizes.erase(found);
  give_block(static_cast<char*>(data) - kGuardBytes, bytes);
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
