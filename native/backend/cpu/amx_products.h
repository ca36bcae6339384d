// Products of bfloat16 by oneDNN, for processors whose tiles of it (AMX) libxsmm does not know.
#pragma once

#include <dnnl.hpp>

#include <cstdint>
#include <mutex>
#include <string>
#include <unordered_map>

#include "backend/tensor.h"

namespace merf {

class CpuBackend;

class AmxProducts {
 public:
  // A weight [N, K] in oneDNN's layouts for either product.
  struct Packed {
    bool wanted = false;        // this, and not panels
    bool for_backward = false;  // the second of them as well
    Tensor forward, backward;
  };

  explicit AmxProducts(CpuBackend& backend) : backend_(backend) {}

  // Whether this processor has AMX.
  static bool wanted();
  static std::string version();  // of oneDNN
  // Whether oneDNN has its blocked products of bfloat16 here, which are those that this class uses: from AVX512_BF16 on.
  bool available();

  // weight [N, K] bf16.
  void pack(const Tensor& weight, Packed& packed);
  void unpack(const Packed& packed, const Tensor& weight);
  // The operators of these names in backend.h; x, dy bf16 [M, ...], y, dx f32|bf16, dw f32.
  void linear(const Tensor& x, const Packed& packed, int64_t n, int64_t k, const Tensor& bias,
              const Tensor& y, bool accumulate);
  void linear_backward_input(const Tensor& dy, const Packed& packed, int64_t n, int64_t k, const Tensor& dx,
                             bool accumulate);
  void linear_backward_weight(const Tensor& dy, const Tensor& x, const Tensor& dw);

 private:
  // c[m, n] = a[m, k] * b[k, n] (+ bias[n]) (+ c).
  struct Shape {
    bool outer = false;  // a is stored [k, m] and b [k, n]; else b is packed
    DType out = DType::f32;
    bool bias = false;
    bool accumulate = false;
    int64_t m = 0;
    int64_t n = 0;
    int64_t k = 0;

    bool operator==(const Shape&) const = default;
  };
  struct ShapeHash {
    size_t operator()(const Shape& shape) const;
  };
  struct Primitive {
    dnnl::matmul::primitive_desc description;
    dnnl::primitive primitive;
  };

  dnnl::matmul::primitive_desc describe(const Shape& shape);
  // The layout of a packed b[k, n], whatever the rows.
  dnnl::memory::desc packed_layout(int64_t k, int64_t n);
  void reorder(const dnnl::memory::desc& from, const void* source, const dnnl::memory::desc& to,
               void* destination);
  void multiply_rows(const Tensor& a, const Tensor& packed, int64_t n, int64_t k, const Tensor& bias,
                     const Tensor& c, bool accumulate);
  void run(const Shape& shape, const void* a, const void* b, const void* bias, void* c);

  CpuBackend& backend_;
  dnnl::engine engine_{dnnl::engine::kind::cpu, 0};
  dnnl::stream stream_{engine_};
  std::mutex mutex_;
  std::unordered_map<Shape, Primitive, ShapeHash> primitives_;
};

}  // namespace merf
