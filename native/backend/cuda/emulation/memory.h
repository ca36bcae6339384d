// Memory of the emulated GPU: every allocation starts poisoned (all bytes 0xff: NaN in both types, -1 as an integer)
// and lies between guard zones, which are looked at after every kernel.
#pragma once

#include <cstddef>
#include <string>

namespace merf::cuda::emulation {

constexpr size_t kGuardBytes = 256;
constexpr unsigned char kPoison = 0xff;

// Writes a guard zone; whether one is as it was written.
void write_guard(void* zone, size_t bytes);
bool guard_intact(const void* zone, size_t bytes);

// Null where `limit` bytes in all would be passed.
void* allocate(size_t bytes, size_t limit);
void free(void* data);
size_t allocated();

struct Range {
  const char* begin = nullptr;
  const char* end = nullptr;
  bool contains(const void* at, size_t bytes) const {
    const char* from = static_cast<const char*>(at);
    return from >= begin && from < end && static_cast<size_t>(end - from) >= bytes;
  }
};
// The allocation that the address lies in; empty where there is none.
Range allocation_of(const void* at);

// Says which allocation was written outside of its bounds; empty where none was.
std::string find_overrun();

}  // namespace merf::cuda::emulation
