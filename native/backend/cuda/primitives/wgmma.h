// Products of matrices by a warpgroup, four warps that follow one another from a multiple of four on (compute capability
// 9.0 alone, machine code sm_90a): D[64, N] (+)= A[64, K] B[K, N] of bfloat16, accumulated in float32 in registers. B,
// and A unless it stands in registers, are read from shared memory, in panels.
//
// A panel is 64 columns of a row-major matrix: rows of 128 bytes, beginning at a multiple of 1024 bytes, whose 16-byte
// pieces stand at the exclusive or of their place and the row's number modulo 8 (the 128-byte swizzle of the copy engine
// and of matrix descriptors). A matrix with more columns is one panel after another. The same panels serve as a matrix
// whose rows run along the product's depth (MN-major) and as one whose columns do (K-major).
//
// Warp w of the warpgroup holds rows 16 w to 16 w + 15 of D, and of A where it stands in registers, laid out as in mma.h.
//
// Products are asynchronous: between wgmma_commit() and the wait for their group neither D, nor what they read in shared
// memory, may be touched; before the first, and after every wait, comes a wgmma_fence(). All 128 threads reach every
// function here.
#pragma once

#include "backend/cuda/primitives/mma.h"
#include "backend/cuda/primitives/tensor_copy.h"

// Whether what is being compiled has these instructions; a kernel made of them is empty elsewhere.
#if defined(MERF_CUDA_EMULATION) || !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define MERF_HAS_WGMMA 1
#else
#define MERF_HAS_WGMMA 0
#endif

namespace merf::cuda {

constexpr int kWarpgroup = 128;
constexpr int kPanelColumns = 64;

// The offset of element (row, column) in a matrix of panels of `rows` rows.
__device__ constexpr int panel_offset(int rows, int row, int column) {
  return column / kPanelColumns * rows * kPanelColumns + row * kPanelColumns +
         (((column % kPanelColumns / 8) ^ (row % 8)) * 8) + column % 8;
}

// PTX ISA, "Matrix Descriptor Format": address, leading and stride byte offset in units of 16 bytes, and the swizzle.
// Eight rows of a panel are 1024 bytes further; `leading` counts for MN-major matrices alone: from panel to panel.
__device__ inline uint64_t matrix_descriptor(const bf16* panel, int leading) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62, kStride = uint64_t{1024 / 16} << 32;
  return kSwizzle128 | kStride | static_cast<uint64_t>(leading / 16) << 16 |
         ((shared_address(panel) & 0x3ffff) >> 4);
}
// The descriptor of what lies `bytes` further.
__device__ constexpr uint64_t advance(uint64_t descriptor, int bytes) {
  return descriptor + static_cast<uint64_t>(bytes / 16);
}

#if defined(MERF_CUDA_EMULATION)
using emulation::wgmma_commit;
using emulation::wgmma_fence;
using emulation::wgmma_wait;
#else
__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// Closes the group of this warpgroup's products since the last call.
__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits for all groups but the youngest `Pending`.
template <int Pending>
__device__ inline void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}

// wgmma_step enqueues the product of one step of depth 16.

