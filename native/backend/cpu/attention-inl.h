// What the attention operators share: register-blocked products of small tiles, packing, softmax weights. Include
// after highway.h, once a target.
//
// Products take float32 operands, or pairs of bfloat16 where the processor multiplies and adds those (VDPBF16PS) and
// the operands are stored as bfloat16. Then softmax weights and gradients of scores are rounded to bfloat16, too.
//
// A row's result depends on its query and on the keys that it sees, in their order, and on nothing else: not on how
// they are cut into blocks or pages, nor on the rows beside it. That is what gives a token the same bits when it is
// drawn and when it is scored:
//   - a score is one sum over the head's elements in their order;
//   - weights are taken relative to the greatest score of all keys, rather than of those so far;
//   - the sum of weights is exact (exact_sum-inl.h);
//   - an output is one sum over the keys in their order, where what is masked has weight 0 and changes no bit; how
//     keys are paired does not matter, because a pair's two products are added one after the other, each sum rounded.

#if defined(MERF_BACKEND_CPU_ATTENTION_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MERF_BACKEND_CPU_ATTENTION_INL_H_
#undef MERF_BACKEND_CPU_ATTENTION_INL_H_
#else
#define MERF_BACKEND_CPU_ATTENTION_INL_H_
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "backend/bf16.h"
#include "backend/cpu/exact_sum-inl.h"

HWY_BEFORE_NAMESPACE();
namespace merf {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using FloatTag = hn::ScalableTag<float>;
using FloatVec = hn::Vec<FloatTag>;
constexpr FloatTag kFloatTag;
constexpr int64_t kLanes = static_cast<int64_t>(hn::MaxLanes(FloatTag()));

// Two bfloat16 as an operand of one product. The upper half is added first.
using Pair = uint32_t;
// Elements of the storage type in one operand.
template <typename Operand>
constexpr int64_t kPerOperand = std::is_same_v<Operand, Pair> ? 2 : 1;
// Whether operands may be pairs on this target, and whether this processor has the instruction.
constexpr bool kPairsTarget = HWY_TARGET == HWY_AVX3;
HWY_INLINE bool multiplies_pairs() {
#if HWY_ARCH_X86
  return kPairsTarget && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

// Calls body with an operand of the type that rows stored as T are multiplied in.
template <typename T, class Body>
HWY_INLINE void with_operand(Body&& body) {
  if constexpr (kPairsTarget && std::is_same_v<T, bf16>) {
    if (multiplies_pairs()) return body(Pair());
  }
  body(float());
}

// A tile of kTileRows x kTileVectors accumulators fills the registers and leaves room for the operands.
constexpr int kTileRows = 6;
#if HWY_TARGET == HWY_AVX3 || HWY_ARCH_ARM
constexpr int kTileVectors = 4;
#else
constexpr int kTileVectors = 2;
#endif

// Vectors of one row whose weights are computed together.
constexpr int kSoftmaxVectors = kTileVectors;

// Fewer rows take more vectors at a time, lest their sums wait for each other.
template <int R>
constexpr int kVectorsBeside = R == 1   ? 8
                               : R <= 3 ? 4
                                        : kTileVectors;

constexpr int64_t kKeyBlock = 64;  // keys in a packed block, a multiple of kTileVectors * kLanes
static_assert(kKeyBlock % (kTileVectors * kLanes) == 0);
constexpr float kLog2e = 1.44269504088896340736f;
constexpr float kLn2 = 0.69314718055994530942f;
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

HWY_INLINE int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// ---- products of tiles

HWY_INLINE FloatVec multiply_add(FloatVec left, FloatVec right, FloatVec sum) {
  return hn::MulAdd(left, right, sum);
}
#if HWY_TARGET == HWY_AVX3
// Adds the product of the upper halves, rounds, adds that of the lower ones and rounds; subnormal numbers count as 0.
// Highway 1.0.3 does not have it, and its targets do not promise it.
HWY_INLINE FloatVec multiply_add(hn::Vec<hn::ScalableTag<Pair>> left, hn::Vec<hn::ScalableTag<Pair>> right,
                                 FloatVec sum) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum.raw) : "v"(left.raw), "v"(right.raw));
  return sum;
}
#endif

