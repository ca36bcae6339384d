// Vectorised 2^x. Include after highway.h, once a target.

#if defined(MERF_BACKEND_CPU_EXP_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MERF_BACKEND_CPU_EXP_INL_H_
#undef MERF_BACKEND_CPU_EXP_INL_H_
#else
#define MERF_BACKEND_CPU_EXP_INL_H_
#endif

HWY_BEFORE_NAMESPACE();
namespace merf {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// 2^x for x <= 127, within 1.1 ulp; 0 below -126; NaN stays NaN. The polynomial is a minimax fit of 2^f on
// [-1/2, 1/2] with relative error 2e-9, rounded once at each step.
// N vectors at a time: each step of one takes as long as that step of several.
template <int N, class D, class V = hn::Vec<D>>
HWY_INLINE void exp2_nonpositive(D d, V (&x)[N]) {
  const hn::RebindToSigned<D> di;
  // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
  const V shifter = hn::Set(d, 0x1.8p23f);
  V shifted[N], f[N], p[N];
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) shifted[i] = hn::Add(x[i], shifter);
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) f[i] = hn::Sub(x[i], hn::Sub(shifted[i], shifter));
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) p[i] = hn::Set(d, 0x1.41fbbcp-13f);
  constexpr float kCoefficients[] = {0x1.5f3e54p-10f, 0x1.3b2d4cp-7f, 0x1.c6aee8p-5f,
                                     0x1.ebfbdcp-3f,  0x1.62e430p-1f, 1.0f};
#pragma GCC unroll 8
  for (int c = 0; c < 6; ++c) {
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) p[i] = hn::MulAdd(p[i], f[i], hn::Set(d, kCoefficients[c]));
  }
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {
    const V scaled =
        hn::BitCast(d, hn::Add(hn::BitCast(di, p[i]), hn::ShiftLeft<23>(hn::BitCast(di, shifted[i]))));
    x[i] = hn::IfThenZeroElse(hn::Lt(x[i], hn::Set(d, -126.0f)), scaled);
  }
}

template <class D, class V = hn::Vec<D>>
HWY_INLINE V exp2_nonpositive(D d, V x) {
  V one[1] = {x};
  exp2_nonpositive(d, one);
  return one[0];
}

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace merf
HWY_AFTER_NAMESPACE();

#endif
