// Stands for cuBLASLt where launches are counted (counts.h).
#include "backend/cuda/matrix_library.h"

#include <cstring>

#include "backend/cuda/emulation/counts.h"

namespace merf::cuda {
namespace {

// A product is one launch that reads its operands and writes its result once. It is not computed, since nobody looks at
// the numbers: the result is zero, or what it is added to.
class CountedProducts final : public MatrixLibrary {
 public:
  explicit CountedProducts(Gpu& gpu) : gpu_(gpu) {}
  std::string version() const override { return "counted"; }
  bool multiply(const Product& p) override {
    const auto bytes = [](int64_t elements, DType dtype) {
      return static_cast<size_t>(elements) * size_of(dtype);
    };
    const size_t bias = p.bias == nullptr ? 0 : bytes(p.n, DType::f32);
    const size_t operands = bytes(p.m * p.k + p.k * p.n, p.in) + bias, result = bytes(p.m * p.n, p.out);
    gpu_.enqueue([=, c = p.c, accumulate = p.accumulate] {
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

}  // namespace merf::cuda