enum class Into { overwrite, overwrite_scaled, add };

// C[R, V vectors] = (0 | C) + A[R, steps] * B[steps, V vectors], the first times `factor` where it is to be scaled.
// Element (r, s) of A is at a[r * a_row + s * a_step]; rows of B and C are b_row and c_row apart. The factor is a
// reference, and C may alias it, lest it takes a register while the sums need them all.
template <int R, int V, Into into, typename Operand>
HWY_INLINE void multiply_tile(const Operand* HWY_RESTRICT a, int64_t a_row, int64_t a_step,
                              const Operand* HWY_RESTRICT b, int64_t b_row, int64_t steps, float* c,
                              int64_t c_row, const float& factor) {
  const hn::ScalableTag<Operand> d;
  FloatVec sum[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      if constexpr (into == Into::add) {
        sum[r][v] = hn::LoadU(kFloatTag, c + r * c_row + v * kLanes);
      } else {
        sum[r][v] = hn::Zero(kFloatTag);
      }
    }
  }
  for (int64_t s = 0; s < steps; ++s) {
    hn::Vec<hn::ScalableTag<Operand>> right[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) right[v] = hn::LoadU(d, b + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const auto left = hn::Set(d, a[r * a_row]);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sum[r][v] = multiply_add(left, right[v], sum[r][v]);
    }
    a += a_step;
    b += b_row;
  }
  FloatVec scale = hn::Zero(kFloatTag);
  if constexpr (into == Into::overwrite_scaled) scale = hn::Set(kFloatTag, factor);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      if constexpr (into == Into::overwrite_scaled) sum[r][v] = hn::Mul(sum[r][v], scale);
      hn::StoreU(sum[r][v], kFloatTag, c + r * c_row + v * kLanes);
    }
  }
}

template <int R, Into into, typename Operand>
HWY_NOINLINE void multiply_strip(const Operand* a, int64_t a_row, int64_t a_step, const Operand* b,
                                 int64_t b_row, int64_t steps, float* c, int64_t c_row, int64_t vectors,
                                 const float& factor) {
  constexpr int kVectors = kVectorsBeside<R>;
  for (; vectors >= kVectors; vectors -= kVectors, b += kVectors * kLanes, c += kVectors * kLanes) {
    multiply_tile<R, kVectors, into>(a, a_row, a_step, b, b_row, steps, c, c_row, factor);
  }
  if constexpr (kVectors > 4) {
    if (vectors >= 4) {
      multiply_tile<R, 4, into>(a, a_row, a_step, b, b_row, steps, c, c_row, factor);
      vectors -= 4;
      b += 4 * kLanes;
      c += 4 * kLanes;
    }
  }
  if constexpr (kVectors > 2) {
    if (vectors == 3) return multiply_tile<R, 3, into>(a, a_row, a_step, b, b_row, steps, c, c_row, factor);
    if (vectors == 2) return multiply_tile<R, 2, into>(a, a_row, a_step, b, b_row, steps, c, c_row, factor);
  }
  if (vectors == 1) multiply_tile<R, 1, into>(a, a_row, a_step, b, b_row, steps, c, c_row, factor);
}

// Multiplies as multiply_tile does, any number of rows and of vectors. An element's sum runs over the steps in their
// order whatever the number of rows.
template <Into into, typename Operand>
HWY_INLINE void multiply(int64_t rows, int64_t vectors, int64_t steps, const Operand* a, int64_t a_row,
                         int64_t a_step, const Operand* b, int64_t b_row, float* c, int64_t c_row,
                         const float& factor = 1.0f) {
  for (; rows >= kTileRows; rows -= kTileRows) {
    multiply_strip<kTileRows, into>(a, a_row, a_step, b, b_row, steps, c, c_row, vectors, factor);
    a += kTileRows * a_row;
    c += kTileRows * c_row;
  }
  switch (rows) {
    case 5:
      return multiply_strip<5, into>(a, a_row, a_step, b, b_row, steps, c, c_row, vectors, factor);
    case 4:
      return multiply_strip<4, into>(a, a_row, a_step, b, b_row, steps, c, c_row, vectors, factor);
    case 3:
      return multiply_strip<3, into>(a, a_row, a_step, b, b_row, steps, c, c_row, vectors, factor);
    case 2:
      return multiply_strip<2, into>(a, a_row, a_step, b, b_row, steps, c, c_row, vectors, factor);
    case 1:
      return multiply_strip<1, into>(a, a_row, a_step, b, b_row, steps, c, c_row, vectors, factor);
  }
}

