#include "backend/cpu/tile_kernel.h"

#include <algorithm>
#include <cstdlib>

#include "backend/cpu/panels.h"

#ifdef MERF_XSMM
#include <libxsmm.h>
#endif

namespace merf {

namespace {

#ifdef MERF_XSMM

// The library is initialised as the program is loaded, before there are other threads: it asks in the environment that
// OpenMP's threads be bound, which would bind programs that this one starts, all of their threads, to one processor.
const bool kInitialized = [] {
  constexpr const char* kBinding = "OMP_PROC_BIND";
  const bool wanted = std::getenv(kBinding) != nullptr;
  libxsmm_init();
  if (!wanted) unsetenv(kBinding);
  return true;
}();

// The library's matrices are stored by columns, so its A is the panel and its B and C are x and out.
libxsmm_xmmfunction generate(const TileShape& shape) {
  const auto size = [](int64_t value) { return static_cast<libxsmm_blasint>(value); };
  const libxsmm_blasint lda = size(kPanel), ldb = size(shape.x_stride), ldc = size(shape.out_stride);
  const float alpha = 1.0f, beta = shape.add ? 1.0f : 0.0f;
  const int prefetch = shape.prefetch ? LIBXSMM_GEMM_PREFETCH_AL2 : LIBXSMM_GEMM_PREFETCH_NONE;
  libxsmm_xmmfunction code;
  code.xmm = nullptr;
  if (shape.dtype == DType::bf16) {
    const int flags = LIBXSMM_GEMM_FLAG_VNNI_A;
    const auto m = size(shape.width), n = size(shape.rows), k = size(shape.depth);
    if (shape.out == DType::bf16) {
      code.bmm = libxsmm_bmmdispatch(m, n, k, &lda, &ldb, &ldc, &alpha, &beta, &flags, &prefetch);
    } else {
      code.bsmm = libxsmm_bsmmdispatch(m, n, k, &lda, &ldb, &ldc, &alpha, &beta, &flags, &prefetch);
    }
  } else {
    const int flags = shape.x_transposed ? LIBXSMM_GEMM_FLAG_TRANS_B : LIBXSMM_GEMM_FLAG_NONE;
    code.smm = libxsmm_smmdispatch(size(shape.width), size(shape.rows), size(shape.depth), &lda, &ldb, &ldc,
                                   &alpha, &beta, &flags, &prefetch);
  }
  return code;
}

#endif

void multiply_plainly(const TileShape& shape, const float* panel, const float* x, float* out) {
  constexpr int64_t kColumns = 16;
  const int64_t row = shape.x_transposed ? 1 : shape.x_stride, step = shape.x_transposed ? shape.x_stride : 1;
  for (int64_t i = 0; i < shape.rows; ++i) {
    for (int64_t first = 0; first < shape.width; first += kColumns) {
      const int64_t columns = std::min(kColumns, shape.width - first);
      float sums[kColumns] = {};
      float* to = out + i * shape.out_stride + first;
      if (shape.add) std::copy(to, to + columns, sums);
      for (int64_t l = 0; l < shape.depth; ++l) {
        const float factor = x[i * row + l * step];
        for (int64_t j = 0; j < columns; ++j) sums[j] += factor * panel[l * kPanel + first + j];
      }
      std::copy(sums, sums + columns, to);
    }
  }
}

}  // namespace

bool has_tile_kernels(DType dtype) {
  if (dtype == DType::f32) return true;
#ifdef MERF_XSMM
  static const bool known = kInitialized && libxsmm_get_target_archid() >= LIBXSMM_X86_AVX512_CPX &&
                            generate({DType::bf16, DType::f32, kPanel, 8, 64, 64, kPanel}).xmm != nullptr;
  return known;
#else
  return false;
#endif
}

std::string tile_library_version() {
#ifdef MERF_XSMM
  return std::to_string(LIBXSMM_VERSION_MAJOR) + "." + std::to_string(LIBXSMM_VERSION_MINOR);
#else
  return {};
#endif
}

TileKernel::TileKernel(const TileShape& shape) : shape_(shape) {
#ifdef MERF_XSMM
  code_ = reinterpret_cast<void (*)()>(generate(shape).xmm);
  if (code_ == nullptr && shape.dtype == DType::bf16) {
    throw Error("OUT_OF_MEMORY", "Could not allocate a product's code on cpu");
  }
#endif
}

void TileKernel::operator()(const void* panel, const void* x, void* out, const void* next) const {
#ifdef MERF_XSMM
  if (code_ != nullptr) {
    // A kernel that fetches takes what comes next of all three; it fetches the panel alone.
    if (shape_.prefetch) {
      using Fetching = void (*)(const void*, const void*, void*, const void*, const void*, const void*);
      reinterpret_cast<Fetching>(code_)(panel, x, out, next, x, out);
    } else {
      reinterpret_cast<void (*)(const void*, const void*, void*)>(code_)(panel, x, out);
    }
    return;
  }
#endif
  multiply_plainly(shape_, static_cast<const float*>(panel), static_cast<const float*>(x),
                   static_cast<float*>(out));
}

}  // namespace merf
