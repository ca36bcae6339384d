// SwiGLU: y = silu(gate) * up, with gate and up side by side in one row of the fused projection.
#include "backend/cpu/simd_targets.h"

#include <cmath>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "backend/cpu/swiglu.cc"
#include "backend/cpu/cpu_backend.h"
#include "backend/cpu/parallel.h"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "hwy/highway.h"

// After highway.h.
#include "backend/cpu/exp-inl.h"
#include "backend/cpu/load_store-inl.h"

HWY_BEFORE_NAMESPACE();
namespace merf {
namespace HWY_NAMESPACE {

// From exp(-|x|), which cannot overflow.
HWY_INLINE VF32 sigmoid(F32 d, VF32 x) {
  const VF32 one = hn::Set(d, 1.0f);
  const VF32 e = exp2_nonpositive(d, hn::Mul(hn::Neg(hn::Abs(x)), hn::Set(d, 1.44269504f)));
  const VF32 upper = hn::Div(one, hn::Add(one, e));
  return hn::IfThenElse(hn::Lt(x, hn::Zero(d)), hn::Mul(e, upper), upper);
}

template <typename T>
void swiglu_rows(int64_t begin, int64_t end, int64_t size, const T* gate_up, T* y) {
  const F32 d;
  for (int64_t t = begin; t < end; ++t) {
    const T* gate = gate_up + t * 2 * size;
    for_vectors(d, size, [&](size_t i, size_t n, auto whole) {
      const VF32 g = load_part(d, gate + i, n, whole);
      const VF32 u = load_part(d, gate + size + i, n, whole);
      store_part(d, hn::Mul(hn::Mul(g, sigmoid(d, g)), u), y + t * size + i, n, whole);
    });
  }
}

template <typename T>
void swiglu_backward_rows(int64_t begin, int64_t end, int64_t size, const T* dy, const T* gate_up,
                          T* dgate_up) {
  const F32 d;
  const VF32 one = hn::Set(d, 1.0f);
  for (int64_t t = begin; t < end; ++t) {
    const T* gate = gate_up + t * 2 * size;
    T* dgate = dgate_up + t * 2 * size;
    for_vectors(d, size, [&](size_t i, size_t n, auto whole) {
      const VF32 g = load_part(d, gate + i, n, whole);
      const VF32 u = load_part(d, gate + size + i, n, whole);
      const VF32 v = load_part(d, dy + t * size + i, n, whole);
      const VF32 s = sigmoid(d, g);
      // silu'(g) = s * (1 + g * (1 - s))
      const VF32 slope = hn::Mul(s, hn::MulAdd(g, hn::Sub(one, s), one));
      store_part(d, hn::Mul(hn::Mul(v, u), slope), dgate + i, n, whole);
      store_part(d, hn::Mul(v, hn::Mul(g, s)), dgate + size + i, n, whole);
    });
  }
}

void swiglu(int threads, const Tensor& gate_up, const Tensor& y) {
  const int64_t size = y.row_size();
  parallel_for(threads, y.shape[0], rows_of_elements(size, 2048), [&](int64_t begin, int64_t end) {
    if (y.dtype == DType::bf16) {
      swiglu_rows(begin, end, size, gate_up.as<const bf16>(), y.as<bf16>());
    } else {
      swiglu_rows(begin, end, size, gate_up.as<const float>(), y.as<float>());
    }
  });
}

void swiglu_backward(int threads, const Tensor& dy, const Tensor& gate_up, const Tensor& dgate_up) {
  const int64_t size = dy.row_size();
  parallel_for(threads, dy.shape[0], rows_of_elements(size, 2048), [&](int64_t begin, int64_t end) {
    if (dy.dtype == DType::bf16) {
      swiglu_backward_rows(begin, end, size, dy.as<const bf16>(), gate_up.as<const bf16>(),
                           dgate_up.as<bf16>());
    } else {
      swiglu_backward_rows(begin, end, size, dy.as<const float>(), gate_up.as<const float>(),
                           dgate_up.as<float>());
    }
  });
}

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace merf
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace merf {

HWY_EXPORT(swiglu);
HWY_EXPORT(swiglu_backward);

void CpuBackend::swiglu(const Tensor& gate_up, const Tensor& y) {
  HWY_DYNAMIC_DISPATCH(swiglu)(num_threads(), gate_up, y);
}

void CpuBackend::swiglu_backward(const Tensor& dy, const Tensor& gate_up, const Tensor& dgate_up) {
  HWY_DYNAMIC_DISPATCH(swiglu_backward)(num_threads(), dy, gate_up, dgate_up);
}

}  // namespace merf
#endif  // HWY_ONCE
