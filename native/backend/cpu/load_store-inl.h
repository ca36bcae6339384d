// Vectors of float32 from and to f32 and bf16 storage. Include after highway.h, once a target.

#if defined(MERF_BACKEND_CPU_LOAD_STORE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MERF_BACKEND_CPU_LOAD_STORE_INL_H_
#undef MERF_BACKEND_CPU_LOAD_STORE_INL_H_
#else
#define MERF_BACKEND_CPU_LOAD_STORE_INL_H_
#endif

#include <cstring>
#include <type_traits>

#include "backend/halves.h"

HWY_BEFORE_NAMESPACE();
namespace merf {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using F32 = hn::ScalableTag<float>;
using VF32 = hn::Vec<F32>;

HWY_INLINE VF32 load(F32 d, const float* p) { return hn::LoadU(d, p); }
HWY_INLINE VF32 load(F32 d, const bf16* p) {
  const hn::RebindToUnsigned<F32> du32;
  const hn::Rebind<uint16_t, F32> du16;
  const auto half = hn::LoadU(du16, reinterpret_cast<const uint16_t*>(p));
  return hn::BitCast(d, hn::ShiftLeft<16>(hn::PromoteTo(du32, half)));
}

HWY_INLINE void store(F32 d, VF32 v, float* p) { hn::StoreU(v, d, p); }
// Rounds to the nearest, ties to even, as to_bf16 does.
HWY_INLINE void store(F32, VF32 v, bf16* p) {
  const hn::RebindToUnsigned<F32> du32;
  const hn::RebindToSigned<F32> di32;
  const hn::Rebind<uint16_t, F32> du16;
  const auto bits = hn::BitCast(du32, v);
  const auto odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(du32, 1u));
  const auto rounded = hn::ShiftRight<16>(hn::Add(hn::Add(bits, hn::Set(du32, 0x7fffu)), odd));
  const auto nan = hn::Or(hn::ShiftRight<16>(bits), hn::Set(du32, 0x40u));
  const auto upper = hn::IfThenElse(hn::RebindMask(du32, hn::IsNaN(v)), nan, rounded);
  hn::StoreU(hn::DemoteTo(du16, hn::BitCast(di32, upper)), du16, reinterpret_cast<uint16_t*>(p));
}

// The lower half of a master (halves.h): read as the number whose lower bits they are, and that of what is stored.
HWY_INLINE VF32 load(F32 d, const LowerHalf* p) {
  const hn::RebindToUnsigned<F32> du32;
  const hn::Rebind<uint16_t, F32> du16;
  return hn::BitCast(d, hn::PromoteTo(du32, hn::LoadU(du16, reinterpret_cast<const uint16_t*>(p))));
}
HWY_INLINE void store(F32, VF32 v, LowerHalf* p) {
  const hn::RebindToUnsigned<F32> du32;
  const hn::RebindToSigned<F32> di32;
  const hn::Rebind<uint16_t, F32> du16;
  const auto bits = hn::BitCast(du32, v);
  const auto lower = hn::And(bits, hn::Set(du32, 0xffffu));
  const auto odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(du32, 1u));
  const auto kept = hn::IfThenElse(hn::Eq(lower, hn::Set(du32, kBetween)), hn::Or(lower, odd), lower);
  hn::StoreU(hn::DemoteTo(du16, hn::BitCast(di32, kept)), du16, reinterpret_cast<uint16_t*>(p));
}
HWY_INLINE VF32 join_halves(F32 d, VF32 weight, VF32 lower) {
  const hn::RebindToUnsigned<F32> du32;
  const hn::RebindToSigned<F32> di32;
  const auto rounded_up = hn::Gt(hn::BitCast(di32, lower), hn::Set(di32, static_cast<int32_t>(kBetween)));
  const auto carry = hn::IfThenElseZero(hn::RebindMask(du32, rounded_up), hn::Set(du32, 0x10000u));
  return hn::BitCast(d, hn::Sub(hn::Add(hn::BitCast(du32, weight), hn::BitCast(du32, lower)), carry));
}

// The first n lanes; the rest read as 0.
template <typename T>
HWY_INLINE VF32 load_n(F32 d, const T* p, size_t n) {
  T lanes[HWY_MAX_BYTES / sizeof(float)] = {};
  std::memcpy(lanes, p, n * sizeof(T));
  return load(d, lanes);
}
template <typename T>
HWY_INLINE void store_n(F32 d, VF32 v, T* p, size_t n) {
  T lanes[HWY_MAX_BYTES / sizeof(float)];
  store(d, v, lanes);
  std::memcpy(p, lanes, n * sizeof(T));
}

// Calls body(index, lanes, whole) over [0, n), vector by vector; `whole` is std::true_type except for the rest, of
// `lanes` elements.
template <class Body>
HWY_INLINE void for_vectors(F32 d, size_t n, Body&& body) {
  const size_t lanes = hn::Lanes(d);
  size_t i = 0;
  for (; i + lanes <= n; i += lanes) body(i, lanes, std::true_type());
  if (i < n) body(i, n - i, std::false_type());
}
template <typename T, class Whole>
HWY_INLINE VF32 load_part(F32 d, const T* p, size_t n, Whole) {
  if constexpr (Whole::value) {
    return load(d, p);
  } else {
    return load_n(d, p, n);
  }
}
template <typename T, class Whole>
HWY_INLINE void store_part(F32 d, VF32 v, T* p, size_t n, Whole) {
  if constexpr (Whole::value) {
    store(d, v, p);
  } else {
    store_n(d, v, p, n);
  }
}

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace merf
HWY_AFTER_NAMESPACE();

#endif
