// RMSNorm. A row is read twice, and is in the first-level cache when its norm is known.
#include "backend/cpu/simd_targets.h"

#include <algorithm>
#include <cmath>
#include <type_traits>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "backend/cpu/norm.cc"
#include "backend/cpu/cpu_backend.h"
#include "backend/cpu/parallel.h"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "hwy/highway.h"

// After highway.h.
#include "backend/cpu/load_store-inl.h"

HWY_BEFORE_NAMESPACE();
namespace merf {
namespace HWY_NAMESPACE {

template <typename X, typename Y>
void norm_rows(int64_t begin, int64_t end, int64_t size, const X* x, const float* weight, float epsilon, Y* y,
               float* rstd) {
  const F32 d;
  for (int64_t t = begin; t < end; ++t) {
    const X* xt = x + t * size;
    VF32 squares = hn::Zero(d);
    for_vectors(d, size, [&](size_t i, size_t n, auto whole) {
      const VF32 v = load_part(d, xt + i, n, whole);
      squares = hn::MulAdd(v, v, squares);
    });
    const float mean = hn::GetLane(hn::SumOfLanes(d, squares)) / static_cast<float>(size);
    const float scale = 1.0f / std::sqrt(mean + epsilon);
    if (rstd) rstd[t] = scale;
    const VF32 vscale = hn::Set(d, scale);
    for_vectors(d, size, [&](size_t i, size_t n, auto whole) {
      const VF32 v = hn::Mul(load_part(d, xt + i, n, whole), vscale);
      store_part(d, hn::Mul(v, load_part(d, weight + i, n, whole)), y + t * size + i, n, whole);
    });
  }
}

// dx += rstd * (g - x * rstd^2 * mean(g * x)) where g = dy * weight.
template <typename X, typename Y>
void norm_backward_rows(int64_t begin, int64_t end, int64_t size, const Y* dy, const X* x,
                        const float* weight, const float* rstd, X* dx) {
  const F32 d;
  for (int64_t t = begin; t < end; ++t) {
    const Y* dyt = dy + t * size;
    const X* xt = x + t * size;
    X* dxt = dx + t * size;
    const VF32 scale = hn::Set(d, rstd[t]);
    VF32 sum = hn::Zero(d);
    for_vectors(d, size, [&](size_t i, size_t n, auto whole) {
      const VF32 g = hn::Mul(load_part(d, dyt + i, n, whole), load_part(d, weight + i, n, whole));
      sum = hn::MulAdd(g, load_part(d, xt + i, n, whole), sum);
    });
    const float mean = hn::GetLane(hn::SumOfLanes(d, sum)) / static_cast<float>(size);
    const VF32 pull = hn::Set(d, mean * rstd[t] * rstd[t]);
    for_vectors(d, size, [&](size_t i, size_t n, auto whole) {
      const VF32 g = hn::Mul(load_part(d, dyt + i, n, whole), load_part(d, weight + i, n, whole));
      const VF32 inner = hn::NegMulAdd(load_part(d, xt + i, n, whole), pull, g);
      store_part(d, hn::MulAdd(inner, scale, load_part(d, dxt + i, n, whole)), dxt + i, n, whole);
    });
  }
}

// dweight += dy * x * rstd in columns [begin, end), row after row: rows whose dy is 0 change no bit of the sum, wherever
// they stand, and neither does the number of threads.
template <typename X, typename Y>
void norm_backward_weight(int64_t begin, int64_t end, int64_t rows, int64_t size, const Y* dy, const X* x,
                          const float* rstd, float* dweight) {
  const F32 d;
  for (int64_t t = 0; t < rows; ++t) {
    const VF32 scale = hn::Set(d, rstd[t]);
    for_vectors(d, end - begin, [&](size_t i, size_t n, auto whole) {
      const VF32 product = hn::Mul(load_part(d, dy + t * size + begin + i, n, whole),
                                   load_part(d, x + t * size + begin + i, n, whole));
      float* dw = dweight + begin + i;
      store_part(d, hn::MulAdd(product, scale, load_part(d, dw, n, whole)), dw, n, whole);
    });
  }
}

void rms_norm(int threads, const Tensor& x, const Tensor& weight, float epsilon, const Tensor& y,
              const Tensor& rstd) {
  const int64_t rows = x.shape[0];
  const int64_t size = x.row_size();
  const auto run = [&](auto* px, auto* py) {
    parallel_for(threads, rows, rows_of_elements(size, 4096), [&](int64_t begin, int64_t end) {
      norm_rows(begin, end, size, px, weight.as<const float>(), epsilon, py, rstd.as<float>());
    });
  };
  const auto run_x = [&](auto* px) {
    if (y.dtype == DType::bf16) {
      run(px, y.as<bf16>());
    } else {
      run(px, y.as<float>());
    }
  };
  if (x.dtype == DType::bf16) {
    run_x(x.as<const bf16>());
  } else {
    run_x(x.as<const float>());
  }
}

void rms_norm_backward(int threads, const Tensor& dy, const Tensor& x, const Tensor& weight,
                       const Tensor& rstd, const Tensor& dx, const Tensor& dweight) {
  const int64_t rows = x.shape[0];
  const int64_t size = x.row_size();
  const float* prstd = rstd.as<const float>();
  const auto run = [&](auto* px, auto* pdy) {
    using X = std::remove_pointer_t<decltype(px)>;
    parallel_for(threads, rows, rows_of_elements(size, 4096), [&](int64_t begin, int64_t end) {
      norm_backward_rows(begin, end, size, pdy, px, weight.as<const float>(), prstd, dx.as<X>());
    });
    if (!dweight) return;
    parallel_for(threads, size, 64, [&](int64_t begin, int64_t end) {
      norm_backward_weight(begin, end, rows, size, pdy, px, prstd, dweight.as<float>());
    });
  };
  const auto run_x = [&](auto* px) {
    if (dy.dtype == DType::bf16) {
      run(px, dy.as<const bf16>());
    } else {
      run(px, dy.as<const float>());
    }
  };
  if (x.dtype == DType::bf16) {
    run_x(x.as<bf16>());
  } else {
    run_x(x.as<float>());
  }
}

void add(int threads, const Tensor& y, const Tensor& x) {
  const F32 d;
  const auto run = [&](auto* py, const auto* px) {
    parallel_for(threads, y.size(), 1 << 13, [&](int64_t begin, int64_t end) {
      for_vectors(d, end - begin, [&](size_t i, size_t n, auto whole) {
        const VF32 sum =
            hn::Add(load_part(d, py + begin + i, n, whole), load_part(d, px + begin + i, n, whole));
        store_part(d, sum, py + begin + i, n, whole);
      });
    });
  };
  const auto run_y = [&](auto* py) {
    if (x.dtype == DType::bf16) {
      run(py, x.as<const bf16>());
    } else {
      run(py, x.as<const float>());
    }
  };
  if (y.dtype == DType::bf16) {
    run_y(y.as<bf16>());
  } else {
    run_y(y.as<float>());
  }
}

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace merf
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace merf {

HWY_EXPORT(rms_norm);
HWY_EXPORT(rms_norm_backward);
HWY_EXPORT(add);

void CpuBackend::rms_norm(const Tensor& x, const Tensor& weight, float epsilon, const Tensor& y,
                          const Tensor& rstd) {
  HWY_DYNAMIC_DISPATCH(rms_norm)(num_threads(), x, weight, epsilon, y, rstd);
}

void CpuBackend::rms_norm_backward(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                   const Tensor& rstd, const Tensor& dx, const Tensor& dweight) {
  HWY_DYNAMIC_DISPATCH(rms_norm_backward)(num_threads(), dy, x, weight, rstd, dx, dweight);
}

void CpuBackend::add(const Tensor& y, const Tensor& x) { HWY_DYNAMIC_DISPATCH(add)(num_threads(), y, x); }

}  // namespace merf
#endif  // HWY_ONCE
