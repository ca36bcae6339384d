// SwiGLU: y = silu(gate) * up, with gate and up side by side in one row of the fused projection.
#include "backend/cpu/simd_targets.h"

#include <cmath>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "backend/cpu/swiglu.cc"
#include "backend/cpu/cpu_backend.h"
#include "backend/cpu/parallel.h"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "hwy/highway.h"

// These come after highway.h, which they read.
#include "backend/cpu/exp-inl.h"
#include "backend/cpu/load_store-inl.h"

HWY_BEFORE_NAMESPACE();
namespace merf {
namespace HWY_NAMESPACE {

// Vectors that are computed together, so that none waits for its own steps alone.
#if HWY_TARGET == HWY_AVX3
constexpr int kTogether = 4;
#else
constexpr int kTogether = 1;
#endif

// Calls body(index, lanes, whole, count) over [0, n), `count` vectors at a time: kTogether, and 1 for the rest.
template <class Body>
HWY_INLINE void for_vectors_together(F32 d, size_t n, Body&& body) {
  const size_t lanes = hn::Lanes(d);
  size_t begin = 0;
  for (; begin + kTogether * lanes <= n; begin += kTogether * lanes) {
    body(begin, lanes, std::true_type(), std::integral_constant<int, kTogether>());
  }
  for_vectors(d, n - begin, [&](size_t i, size_t count, auto whole) {
    body(begin + i, count, whole, std::integral_constant<int, 1>());
  });
}

// The sigmoid is computed from exp(-|x|), which cannot overflow.
template <int N>
HWY_INLINE void sigmoid(F32 d, const VF32 (&x)[N], VF32 (&y)[N]) {
  const VF32 one = hn::Set(d, 1.0f);
#pragma GCC unroll 8
  for (int j = 0; j < N; ++j) y[j] = hn::Mul(hn::Neg(hn::Abs(x[j])), hn::Set(d, 1.44269504f));
  exp2_nonpositive(d, y);
#pragma GCC unroll 8
  for (int j = 0; j < N; ++j) {
    const VF32 upper = hn::Div(one, hn::Add(one, y[j]));
    y[j] = hn::IfThenElse(hn::Lt(x[j], hn::Zero(d)), hn::Mul(y[j], upper), upper);
  }
}

// N vectors of the gate from `gate` on, and their sigmoids.
template <int N, typename T, class Whole>
HWY_INLINE void load_gates(F32 d, const T* gate, size_t n, Whole whole, VF32 (&g)[N], VF32 (&s)[N]) {
#pragma GCC unroll 8
  for (int j = 0; j < N; ++j) g[j] = load_part(d, gate + j * n, n, whole);
  sigmoid(d, g, s);
}

template <typename T>
void swiglu_rows(int64_t begin, int64_t end, int64_t size, const T* gate_up, T* y) {
  const F32 d;
  for (int64_t t = begin; t < end; ++t) {
    const T* gate = gate_up + t * 2 * size;
    for_vectors_together(d, size, [&](size_t i, size_t n, auto whole, auto count) {
      constexpr int kCount = decltype(count)::value;
      VF32 g[kCount], s[kCount];
      load_gates(d, gate + i, n, whole, g, s);
#pragma GCC unroll 8
      for (int j = 0; j < kCount; ++j) {
        const VF32 u = load_part(d, gate + size + i + j * n, n, whole);
        store_part(d, hn::Mul(hn::Mul(g[j], s[j]), u), y + t * size + i + j * n, n, whole);
      }
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
    for_vectors_together(d, size, [&](size_t i, size_t n, auto whole, auto count) {
      constexpr int kCount = decltype(count)::value;
      VF32 g[kCount], s[kCount];
      load_gates(d, gate + i, n, whole, g, s);
#pragma GCC unroll 8
      for (int j = 0; j < kCount; ++j) {
        const size_t at = i + j * n;
        const VF32 u = load_part(d, gate + size + at, n, whole);
        const VF32 v = load_part(d, dy + t * size + at, n, whole);
        // silu'(g) = s * (1 + g * (1 - s))
        const VF32 slope = hn::Mul(s[j], hn::MulAdd(g[j], hn::Sub(one, s[j]), one));
        store_part(d, hn::Mul(hn::Mul(v, u), slope), dgate + at, n, whole);
        store_part(d, hn::Mul(v, hn::Mul(g[j], s[j])), dgate + size + at, n, whole);
      }
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