#define MERF_WGMMA_D(n) "+f"(d[n].at[0]), "+f"(d[n].at[1]), "+f"(d[n].at[2]), "+f"(d[n].at[3])
template <bool MnMajor>
__device__ inline void wgmma_step(Accumulator (&d)[8], uint64_t a, uint64_t b, bool add) {
  asm volatile(
      "{\n"
      ".reg .pred add;\n"
      "setp.ne.b32 add, %34, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
      "%32, %33, add, 1, 1, 0, %35;\n"
      "}\n"
      : MERF_WGMMA_D(0), MERF_WGMMA_D(1), MERF_WGMMA_D(2), MERF_WGMMA_D(3), MERF_WGMMA_D(4), MERF_WGMMA_D(5),
        MERF_WGMMA_D(6), MERF_WGMMA_D(7)
      : "l"(a), "l"(b), "r"(static_cast<int>(add)), "n"(MnMajor ? 1 : 0));
}
__device__ inline void wgmma_step(Accumulator (&d)[8], const FragmentA<bf16>& a, uint64_t b, bool add) {
  asm volatile(
      "{\n"
      ".reg .pred add;\n"
      "setp.ne.b32 add, %37, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
      "{%32, %33, %34, %35}, %36, add, 1, 1, 1;\n"
      "}\n"
      : MERF_WGMMA_D(0), MERF_WGMMA_D(1), MERF_WGMMA_D(2), MERF_WGMMA_D(3), MERF_WGMMA_D(4), MERF_WGMMA_D(5),
        MERF_WGMMA_D(6), MERF_WGMMA_D(7)
      : "r"(a.at[0]), "r"(a.at[1]), "r"(a.at[2]), "r"(a.at[3]), "l"(b), "r"(static_cast<int>(add)));
}
template <bool MnMajor>
__device__ inline void wgmma_step(Accumulator (&d)[16], uint64_t a, uint64_t b, bool add) {
  asm volatile(
      "{\n"
      ".reg .pred add;\n"
      "setp.ne.b32 add, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
      "%64, %65, add, 1, 1, 0, %67;\n"
      "}\n"
      : MERF_WGMMA_D(0), MERF_WGMMA_D(1), MERF_WGMMA_D(2), MERF_WGMMA_D(3), MERF_WGMMA_D(4), MERF_WGMMA_D(5),
        MERF_WGMMA_D(6), MERF_WGMMA_D(7), MERF_WGMMA_D(8), MERF_WGMMA_D(9), MERF_WGMMA_D(10),
        MERF_WGMMA_D(11), MERF_WGMMA_D(12), MERF_WGMMA_D(13), MERF_WGMMA_D(14), MERF_WGMMA_D(15)
      : "l"(a), "l"(b), "r"(static_cast<int>(add)), "n"(MnMajor ? 1 : 0));
}
__device__ inline void wgmma_step(Accumulator (&d)[16], const FragmentA<bf16>& a, uint64_t b, bool add) {
  asm volatile(
      "{\n"
      ".reg .pred add;\n"
      "setp.ne.b32 add, %69, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
      "{%64, %65, %66, %67}, %68, add, 1, 1, 1;\n"
      "}\n"
      : MERF_WGMMA_D(0), MERF_WGMMA_D(1), MERF_WGMMA_D(2), MERF_WGMMA_D(3), MERF_WGMMA_D(4), MERF_WGMMA_D(5),
        MERF_WGMMA_D(6), MERF_WGMMA_D(7), MERF_WGMMA_D(8), MERF_WGMMA_D(9), MERF_WGMMA_D(10),
        MERF_WGMMA_D(11), MERF_WGMMA_D(12), MERF_WGMMA_D(13), MERF_WGMMA_D(14), MERF_WGMMA_D(15)
      : "r"(a.at[0]), "r"(a.at[1]), "r"(a.at[2]), "r"(a.at[3]), "l"(b), "r"(static_cast<int>(add)));
}
#define MERF_WGMMA_SET(n) "=f"(d[n].at[0]), "=f"(d[n].at[1]), "=f"(d[n].at[2]), "=f"(d[n].at[3])
// A first step, which sets d: what d was before need not be ready.
__device__ inline void wgmma_first(Accumulator (&d)[8], uint64_t a, uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
      "%32, %33, 0, 1, 1, 0, 0;\n"
      : MERF_WGMMA_SET(0), MERF_WGMMA_SET(1), MERF_WGMMA_SET(2), MERF_WGMMA_SET(3), MERF_WGMMA_SET(4),
        MERF_WGMMA_SET(5), MERF_WGMMA_SET(6), MERF_WGMMA_SET(7)
      : "l"(a), "l"(b));
}
__device__ inline void wgmma_first(Accumulator (&d)[16], uint64_t a, uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
      "%64, %65, 0, 1, 1, 0, 0;\n"
      : MERF_WGMMA_SET(0), MERF_WGMMA_SET(1), MERF_WGMMA_SET(2), MERF_WGMMA_SET(3), MERF_WGMMA_SET(4),
        MERF_WGMMA_SET(5), MERF_WGMMA_SET(6), MERF_WGMMA_SET(7), MERF_WGMMA_SET(8), MERF_WGMMA_SET(9),
        MERF_WGMMA_SET(10), MERF_WGMMA_SET(11), MERF_WGMMA_SET(12), MERF_WGMMA_SET(13), MERF_WGMMA_SET(14),
        MERF_WGMMA_SET(15)
      : "l"(a), "l"(b));
}
#undef MERF_WGMMA_SET
#undef MERF_WGMMA_D
#endif