// ---- storage types. Head sizes are multiples of 8, so rows are moved by (at most) eight elements.

using MoveTag = hn::CappedTag<float, 8>;
constexpr int64_t kMoveLanes = static_cast<int64_t>(hn::MaxLanes(MoveTag()));

HWY_INLINE hn::Vec<MoveTag> load_as_float(const float* p) { return hn::LoadU(MoveTag(), p); }
HWY_INLINE hn::Vec<MoveTag> load_as_float(const bf16* p) {
  const MoveTag d;
  const hn::RebindToUnsigned<MoveTag> du;
  const hn::Rebind<uint16_t, MoveTag> du16;
  return hn::BitCast(
      d, hn::ShiftLeft<16>(hn::PromoteTo(du, hn::LoadU(du16, reinterpret_cast<const uint16_t*>(p)))));
}
HWY_INLINE void store_float(hn::Vec<MoveTag> x, float* p) { hn::StoreU(x, MoveTag(), p); }
// Rounds to the nearest even; NaN becomes the quiet NaN.
HWY_INLINE void store_float(hn::Vec<MoveTag> x, bf16* p) {
  const hn::RebindToUnsigned<MoveTag> du;
  const hn::RebindToSigned<MoveTag> di;
  const hn::Rebind<uint16_t, MoveTag> du16;
  const auto bits = hn::BitCast(du, x);
  const auto odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(du, 1u));
  const auto rounded = hn::ShiftRight<16>(hn::Add(bits, hn::Add(odd, hn::Set(du, 0x7FFFu))));
  const auto safe = hn::IfThenElse(hn::RebindMask(du, hn::Eq(x, x)), rounded, hn::Set(du, 0x7FC0u));
  hn::StoreU(hn::DemoteTo(du16, hn::BitCast(di, safe)), du16, reinterpret_cast<uint16_t*>(p));
}

// n elements as operands.
HWY_INLINE void copy_operands(const bf16* from, int64_t n, Pair* to) {
  std::memcpy(to, from, n * sizeof(bf16));
}
template <typename T>
HWY_INLINE void copy_operands(const T* from, int64_t n, float* to) {
  for (int64_t i = 0; i < n; i += kMoveLanes) hn::StoreU(load_as_float(from + i), MoveTag(), to + i);
}

template <typename T>
HWY_INLINE void store_scaled(const float* from, int64_t n, float scale, T* to) {
  const auto factor = hn::Set(MoveTag(), scale);
  for (int64_t i = 0; i < n; i += kMoveLanes)
    store_float(hn::Mul(hn::LoadU(MoveTag(), from + i), factor), to + i);
}

// ---- packing

// `rows` rows of `size` elements, from_row apart, as the steps of a product: to[row][0..padded) with zeros behind each,
// two rows in one of pairs, and zeros for the rows behind up to `all_rows`.
template <typename T>
HWY_INLINE void pack_steps(const T* from, int64_t from_row, int64_t rows, int64_t all_rows, int64_t size,
                           int64_t padded, float* to) {
  for (int64_t r = 0; r < rows; ++r) {
    copy_operands(from + r * from_row, size, to + r * padded);
    std::fill(to + r * padded + size, to + (r + 1) * padded, 0.0f);
  }
  std::fill(to + rows * padded, to + all_rows * padded, 0.0f);
}
HWY_INLINE void pack_steps(const bf16* from, int64_t from_row, int64_t rows, int64_t all_rows, int64_t size,
                           int64_t padded, Pair* to) {
  const hn::CappedTag<uint32_t, 8> d;
  const hn::Rebind<uint16_t, decltype(d)> du16;
  const auto load = [&](const bf16* p) {
    return hn::PromoteTo(d, hn::LoadU(du16, reinterpret_cast<const uint16_t*>(p)));
  };
  for (int64_t r = 0; r < all_rows; r += 2, to += padded) {
    const bf16* p = from + r * from_row;
    for (int64_t i = 0; i < size && r < rows; i += kMoveLanes) {
      const auto second = r + 1 < rows ? load(p + from_row + i) : hn::Zero(d);
      hn::StoreU(hn::Or(hn::ShiftLeft<16>(load(p + i)), second), d, to + i);
    }
    std::fill(to + (r < rows ? size : 0), to + padded, Pair{0});
  }
}

