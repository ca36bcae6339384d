// CUDA's kernel language for the host's compiler: what primitives/ needs of it, with CUDA's meaning. The work is done
// by emulator.cc.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <source_location>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __grid_constant__

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3() = default;
  constexpr dim3(unsigned x, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace merf::cuda::emulation {

struct ThreadIndices {
  dim3 thread, block, block_size, grid_size;
};
// The indices of the thread that runs; they stay in one place as long as it does.
[[gnu::const]] const ThreadIndices& indices();

// The block's piece of shared memory with that number, made at the first call for it.
void* take_shared(int piece, size_t bytes);

void sync_block(std::source_location at = std::source_location::current());
void sync_threads(int barrier, int threads, std::source_location at = std::source_location::current());
void sync_warp(std::source_location at = std::source_location::current());
// bar.arrive: counted like sync_threads, without waiting.
void arrive_threads(int barrier, int threads, std::source_location at = std::source_location::current());

// A value of up to 8 bytes from lane `source`.
uint64_t shuffle_bits(uint64_t value, int source, const std::source_location& at);
template <typename T>
T shuffle(T value, int source, std::source_location at = std::source_location::current()) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = shuffle_bits(bits, source, at);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}
uint32_t ballot(bool condition, std::source_location at = std::source_location::current());
inline bool any(bool condition, std::source_location at = std::source_location::current()) {
  return ballot(condition, at) != 0;
}

uint32_t atomic_add(uint32_t* to, uint32_t value);
uint64_t atomic_add(uint64_t* to, uint64_t value);
void fence_memory();

float fast_exp2(float x);

// A GPU faults at an address that is no multiple of the bytes accessed; here the launch ends with an error.
void refuse_address(const char* operation, size_t bytes);
inline void check_aligned(const char* operation, const void* address, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) refuse_address(operation, bytes);
}

// The bytes arrive when the thread waits for their group, not before.
void copy_async(void* to_shared, const void* from, bool valid = true,
                std::source_location at = std::source_location::current());
void copy_async_commit();
void copy_async_wait_for(int pending);
template <int Pending>
void copy_async_wait() {
  copy_async_wait_for(Pending);
}

// `count` times load_matrices, each `bytes_apart` further in shared memory and 4 registers further in `to`.
void load_matrices(uint32_t* to, const void* row, int count, size_t bytes_apart, bool transposed,
                   std::source_location at = std::source_location::current());
inline void load_matrices(uint32_t (&to)[4], const void* row,
                          std::source_location at = std::source_location::current()) {
  load_matrices(to, row, 1, 0, false, at);
}
inline void load_matrices_transposed(uint32_t (&to)[4], const void* row,
                                     std::source_location at = std::source_location::current()) {
  load_matrices(to, row, 1, 0, true, at);
}

// Every product of `rows` fragments A with `columns` fragments B: d [rows][columns][4], a [rows][4], b [columns][2].
constexpr int kMostMmaBlocks = 16;  // rows or columns
void mma_bf16(float* d, const uint32_t* a, const uint32_t* b, int rows, int columns,
              std::source_location at = std::source_location::current());
inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                     std::source_location at = std::source_location::current()) {
  mma_bf16(d, a, b, 1, 1, at);
}

// Where `at` stands in the block's shared memory, as instructions that take a number for an address see it.
uint32_t shared_address(const void* at);

// ---- mbarrier: a phase ends when `arrivals` threads have arrived and as many bytes were copied as they announced.
void barrier_init(uint64_t* barrier, int arrivals, std::source_location at = std::source_location::current());
void barrier_arrive(uint64_t* barrier, std::source_location at = std::source_location::current());
void barrier_expect(uint64_t* barrier, uint32_t bytes,
                    std::source_location at = std::source_location::current());
void barrier_wait(uint64_t* barrier, int parity, std::source_location at = std::source_location::current());

// A tensor [sizes[2], sizes[1], sizes[0]] of 2-byte elements, of which [rows, 1, 64] are copied at a time.
struct TensorMap {
  const char* data = nullptr;
  int64_t sizes[3] = {};
  int64_t strides[3] = {};  // bytes
  int rows = 0;
};
// cp.async.bulk.tensor with 128-byte swizzle. The bytes arrive at once, or not before a thread waits for the barrier:
// that is drawn.
void copy_tensor(void* to_shared, const TensorMap& map, int column, int middle, int row, uint64_t* barrier,
                 std::source_location at = std::source_location::current());

void copy_bulk(void* to_shared, const void* from, uint32_t bytes, uint64_t* barrier,
               std::source_location at = std::source_location::current());

// ---- wgmma: d[64, columns] of the four warps of a warpgroup, which all meet here, = (add ? d : 0) plus the products of
// `steps` steps of depth 16. A stands in shared memory as a_descriptors[steps] say (K-major), or where these are null in
// each lane's registers a[steps][4]; B as b_descriptors[steps] say, MN-major or K-major. Shared memory is read at once
// or not before a thread waits, which is drawn; until then d is NaN.
void wgmma(float* d, int columns, int steps, const uint32_t* a, const uint64_t* a_descriptors,
           const uint64_t* b_descriptors, bool b_mn_major, bool add,
           std::source_location at = std::source_location::current());
void wgmma_fence();
void wgmma_commit();
void wgmma_wait_for(int pending);
template <int Pending>
void wgmma_wait() {
  wgmma_wait_for(Pending);
}

// What mma_bf16 does, of one lane's float32 fragments: d [rows][columns][4], a [rows][2][8], b [columns][2][8]. No meeting.
void mma_f32(float* d, const float* a, const float* b, int rows, int columns);

}  // namespace merf::cuda::emulation

#define threadIdx (::merf::cuda::emulation::indices().thread)
#define blockIdx (::merf::cuda::emulation::indices().block)
#define blockDim (::merf::cuda::emulation::indices().block_size)
#define gridDim (::merf::cuda::emulation::indices().grid_size)
