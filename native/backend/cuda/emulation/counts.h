// What the device emulated for counting does: launches of each kernel, the bytes of device memory that they read and
// write, transfers and waits. Only where MERF_EMULATION_COUNTS is defined, for benchmarks/launches.cc; elsewhere nothing
// is counted and these functions are empty.
//
// Kernels are compiled with the accesses to memory instrumented as for ThreadSanitizer, and counts.cc has the functions
// that the compiler then calls. Bytes are those of the sectors of 32 bytes that a launch reads (writes), each once: what
// has to move between device memory and the processors where the caches hold all of one launch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>

namespace merf::cuda::emulation {

// The most that a launch's memory is divided into: what a GPU moves at once.
constexpr size_t kSectorBytes = 32;

struct Traffic {
  int64_t launches = 0, read = 0, written = 0;  // bytes
};

struct Transfers {
  int64_t uploads = 0, uploaded = 0;      // uploaded: bytes
  int64_t downloads = 0, downloaded = 0;  // each of which waits for the device
  int64_t synchronizations = 0;           // beside those of downloads
  int64_t plays = 0;                      // of recordings
};

struct Counts {
  std::map<std::string, Traffic> kernels;  // by name, beside "copy" and "fill"
  Transfers transfers;
};

// What has been counted since the process began.
Counts& counts();

// Kernels are counted but not run, for what leads to the step that is looked at, and where launches are all that is asked
// for: their bytes are not known then.
void pass_over_kernels(bool yes);

#if defined(MERF_EMULATION_COUNTS)

constexpr bool kCounts = true;

// count_read and count_written count for the launch that runs. Addresses outside of the device's memory are
// passed over.
void count_read(const void* at, size_t bytes);
void count_written(const void* at, size_t bytes);
// Ends a launch: counts what was read and written since the last one's end.
void count_launch(const char* kernel);
bool kernels_passed_over();
// A launch whose bytes are known.
void count_launch(const char* kernel, size_t read, size_t written);

// Memory of the device, as std::aligned_alloc's and std::free's, but always zero at first and where counting looks.
void* reserve_memory(size_t bytes);
void return_memory(void* data, size_t bytes);

#else

constexpr bool kCounts = false;
inline bool kernels_passed_over() { return false; }
inline void count_read(const void*, size_t) {}
inline void count_written(const void*, size_t) {}
inline void count_launch(const char*) {}
inline void count_launch(const char*, size_t, size_t) {}

#endif

}  // namespace merf::cuda::emulation