// Four operands from p on.
HWY_INLINE hn::Vec<hn::FixedTag<float, 4>> load_four(const float* p, float*) {
  return hn::LoadU(hn::FixedTag<float, 4>(), p);
}
HWY_INLINE hn::Vec<hn::FixedTag<float, 4>> load_four(const bf16* p, float*) {
  const hn::FixedTag<float, 4> d;
  const hn::FixedTag<uint32_t, 4> du;
  const hn::FixedTag<uint16_t, 4> du16;
  return hn::BitCast(
      d, hn::ShiftLeft<16>(hn::PromoteTo(du, hn::LoadU(du16, reinterpret_cast<const uint16_t*>(p)))));
}
HWY_INLINE hn::Vec<hn::FixedTag<Pair, 4>> load_four(const bf16* p, Pair*) {
  return hn::BitCast(hn::FixedTag<Pair, 4>(),
                     hn::LoadU(hn::FixedTag<uint16_t, 8>(), reinterpret_cast<const uint16_t*>(p)));
}

// to[d][key] of operands, rows kKeyBlock apart, from `keys` rows of `size` elements; the columns behind them become
// zero.
template <typename T, typename Operand>
HWY_INLINE void pack_transposed(const T* from, int64_t from_row, int64_t keys, int64_t size, Operand* to) {
  constexpr int64_t kWidth = kPerOperand<Operand>;
  const hn::FixedTag<Operand, 4> d;
  const hn::FixedTag<uint64_t, 2> d64;
  int64_t key = 0;
  for (; key + 4 <= keys; key += 4) {
    for (int64_t i = 0; i < size / kWidth; i += 4) {
      const T* p = from + key * from_row + i * kWidth;
      const auto r0 = load_four(p, to);
      const auto r1 = load_four(p + from_row, to);
      const auto r2 = load_four(p + 2 * from_row, to);
      const auto r3 = load_four(p + 3 * from_row, to);
      const auto low01 = hn::BitCast(d64, hn::InterleaveLower(d, r0, r1));
      const auto low23 = hn::BitCast(d64, hn::InterleaveLower(d, r2, r3));
      const auto high01 = hn::BitCast(d64, hn::InterleaveUpper(d, r0, r1));
      const auto high23 = hn::BitCast(d64, hn::InterleaveUpper(d, r2, r3));
      Operand* q = to + i * kKeyBlock + key;
      hn::StoreU(hn::BitCast(d, hn::InterleaveLower(d64, low01, low23)), d, q);
      hn::StoreU(hn::BitCast(d, hn::InterleaveUpper(d64, low01, low23)), d, q + kKeyBlock);
      hn::StoreU(hn::BitCast(d, hn::InterleaveLower(d64, high01, high23)), d, q + 2 * kKeyBlock);
      hn::StoreU(hn::BitCast(d, hn::InterleaveUpper(d64, high01, high23)), d, q + 3 * kKeyBlock);
    }
  }
  for (; key < kKeyBlock; ++key) {
    for (int64_t i = 0; i < size / kWidth; i += 4) {
      Operand four[4] = {};
      if (key < keys) hn::StoreU(load_four(from + key * from_row + i * kWidth, to), d, four);
      for (int64_t j = 0; j < 4; ++j) to[(i + j) * kKeyBlock + key] = four[j];
    }
  }
}

// ---- softmax, in powers of two

