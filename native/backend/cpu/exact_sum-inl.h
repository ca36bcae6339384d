// Softmax weights whose sums are exact, so that they are the same in every order. Include after highway.h, once a
// target.
//
// Weights are in [0, 1] and are rounded to multiples of 2^-34. Sums of up to 2^19 of them are exact in float64.

#if defined(MERF_BACKEND_CPU_EXACT_SUM_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MERF_BACKEND_CPU_EXACT_SUM_INL_H_
#undef MERF_BACKEND_CPU_EXACT_SUM_INL_H_
#else
#define MERF_BACKEND_CPU_EXACT_SUM_INL_H_
#endif

#include <cstdint>

#include "backend/cpu/exp-inl.h"

HWY_BEFORE_NAMESPACE();
namespace merf {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using WeightTag = hn::ScalableTag<float>;
using WeightVec = hn::Vec<WeightTag>;
using WideTag = hn::ScalableTag<double>;
using WideVec = hn::Vec<WideTag>;
constexpr int64_t kWideLanes = static_cast<int64_t>(hn::MaxLanes(WideTag()));

// 2^x rounded to a multiple of 2^-34, for x <= 0: larger than 2^-11 it is one already, and below that adding 2^-11
// rounds to one.
template <int N>
HWY_INLINE void exact_weights(WeightVec (&x)[N]) {
  const WeightTag d;
  const WeightVec grid = hn::Set(d, 0x1p-11f);
  exp2_nonpositive(d, x);
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {
    x[i] = hn::IfThenElse(hn::Lt(x[i], grid), hn::Sub(hn::Add(x[i], grid), grid), x[i]);
  }
}
HWY_INLINE WeightVec exact_weight(WeightVec x) {
  WeightVec one[1] = {x};
  exact_weights(one);
  return one[0];
}

HWY_INLINE WideVec add_wide(WideVec sum, WeightVec x) {
  const hn::Half<WeightTag> half;
  const WideTag wide;
  sum = hn::Add(sum, hn::PromoteTo(wide, hn::LowerHalf(half, x)));
  return hn::Add(sum, hn::PromoteTo(wide, hn::UpperHalf(half, x)));
}

HWY_INLINE double sum_of_lanes(WideVec x) {
  const WideTag wide;
  return hn::GetLane(hn::SumOfLanes(wide, x));
}

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace merf
HWY_AFTER_NAMESPACE();

#endif
