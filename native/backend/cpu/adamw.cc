// AdamW and the global norm of gradients: both are bound by memory, so each reads every array once.
#include "backend/cpu/simd_targets.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "backend/cpu/adamw.cc"
#include "backend/cpu/cpu_backend.h"
#include "backend/cpu/parallel.h"
#include "backend/stochastic_rounding.h"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "hwy/highway.h"

// load_store-inl.h comes after highway.h, which it reads.
#include "backend/cpu/load_store-inl.h"

HWY_BEFORE_NAMESPACE();
namespace merf {
namespace HWY_NAMESPACE {

// Elements summed in one go; fixed, so that the sum does not depend on the number of threads.
constexpr int64_t kSquaresBlock = 1 << 14;

using U32 = hn::RebindToUnsigned<F32>;
using VU32 = hn::Vec<U32>;

// rounding_noise of the indices from `index` on, and round_by_chance, as in stochastic_rounding.h.
HWY_INLINE VU32 rounding_noises(uint32_t index, uint32_t step) {
  const U32 d;
  VU32 x = hn::Xor(hn::Iota(d, index), hn::Set(d, step * kNoiseStep));
  x = hn::Mul(hn::Xor(x, hn::ShiftRight<16>(x)), hn::Set(d, kNoiseFactor1));
  x = hn::Mul(hn::Xor(x, hn::ShiftRight<15>(x)), hn::Set(d, kNoiseFactor2));
  return hn::Xor(x, hn::ShiftRight<16>(x));
}
HWY_INLINE VF32 round_by_chance(VF32 value, VU32 noise) {
  const F32 d;
  const U32 du;
  const VU32 rounded = hn::And(hn::Add(hn::BitCast(du, value), noise), hn::Set(du, 0xffff0000u));
  return hn::IfThenElse(hn::IsFinite(value), hn::BitCast(d, rounded), value);
}

// Updates as torch.optim.AdamW does (Loshchilov and Hutter 2019), in its order of operations:
//   p *= 1 - lr * weight_decay;  m += (g - m) * (1 - beta1);  v = v * beta2 + (1 - beta2) * g^2
//   p -= lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + epsilon)
// on elements [first, first + n) of the arrays.
// Where `master` is lower halves, `weight` is the upper ones.
template <typename Master, typename W, typename M>
void adamw_range(int64_t first, int64_t n, Master* master, W* weight, const float* gradient, M* m, M* v,
                 float weight_decay, const AdamWOptions& options) {
  const F32 d;
  master += first;
  gradient += first;
  m += first;
  v += first;
  if (weight) weight += first;
  const double beta1 = options.beta1, beta2 = options.beta2;
  const double correction1 = 1.0 - std::pow(beta1, static_cast<double>(options.step));
  const double correction2 = 1.0 - std::pow(beta2, static_cast<double>(options.step));
  const VF32 scale = hn::Set(d, options.gradient_scale);
  const VF32 keep = hn::Set(d, static_cast<float>(1.0 - static_cast<double>(options.learning_rate) *
                                                            static_cast<double>(weight_decay)));
  const VF32 take1 = hn::Set(d, static_cast<float>(1.0 - beta1));
  const VF32 keep2 = hn::Set(d, options.beta2);
  const VF32 take2 = hn::Set(d, static_cast<float>(1.0 - beta2));
  const VF32 step = hn::Set(d, static_cast<float>(-static_cast<double>(options.learning_rate) / correction1));
  const VF32 root2 = hn::Set(d, static_cast<float>(std::sqrt(correction2)));
  const VF32 epsilon = hn::Set(d, options.epsilon);
  for_vectors(d, n, [&](size_t i, size_t lanes, auto whole) {
    const VF32 g = hn::Mul(load_part(d, gradient + i, lanes, whole), scale);
    const VF32 m0 = load_part(d, m + i, lanes, whole);
    const VF32 m1 = hn::MulAdd(hn::Sub(g, m0), take1, m0);
    const VF32 v1 = hn::MulAdd(hn::Mul(g, g), take2, hn::Mul(load_part(d, v + i, lanes, whole), keep2));
    const VF32 denominator = hn::Add(hn::Div(hn::Sqrt(v1), root2), epsilon);
    VF32 p = load_part(d, master + i, lanes, whole);
    if constexpr (std::is_same_v<Master, LowerHalf>) {
      p = join_halves(d, load_part(d, weight + i, lanes, whole), p);
    }
    const VF32 p0 = hn::Mul(p, keep);
    const VF32 p1 = hn::MulAdd(step, hn::Div(m1, denominator), p0);
    if constexpr (sizeof(M) == 2) {
      const VU32 noise = rounding_noises(static_cast<uint32_t>(first) + static_cast<uint32_t>(i),
                                         static_cast<uint32_t>(options.step));
      store_part(d, round_by_chance(m1, hn::And(noise, hn::Set(U32(), 0xffffu))), m + i, lanes, whole);
      store_part(d, round_by_chance(v1, hn::ShiftRight<16>(noise)), v + i, lanes, whole);
    } else {
      store_part(d, m1, m + i, lanes, whole);
      store_part(d, v1, v + i, lanes, whole);
    }
    store_part(d, p1, master + i, lanes, whole);
    if (weight) store_part(d, p1, weight + i, lanes, whole);
  });
}

void adamw(int threads, const AdamWTensor& tensor, const AdamWOptions& options) {
  const auto run = [&](auto* weight, auto* m, auto* v) {
    parallel_for(threads, tensor.master.size(), 1 << 13, [&](int64_t begin, int64_t end) {
      const auto update = [&](auto* master) {
        adamw_range(begin, end - begin, master, weight, tensor.gradient.as<const float>(), m, v,
                    tensor.weight_decay, options);
      };
      if (tensor.master.dtype == DType::bf16) {
        update(tensor.master.as<LowerHalf>());
      } else {
        update(tensor.master.as<float>());
      }
    });
  };
  const auto with_weight = [&](auto* weight) {
    if (tensor.m.dtype == DType::bf16) {
      run(weight, tensor.m.as<bf16>(), tensor.v.as<bf16>());
    } else {
      run(weight, tensor.m.as<float>(), tensor.v.as<float>());
    }
  };
  if (tensor.weight.dtype == DType::bf16) {
    with_weight(tensor.weight.as<bf16>());
  } else {
    with_weight(tensor.weight.as<float>());
  }
}

double squares(int64_t n, const float* x) {
  const F32 d;
  const hn::ScalableTag<double> dd;
  const hn::Rebind<float, hn::ScalableTag<double>> dh;
  auto a = hn::Zero(dd);
  auto b = hn::Zero(dd);
  const auto add = [&](const float* p) {
    const auto lower = hn::PromoteTo(dd, hn::LoadU(dh, p));
    const auto upper = hn::PromoteTo(dd, hn::LoadU(dh, p + hn::Lanes(dh)));
    a = hn::MulAdd(lower, lower, a);
    b = hn::MulAdd(upper, upper, b);
  };
  for_vectors(d, n, [&](size_t i, size_t lanes, auto whole) {
    if constexpr (decltype(whole)::value) {
      add(x + i);
    } else {
      float rest[HWY_MAX_BYTES / sizeof(float)] = {};
      std::memcpy(rest, x + i, lanes * sizeof(float));
      add(rest);
    }
  });
  return hn::GetLane(hn::SumOfLanes(dd, hn::Add(a, b)));
}

// partials: one for each block of the tensor.
void sum_of_squares(int threads, const Tensor& tensor, double* partials) {
  const int64_t n = tensor.size();
  const int64_t blocks = (n + kSquaresBlock - 1) / kSquaresBlock;
  parallel_for(threads, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kSquaresBlock;
      partials[block] = squares(std::min(kSquaresBlock, n - first), tensor.as<const float>() + first);
    }
  });
}

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace merf
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace merf {

HWY_EXPORT(adamw);
HWY_EXPORT(sum_of_squares);

void CpuBackend::adamw(const std::vector<AdamWTensor>& tensors, const AdamWOptions& options) {
  for (const AdamWTensor& tensor : tensors) {
    check_interrupted();
    HWY_DYNAMIC_DISPATCH(adamw)(num_threads(), tensor, options);
  }
}

double CpuBackend::sum_of_squares(const std::vector<Tensor>& tensors) {
  double sum = 0.0;
  std::vector<double> partials;
  for (const Tensor& tensor : tensors) {
    constexpr int64_t block = HWY_STATIC_DISPATCH(kSquaresBlock);
    partials.assign(static_cast<size_t>((tensor.size() + block - 1) / block), 0.0);
    HWY_DYNAMIC_DISPATCH(sum_of_squares)(num_threads(), tensor, partials.data());
    for (const double partial : partials) sum += partial;
  }
  return sum;
}

}  // namespace merf
#endif  // HWY_ONCE
