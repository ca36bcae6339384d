// oneDNN's matrix products: primitives made once a shape and kept.
#pragma once

#include <dnnl.hpp>

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>

#include "backend/tensor.h"

namespace merf {

class CpuBackend;

// c[m, n] = a[m, k] * b[k, n] (+ bias[n]) (+ c).
struct ProductShape {
  // How b is stored, and a where it is dy read as its transpose.
  enum class Form : uint8_t {
    packed_forward,   // b is a weight [N, K] packed for x * W^T
    packed_backward,  // b is a weight [N, K] packed for dy * W
    outer,            // a is stored [k, m], b [k, n]: dy^T * x
  };
  Form form = Form::packed_forward;
  DType in = DType::f32;
  DType out = DType::f32;
  bool bias = false;
  bool accumulate = false;
  int64_t m = 0;
  int64_t n = 0;
  int64_t k = 0;

  bool operator==(const ProductShape&) const = default;
};

struct ProductShapeHash {
  size_t operator()(const ProductShape& shape) const;
};

class Products {
 public:
  explicit Products(CpuBackend& backend) : backend_(backend) {}

  // Whether oneDNN has its blocked products for this type here. Only those are used, because they give the same bits
  // whatever the number of threads; where there are none, `gemm` below does the work.
  bool fast(DType dtype);

  // The layout that oneDNN wants for a weight [N, K], for all sizes of batch.
  dnnl::memory::desc packed_layout(ProductShape::Form form, DType dtype, int64_t n, int64_t k);
  // A weight [N, K] into that layout, and back.
  void pack(ProductShape::Form form, const Tensor& weight, const Tensor& packed);
  void unpack(ProductShape::Form form, const Tensor& packed, const Tensor& weight);

  // False where oneDNN has no blocked product for this shape; nothing is done then.
  bool run(const ProductShape& shape, const void* a, const void* b, const void* bias, void* c);

  // c[m, n] = op(a) * op(b) + beta * c, all f32 and row-major; in tiles of fixed size, so that the result does not
  // depend on the number of threads.
  void gemm(bool transpose_a, bool transpose_b, int64_t m, int64_t n, int64_t k, const float* a,
            const float* b, float beta, float* c);

 private:
  struct Primitive {
    dnnl::matmul primitive;
    dnnl::memory::desc a, b, bias, c, scratch;
    bool fast = false;
  };
  Primitive make(const ProductShape& shape);
  void reorder(const dnnl::memory::desc& from, const void* source, const dnnl::memory::desc& to,
               void* destination);

  CpuBackend& backend_;
  dnnl::engine engine_{dnnl::engine::kind::cpu, 0};
  dnnl::stream stream_{engine_};
  std::mutex mutex_;
  std::unordered_map<ProductShape, Primitive, ProductShapeHash> primitives_;
  int fast_[2] = {-1, -1};
};

}  // namespace merf
