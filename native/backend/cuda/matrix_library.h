// cuBLASLt, opened at run time: from the path in MERF_CUBLASLT, the system's libraries, the CUDA toolkit, or pip's
// nvidia-cublas. Where there is none, matmul.cu's own product serves.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "backend/cuda/gpu.h"

namespace merf::cuda {

class MatrixLibrary {
 public:
  virtual ~MatrixLibrary() = default;
  // Null where no library was found, which is said on stderr once, or none is wanted; on the emulated GPU always.
  // Throws DEVICE_UNAVAILABLE where the one in MERF_CUBLASLT does not work.
  static std::shared_ptr<MatrixLibrary> open(Gpu& gpu);

  virtual std::string version() const = 0;

  // c[m, n] = op(a) * op(b) (+ c where accumulate), all row-major, accumulated in float32 and never in TF32.
  // op(a) is [m, k], stored as [k, m] where transpose_a; op(b) is [k, n], stored as [n, k] where transpose_b.
  // a and b are of type `in`, c of type `out`. False where the library refused; nothing is done then.
  virtual bool multiply(bool transpose_a, bool transpose_b, int64_t m, int64_t n, int64_t k, const void* a,
                        const void* b, DType in, void* c, DType out, bool accumulate) = 0;
};

}  // namespace merf::cuda
