// Rotary position embedding (Su et al. 2021), in place. Angles are float32 products as in Hugging Face's models; their
// cosines and sines are computed in float64 vectors, which costs less than looking them up.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "backend/cpu/rope.cc"
#include "backend/cpu/simd_targets.h"
// The targets are chosen above.
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include <vector>

#include "backend/cpu/cpu_backend.h"
#include "backend/cpu/load_store-inl.h"
#include "backend/cpu/parallel.h"

HWY_BEFORE_NAMESPACE();
namespace merf {
namespace HWY_NAMESPACE {

using F64 = hn::ScalableTag<double>;
using VF64 = hn::Vec<F64>;

// Sine and cosine within 1e-11 for |x| < 1e6. x is reduced to [-pi/4, pi/4], by a product exact enough there,
// for a Taylor series.
HWY_INLINE void sine_cosine(F64 d, VF64 x, VF64& sine, VF64& cosine) {
  const VF64 turns = hn::Round(hn::Mul(x, hn::Set(d, 0.63661977236758134308)));
  VF64 r = hn::NegMulAdd(turns, hn::Set(d, 1.57079632679489655800), x);
  r = hn::NegMulAdd(turns, hn::Set(d, 6.12323399573676603587e-17), r);
  const VF64 r2 = hn::Mul(r, r);

  VF64 s = hn::Set(d, 1.0 / 6227020800.0);
  s = hn::MulAdd(s, r2, hn::Set(d, -1.0 / 39916800.0));
  s = hn::MulAdd(s, r2, hn::Set(d, 1.0 / 362880.0));
  s = hn::MulAdd(s, r2, hn::Set(d, -1.0 / 5040.0));
  s = hn::MulAdd(s, r2, hn::Set(d, 1.0 / 120.0));
  s = hn::MulAdd(s, r2, hn::Set(d, -1.0 / 6.0));
  s = hn::MulAdd(hn::Mul(s, r2), r, r);
  VF64 c = hn::Set(d, 1.0 / 479001600.0);
  c = hn::MulAdd(c, r2, hn::Set(d, -1.0 / 3628800.0));
  c = hn::MulAdd(c, r2, hn::Set(d, 1.0 / 40320.0));
  c = hn::MulAdd(c, r2, hn::Set(d, -1.0 / 720.0));
  c = hn::MulAdd(c, r2, hn::Set(d, 1.0 / 24.0));
  c = hn::MulAdd(c, r2, hn::Set(d, -0.5));
  c = hn::MulAdd(c, r2, hn::Set(d, 1.0));

  // Quarter turns: 0 (s, c), 1 (c, -s), 2 (-s, -c), 3 (-c, s).
  const VF64 quarter = hn::NegMulAdd(hn::Floor(hn::Mul(turns, hn::Set(d, 0.25))), hn::Set(d, 4.0), turns);
  const VF64 one = hn::Set(d, 1.0), two = hn::Set(d, 2.0);
  const auto odd = hn::Or(hn::Eq(quarter, one), hn::Eq(quarter, hn::Set(d, 3.0)));
  const auto sine_negative = hn::Ge(quarter, two);
  const auto cosine_negative = hn::Or(hn::Eq(quarter, one), hn::Eq(quarter, two));
  sine = hn::IfThenElse(odd, c, s);
  cosine = hn::IfThenElse(odd, s, c);
  sine = hn::IfThenElse(sine_negative, hn::Neg(sine), sine);
  cosine = hn::IfThenElse(cosine_negative, hn::Neg(cosine), cosine);
}

// cosines and sines [half] of position * frequency, times scale; all arrays have a vector's room behind them.
HWY_INLINE void rotation(int32_t position, const float* frequencies, int64_t half, double scale, bool inverse,
                         float* cosines, float* sines) {
  const F64 d;
  const hn::Rebind<float, F64> d32;
  const auto p = hn::Set(d32, static_cast<float>(position));
  const VF64 cosine_scale = hn::Set(d, scale), sine_scale = hn::Set(d, inverse ? -scale : scale);
  for (int64_t i = 0; i < half; i += static_cast<int64_t>(hn::Lanes(d))) {
    VF64 sine, cosine;
    sine_cosine(d, hn::PromoteTo(d, hn::Mul(p, hn::LoadU(d32, frequencies + i))), sine, cosine);
    hn::StoreU(hn::DemoteTo(d32, hn::Mul(cosine, cosine_scale)), d32, cosines + i);
    hn::StoreU(hn::DemoteTo(d32, hn::Mul(sine, sine_scale)), d32, sines + i);
  }
}

template <typename T>
HWY_INLINE void rotate_head(T* head, int64_t half, const float* cosines, const float* sines) {
  const F32 d;
  for_vectors(d, static_cast<size_t>(half), [&](size_t i, size_t lanes, auto whole) HWY_ATTR {
    const VF32 first = load_part(d, head + i, lanes, whole),
               second = load_part(d, head + half + i, lanes, whole);
    const VF32 c = hn::LoadU(d, cosines + i), s = hn::LoadU(d, sines + i);
    store_part(d, hn::NegMulAdd(second, s, hn::Mul(first, c)), head + i, lanes, whole);
    store_part(d, hn::MulAdd(first, s, hn::Mul(second, c)), head + half + i, lanes, whole);
  });
}

void rotate(int threads, const HeadsView& x, const int32_t* positions, const float* inverse_frequencies,
            bool inverse, float scale) {
  const int64_t half = x.head_size / 2;
  const size_t room = static_cast<size_t>(half) + hn::Lanes(F32());
  std::vector<float> frequencies(room, 0.0f);
  std::copy(inverse_frequencies, inverse_frequencies + half, frequencies.begin());
  parallel_for(threads, x.tokens, 16, [&](int64_t begin, int64_t end) HWY_ATTR {
    std::vector<float> cosines(room), sines(room);
    for (int64_t t = begin; t < end; ++t) {
      if (t == begin || positions[t] != positions[t - 1]) {
        rotation(positions[t], frequencies.data(), half, scale, inverse, cosines.data(), sines.data());
      }
      for (int64_t h = 0; h < x.heads; ++h) {
        const int64_t at = t * x.row_stride + h * x.head_size;
        if (x.dtype == DType::bf16) {
          rotate_head(static_cast<bf16*>(x.data) + at, half, cosines.data(), sines.data());
        } else {
          rotate_head(static_cast<float*>(x.data) + at, half, cosines.data(), sines.data());
        }
      }
    }
  });
}

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace merf
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace merf {
namespace {
HWY_EXPORT(rotate);
}  // namespace

void CpuBackend::rope(const HeadsView& x, const Tensor& positions, const Tensor& inverse_frequencies,
                      bool inverse, float attention_scale) {
  HWY_DYNAMIC_DISPATCH(rotate)
  (num_threads(), x, positions.as<int32_t>(), inverse_frequencies.as<float>(), inverse, attention_scale);
}

}  // namespace merf
#endif