// A vector of a row as operands, and the vectors of two rows as one step.
HWY_INLINE void store_row(FloatVec x, float* to) { hn::StoreU(x, kFloatTag, to); }
#if HWY_TARGET == HWY_AVX3
using PairTag = hn::ScalableTag<Pair>;
HWY_INLINE void store_row(FloatVec x, Pair* to) {
  const hn::Half<PairTag> d;
  hn::Vec<decltype(d)> rounded;
  asm("vcvtneps2bf16 %1, %0" : "=v"(rounded.raw) : "v"(x.raw));
  hn::StoreU(hn::RotateRight<16>(rounded), d, to);
}
// Returns both, rounded: the first in the upper half of the vector.
HWY_INLINE hn::Vec<PairTag> store_step(FloatVec first, FloatVec second, Pair* to) {
  alignas(64) static constexpr uint16_t kOrder[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                      21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                      11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  hn::Vec<PairTag> both;
  asm("vcvtne2ps2bf16 %2, %1, %0" : "=v"(both.raw) : "v"(first.raw), "v"(second.raw));
  const hn::Vec<PairTag> step{_mm512_permutexvar_epi16(_mm512_load_si512(kOrder), both.raw)};
  hn::StoreU(step, PairTag(), to);
  return both;
}
// Stores the vectors of two rows in both layouts, as one step and as a row each.
HWY_INLINE void store_step_and_rows(FloatVec first, FloatVec second, Pair* step, Pair* first_row,
                                    Pair* second_row) {
  const hn::Half<PairTag> half;
  const auto both = hn::RotateRight<16>(store_step(first, second, step));
  hn::StoreU(hn::UpperHalf(half, both), half, first_row);
  hn::StoreU(hn::LowerHalf(half, both), half, second_row);
}
#endif

// scores[0..vectors), those that are masked minus infinity, become 2^(score - maximum); returns `sum` plus theirs. The
// weights may take the place of the scores.
template <typename Operand>
HWY_INLINE WideVec softmax_weights(int64_t vectors, float maximum, const float* scores, Operand* weights,
                                   WideVec sum) {
  // A row that sees no key has maximum -inf, and -inf - -inf is no number.
  const FloatVec most = hn::Set(kFloatTag, maximum == kMinusInfinity ? 0.0f : maximum);
  const auto weigh = [&](int64_t v, auto count, WideVec* sums) {
    constexpr int kCount = decltype(count)::value;
    FloatVec w[kCount];
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) w[i] = hn::Sub(hn::LoadU(kFloatTag, scores + (v + i) * kLanes), most);
    exact_weights(w);
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) {
      store_row(w[i], weights + (v + i) * kLanes / kPerOperand<Operand>);
      sums[i % 2] = add_wide(sums[i % 2], w[i]);
    }
  };
  WideVec sums[2] = {sum, hn::Zero(WideTag())};
  int64_t v = 0;
  for (; v + kSoftmaxVectors <= vectors; v += kSoftmaxVectors) {
    weigh(v, std::integral_constant<int, kSoftmaxVectors>(), sums);
  }
  for (; v < vectors; ++v) weigh(v, std::integral_constant<int, 1>(), sums);
  return hn::Add(sums[0], sums[1]);
}

// The greatest of `most`, lane by lane, and of scores[0..vectors).
HWY_INLINE FloatVec greatest(int64_t vectors, const float* scores, FloatVec most) {
  for (int64_t v = 0; v < vectors; ++v) most = hn::Max(most, hn::LoadU(kFloatTag, scores + v * kLanes));
  return most;
}

// out[0..size) = output / sum of weights.
template <typename T>
HWY_INLINE void store_output(const float* output, int64_t size, double sum, T* out) {
  const auto factor = hn::Set(MoveTag(), sum == 0.0 ? 0.0f : static_cast<float>(1.0 / sum));
  // Adding 0 makes -0 to 0: which of them a sum that underflowed has may depend on what was masked.
  for (int64_t i = 0; i < size; i += kMoveLanes) {
    store_float(hn::MulAdd(hn::LoadU(MoveTag(), output + i), factor, hn::Zero(MoveTag())), out + i);
  }
}

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace merf
HWY_AFTER_NAMESPACE();

#endif
