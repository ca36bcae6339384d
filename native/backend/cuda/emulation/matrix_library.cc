#include "backend/cuda/matrix_library.h"

#include <cstring>

#include "backend/cuda/emulation/counts.h"

namespace merf::cuda {

#if defined(MERF_EMULATION_COUNTS)
namespace {

// Stands for cuBLASLt where launches are counted: a product is one launch that reads its operands and writes its result
// once. It is not computed, since nobody looks at the numbers: the result is zero, or what it is added to.
class CountedProducts final : public MatrixLibrary {
 public:
  explicit CountedProducts(Gpu& gpu) : gpu_(gpu) {}
  std::string version() const override { return "counted"; }
  bool multiply(bool, bool, int64_t m, int64_t n, int64_t k, const void*, const void*, DType in, void* c,
                DType out, bool accumulate) override {
    const auto bytes = [](int64_t elements, DType dtype) {
      return static_cast<size_t>(elements) * size_of(dtype);
    };
    const size_t operands = bytes(m * k + k * n, in), result = bytes(m * n, out);
    gpu_.enqueue([=] {
      if (!accumulate && !emulation::kernels_passed_over()) std::memset(c, 0, result);
      emulation::count_launch("product", operands + (accumulate ? result : 0), result);
    });
    return true;
  }

 private:
  Gpu& gpu_;
};

}  // namespace

std::shared_ptr<MatrixLibrary> MatrixLibrary::open(Gpu& gpu) {
  return std::make_shared<CountedProducts>(gpu);
}
#else
// cuBLASLt runs on no emulated GPU, so that tests run the product that stands in for it.
std::shared_ptr<MatrixLibrary> MatrixLibrary::open(Gpu&) { return nullptr; }
#endif

}  // namespace merf::cuda