// Keeps the compiler from reading d earlier; it stands behind the wait for the product that makes d.
template <int Blocks>
__device__ inline void wgmma_done([[maybe_unused]] Accumulator (&d)[Blocks]) {
#if !defined(MERF_CUDA_EMULATION)
#pragma unroll
  for (int n = 0; n < Blocks; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+f"(d[n].at[i])::"memory");
  }
#endif
}

// d = A B^T for A [64, Depth] and B [N, Depth] in panels: `a` is A's first row in panels of `a_rows` rows (a multiple of
// 8 rows from their beginning), b likewise.
template <int Depth, int Blocks>
__device__ inline void wgmma_transposed(Accumulator (&d)[Blocks], const bf16* a, int a_rows, const bf16* b,
                                        int b_rows) {
  const uint64_t left = matrix_descriptor(a, 16), right = matrix_descriptor(b, 16);
  const auto at = [](uint64_t descriptor, int rows, int step) {
    return advance(descriptor, step / 4 * rows * 2 * kPanelColumns + step % 4 * 32);
  };
#if defined(MERF_CUDA_EMULATION)
  uint64_t lefts[Depth / 16], rights[Depth / 16];
  for (int step = 0; step < Depth / 16; ++step) {
    lefts[step] = at(left, a_rows, step);
    rights[step] = at(right, b_rows, step);
  }
  emulation::wgmma(d[0].at, 8 * Blocks, Depth / 16, nullptr, lefts, rights, false, false);
#else
#pragma unroll
  for (int step = 0; step < Depth / 16; ++step) {
    if (step == 0) {
      wgmma_first(d, left, right);
    } else {
      wgmma_step<false>(d, at(left, a_rows, step), at(right, b_rows, step), true);
    }
  }
#endif
}

// d (+)= A B for A [64, Depth] in registers and B [Depth, N] in panels of `b_rows` rows, of which b is the first row (a
// multiple of 8 rows from their beginning). Without `add`, d is set.
template <int Depth, int Blocks>
__device__ inline void wgmma_add(Accumulator (&d)[Blocks], const FragmentA<bf16> (&a)[Depth / 16],
                                 const bf16* b, int b_rows, bool add) {
  const uint64_t right = matrix_descriptor(b, b_rows * 2 * kPanelColumns);
  constexpr int kStepBytes = 16 * 2 * kPanelColumns;
#if defined(MERF_CUDA_EMULATION)
  uint64_t rights[Depth / 16];
  for (int step = 0; step < Depth / 16; ++step) rights[step] = advance(right, step * kStepBytes);
  emulation::wgmma(d[0].at, 8 * Blocks, Depth / 16, a[0].at, nullptr, rights, true, add);
#else
#pragma unroll
  for (int step = 0; step < Depth / 16; ++step) {
    wgmma_step(d, a[step], advance(right, step * kStepBytes), add || step > 0);
  }
#endif
}

// d, rounded, as the A of a product of depth 8 * Blocks.
template <int Blocks>
__device__ inline void to_fragments(FragmentA<bf16> (&a)[Blocks / 2], const Accumulator (&d)[Blocks]) {
#pragma unroll
  for (int step = 0; step < Blocks / 2; ++step) to_fragment(a[step], &d[2 * step]);
}

// Registers for each thread of the warpgroup from here on, from what the block was launched with. A multiple of 8; the
// kernel has __launch_bounds__(threads, 1), and a branch for each warpgroup's part begins with one of the two.
template <int Registers>
__device__ inline void more_registers() {
#if !defined(MERF_CUDA_EMULATION)
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
#endif
}
template <int Registers>
__device__ inline void fewer_registers() {
#if !defined(MERF_CUDA_EMULATION)
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
#endif
}

}  // namespace merf::cuda
