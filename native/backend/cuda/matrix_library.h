// cuBLASLt, opened at run time: from the path in MERF_CUBLASLT, the system's libraries, the CUDA toolkit, or pip's
// nvidia-cublas. Where there is none, matmul.cu's own product serves.
//
// Under emulation there is none unless MERF_EMULATION_CUBLASLT is the path to one that computes on the host: that of
// the tests.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "backend/cuda/gpu.h"

namespace merf::cuda {

// c[m, n] = op(a) * op(b) (+ bias) (+ c), all row-major, accumulated in float32 and never in TF32. op(a) is [m, k], stored
// as [k, m] where transpose_a; op(b) is [k, n], stored as [n, k] where transpose_b.
struct Product {
  bool transpose_a = false, transpose_b = false;
  int64_t m = 0, n = 0, k = 0;
  const void* a = nullptr;
  const void* b = nullptr;
  DType in = DType::f32;  // of a and b
  void* c = nullptr;
  DType out = DType::f32;       // of c
  const float* bias = nullptr;  // [n]
  bool accumulate = false;      // + c
};

class MatrixLibrary {
 public:
  virtual ~MatrixLibrary() = default;
  // Null where no library was found, which is said on stderr once, or none is wanted.
  // Throws DEVICE_UNAVAILABLE where the one in MERF_CUBLASLT does not work.
  static std::shared_ptr<MatrixLibrary> open(Gpu& gpu);

  virtual std::string version() const = 0;

  // False where the library refused, or failed with the GPU as it was; nothing is done then.
  virtual bool multiply(const Product& product) = 0;
};

}  // namespace merf::cuda
