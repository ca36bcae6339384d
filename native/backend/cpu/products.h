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

  // Whether oneDNN has its blocked products (brgemm) for this type here, which is from AVX-512 on.
  bool fast(DType dtype);

  // Whether a weight [N, K] can be packed for products of this type, by what is in order of preference: blocked
  // products, or 1 x 1 convolutions of an image of M pixels, which oneDNN has for AVX2 as well. Only those are used,
  // because they give the same bits whatever the number of threads and rows; where there are none, `gemm` below does
  // the work.
  bool packable(DType dtype, int64_t n, int64_t k);
  // Floats that a packed weight takes.
  int64_t packed_size(ProductShape::Form form, DType dtype, int64_t n, int64_t k);
  // A weight [N, K] into the layout for a form, and back.
  void pack(ProductShape::Form form, const Tensor& weight, const Tensor& packed);
  void unpack(ProductShape::Form form, const Tensor& packed, const Tensor& weight);
  // Whether it takes little time to make the layout for the backward from that of the forward.
  bool turns_fast(DType dtype, int64_t n, int64_t k);
  void turn(DType dtype, int64_t n, int64_t k, const Tensor& packed_forward, const Tensor& packed_backward);

  // c = a * b with b packed. False where oneDNN has no product for this shape; nothing is done then.
  bool run(const ProductShape& shape, const void* a, const void* b, const void* bias, void* c);

  // c[m, n] = op(a) * op(b) + beta * c, all f32 and row-major; in tiles of fixed size, so that the result does not
  // depend on the number of threads.
  void gemm(bool transpose_a, bool transpose_b, int64_t m, int64_t n, int64_t k, const float* a,
            const float* b, float beta, float* c);

 private:
  struct Primitive {
    dnnl::primitive primitive;
    dnnl::memory::desc a, b, bias, c, scratch;
    bool fast = false;
  };
  Primitive make(const ProductShape& shape);
  void make_matmul(const ProductShape& shape, const dnnl::primitive_attr& attributes, Primitive& made);
  void make_convolution(const ProductShape& shape, const dnnl::primitive_attr& attributes, Primitive& made);
  // What a packed weight is laid out as; of no dimensions where it cannot be packed. Found once a shape.
  dnnl::memory::desc packed_layout(ProductShape::Form form, DType dtype, int64_t n, int64_t k);
  dnnl::memory::desc find_layout(ProductShape::Form form, DType dtype, int64_t n, int64_t k);
  // The same as a layout of the weight [N, K] itself, whatever the form.
  dnnl::memory::desc layout_of_weight(ProductShape::Form form, DType dtype, int64_t n, int64_t k);
  void reorder(const dnnl::memory::desc& from, const void* source, const dnnl::memory::desc& to,
               void* destination);

  CpuBackend& backend_;
  dnnl::engine engine_{dnnl::engine::kind::cpu, 0};
  dnnl::stream stream_{engine_};
  std::mutex mutex_;
  std::unordered_map<ProductShape, Primitive, ProductShapeHash> primitives_;
  std::mutex layouts_mutex_;
  std::unordered_map<ProductShape, dnnl::memory::desc, ProductShapeHash> layouts_;  // of no rows
  int fast_[2] = {-1, -1};
};

}  // namespace merf
