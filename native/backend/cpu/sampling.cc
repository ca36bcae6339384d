// Drawing tokens from logits, without sorting the vocabulary.
//
// What is drawn is defined so that any device can reproduce it, whatever order it sums in:
//
//   m = max x;  t = fl(log2(e) / temperature), at most the largest float (temperature.h)
//   p[i] = 2^((x[i] - m) * t) in float32, as exp2_nonpositive computes it, hence p = 1 at the maximum
//   w[i] = p[i] rounded to a multiple of 2^-34 (for p < 2^-11 by fl(fl(p + 2^-11) - 2^-11); larger ones are multiples
//          already). Sums of up to 2^19 such weights are exact in float64, in every order (exact_sum-inl.h).
//   top-k: k_threshold = the k-th largest w
//   top-p: p_threshold = the largest weight u with mass(w >= u) >= top_p * mass(w >= k_threshold)
//   min-p: m_threshold = fl(min_p)                                            (the largest weight is 1)
//   kept = { i : w[i] > 0, w[i] >= max(k_threshold, p_threshold, m_threshold) }: ties at a bound are kept together
//   token = the first i in vocabulary order with sum of kept w[0..i] > u * mass(kept), u = sampling_uniform()
//
// which is the order of filters in Hugging Face and vLLM: temperature, top-k, top-p, min-p. Greedy (temperature 0)
// takes the first maximum, and says the log-probability of temperature 1. A row with NaN, +inf or nothing finite has no distribution: its token is 0 and its
// log-probabilities and entropy are NaN.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "backend/cpu/sampling.cc"
#include "backend/cpu/simd_targets.h"
// The targets are chosen above.
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include <omp.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <vector>

#include "backend/cpu/cpu_backend.h"
#include "backend/cpu/exact_sum-inl.h"
#include "backend/philox.h"
#include "backend/temperature.h"

#ifndef MERF_BACKEND_CPU_SAMPLING_ONCE
#define MERF_BACKEND_CPU_SAMPLING_ONCE

namespace merf {
namespace {

constexpr int64_t kWidestLanes = 16;  // of any target

struct Drawn {
  int32_t token;
  float sampling_logprob, logprob, entropy;
};

// Finds thresholds on positive weights by their bits, which are ordered as the weights are: a histogram over the
// upper 16 bits, then two of 8 bits over what falls into the bin of the bound.
class ThresholdSearch {
 public:
  ThresholdSearch() : counts_(kBins), masses_(kBins) {}

  // The weights, all positive, that the following searches are among.
  void count(const float* weights, int64_t n) {
    std::fill(counts_.begin(), counts_.end(), 0);
    std::fill(masses_.begin(), masses_.end(), 0.0);
    weights_ = weights;
    size_ = n;
    mass_ = 0.0;
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t bin = (std::bit_cast<uint32_t>(weights[i]) >> 16) - kFirstBin;
      ++counts_[bin];
      masses_[bin] += weights[i];
      mass_ += weights[i];
    }
  }

  double mass() const { return mass_; }

  struct Bound {
    float threshold;
    double mass;  // of the weights at or above the threshold
  };

  // The largest weight u with at least `goal` weights at or above it; the smallest positive one if there are fewer.
  Bound top_count(int64_t goal) {
    return search([&](int64_t count, double) { return count >= goal; });
  }
  // The largest weight u such that the weights at or above it sum to `goal` or more.
  Bound top_mass(double goal) {
    return search([&](int64_t, double mass) { return mass >= goal; });
  }

 private:
  // Weights are 0 or in [2^-34, 1].
  static constexpr uint32_t kFirstBin = (127u - 34u) << 7;
  static constexpr uint32_t kBins = (127u << 7) - kFirstBin + 1;

  template <class Reached>
  Bound search(const Reached& reached) {
    int64_t count = 0;
    double mass = 0.0;
    uint32_t bin = kBins, smallest = 0;
    while (bin-- > 0) {
      if (counts_[bin] == 0) continue;
      smallest = bin;
      if (reached(count + counts_[bin], mass + masses_[bin])) break;
      count += counts_[bin];
      mass += masses_[bin];
    }
    if (bin >= kBins) {  // never reached: step back before the last bin and take it to its end
      bin = smallest;
      count -= counts_[bin];
      mass -= masses_[bin];
    }
    members_.clear();
    for (int64_t i = 0; i < size_; ++i) {
      const uint32_t bits = std::bit_cast<uint32_t>(weights_[i]);
      if (bits >> 16 == bin + kFirstBin) members_.push_back(bits);
    }
    uint32_t prefix = bin + kFirstBin;
    for (const int shift : {8, 0}) {
      int64_t counts[256] = {};
      double masses[256] = {};
      for (const uint32_t bits : members_) {
        if (bits >> (shift + 8) != prefix) continue;
        ++counts[(bits >> shift) & 255];
        masses[(bits >> shift) & 255] += std::bit_cast<float>(bits);
      }
      int byte = 256, last = 0;
      while (byte-- > 0) {
        if (counts[byte] == 0) continue;
        last = byte;
        if (reached(count + counts[byte], mass + masses[byte])) break;
        count += counts[byte];
        mass += masses[byte];
      }
      if (byte < 0) {
        byte = last;
        count -= counts[byte];
        mass -= masses[byte];
      }
      prefix = prefix << 8 | static_cast<uint32_t>(byte);
      if (shift == 0) mass += masses[byte];
    }
    return {std::bit_cast<float>(prefix), mass};
  }

  std::vector<int64_t> counts_;
  std::vector<double> masses_;
  std::vector<uint32_t> members_;
  const float* weights_ = nullptr;
  double mass_ = 0.0;
  int64_t size_ = 0;
};

}  // namespace
}  // namespace merf

#endif

HWY_BEFORE_NAMESPACE();
namespace merf {
namespace HWY_NAMESPACE {

using SampleTag = WeightTag;
using SampleVec = WeightVec;
constexpr int64_t kSampleLanes = static_cast<int64_t>(hn::MaxLanes(SampleTag()));
static_assert(kSampleLanes <= kWidestLanes);

// Lanes behind the row's end are -inf.
HWY_INLINE SampleVec load_logits(const float* logits, int64_t i, int64_t n) {
  const SampleTag d;
  if (i + kSampleLanes <= n) return hn::LoadU(d, logits + i);
  float rest[kSampleLanes];
  for (int64_t j = 0; j < kSampleLanes; ++j) {
    rest[j] = i + j < n ? logits[i + j] : -std::numeric_limits<float>::infinity();
  }
  return hn::LoadU(d, rest);
}

HWY_INLINE WideVec add_product(WideVec sum, SampleVec a, SampleVec b) {
  const hn::Half<SampleTag> half;
  const WideTag d;
  sum = hn::MulAdd(hn::PromoteTo(d, hn::LowerHalf(half, a)), hn::PromoteTo(d, hn::LowerHalf(half, b)), sum);
  return hn::MulAdd(hn::PromoteTo(d, hn::UpperHalf(half, a)), hn::PromoteTo(d, hn::UpperHalf(half, b)), sum);
}

// The maximum; NaN where the row has no distribution.
HWY_INLINE float finite_maximum(const float* logits, int64_t n) {
  const SampleTag d;
  SampleVec most = hn::Set(d, -std::numeric_limits<float>::infinity());
  SampleVec nan = hn::Zero(d);
  for (int64_t i = 0; i < n; i += kSampleLanes) {
    const SampleVec x = load_logits(logits, i, n);
    most = hn::Max(most, x);
    nan = hn::IfThenElse(hn::Eq(x, x), nan, hn::Set(d, 1.0f));
  }
  const float maximum = hn::GetLane(hn::MaxOfLanes(d, most));
  const bool defined = hn::GetLane(hn::MaxOfLanes(d, nan)) == 0.0f && std::isfinite(maximum);
  return defined ? maximum : std::numeric_limits<float>::quiet_NaN();
}

// Writes the weights and returns their mass.
HWY_INLINE double write_weights(const float* logits, int64_t n, float maximum, float factor, float* weights) {
  const SampleTag d;
  const WideTag wide;
  const SampleVec most = hn::Set(d, maximum), scale = hn::Set(d, factor);
  WideVec mass = hn::Zero(wide);
  for (int64_t i = 0; i < n; i += kSampleLanes) {
    const SampleVec w = exact_weight(hn::Mul(hn::Sub(load_logits(logits, i, n), most), scale));
    hn::StoreU(w, d, weights + i);
    mass = add_wide(mass, w);
  }
  return sum_of_lanes(mass);
}

// sum of weight * (logit - maximum)
HWY_INLINE double mean_numerator(const float* logits, int64_t n, float maximum, const float* weights) {
  const SampleTag d;
  const WideTag wide;
  const SampleVec most = hn::Set(d, maximum);
  WideVec sum = hn::Zero(wide);
  for (int64_t i = 0; i < n; i += kSampleLanes) {
    const SampleVec w = hn::LoadU(d, weights + i);
    const SampleVec below = hn::Sub(load_logits(logits, i, n), most);
    sum = add_product(sum, w, hn::IfThenElseZero(hn::Gt(w, hn::Zero(d)), below));
  }
  return sum_of_lanes(sum);
}

// The first index at which the running mass of weights at or above the threshold passes `target`, which is below
// their total.
HWY_INLINE int64_t find_drawn(const float* weights, int64_t n, float threshold, double target) {
  constexpr int64_t kBlock = 16 * kSampleLanes;
  const SampleTag d;
  const WideTag wide;
  const SampleVec bound = hn::Set(d, threshold);
  double mass = 0.0;
  int64_t last = 0;
  for (int64_t block = 0; block < n; block += kBlock) {
    const int64_t end = std::min(block + kBlock, n);
    WideVec sum = hn::Zero(wide);
    for (int64_t i = block; i < end; i += kSampleLanes) {
      const SampleVec w = hn::LoadU(d, weights + i);
      sum = add_wide(sum, hn::IfThenElseZero(hn::Ge(w, bound), w));
    }
    const double block_mass = sum_of_lanes(sum);
    if (mass + block_mass <= target) {
      mass += block_mass;
      continue;
    }
    for (int64_t i = block; i < end; ++i) {
      if (!(weights[i] >= threshold && weights[i] > 0.0f)) continue;
      mass += weights[i];
      last = i;
      if (mass > target) return i;
    }
  }
  return last;
}

// Copies the weights of at least `floor` that are not 0, in order; returns how many.
HWY_INLINE int64_t collect(const float* weights, int64_t n, float floor, float* candidates) {
  const SampleTag d;
  const SampleVec bound = hn::Set(d, floor), zero = hn::Zero(d);
  int64_t count = 0;
  for (int64_t i = 0; i < n; i += kSampleLanes) {
    const SampleVec w = hn::LoadU(d, weights + i);
    const auto wanted = hn::And(hn::Ge(w, bound), hn::Gt(w, zero));
    if (hn::AllFalse(d, wanted)) continue;
    hn::StoreU(hn::Compress(w, wanted), d, candidates + count);
    count += static_cast<int64_t>(hn::CountTrue(d, wanted));
  }
  return count;
}

// The least weight that top-k and top-p keep.
HWY_INLINE float filter_threshold(const float* weights, int64_t n, double mass,
                                  const SamplingOptions& options, float* candidates,
                                  ThresholdSearch& search) {
  const bool top_k = options.top_k > 0 && options.top_k < n;
  // Most of a language model's vocabulary weighs next to nothing: look among the heavy tokens first.
  for (const float floor : {0x1p-12f, 0.0f}) {
    const int64_t count = collect(weights, n, floor, candidates);
    if (top_k && count < options.top_k && floor > 0.0f) continue;
    search.count(candidates, count);
    float threshold = 0.0f;
    double kept = mass;
    if (top_k) {
      const auto bound = search.top_count(options.top_k);
      threshold = bound.threshold;
      kept = bound.mass;
    }
    if (options.top_p < 1.0f) {
      const double goal = static_cast<double>(options.top_p) * kept;
      if (search.mass() < goal && floor > 0.0f) continue;
      threshold = std::max(threshold, search.top_mass(goal).threshold);
    }
    return threshold;
  }
  return 0.0f;
}

// `weights` and `candidates` have room for n rounded up to whole vectors.
Drawn draw(const float* logits, int64_t n, double uniform, const SamplingOptions& options, bool want_entropy,
           float* weights, float* candidates, ThresholdSearch& search) {
  constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
  const Temperature temperature = temperature_of(options.temperature);
  const float maximum = finite_maximum(logits, n);
  if (std::isnan(maximum)) return {0, kNaN, kNaN, kNaN};

  double mass = write_weights(logits, n, maximum, temperature.factor, weights);
  const double whole_log_mass = std::log(mass);
  Drawn drawn{};
  if (want_entropy) {
    const double mean = mean_numerator(logits, n, maximum, weights) / mass / temperature.value;
    drawn.entropy = static_cast<float>(whole_log_mass - mean);
  }
  if (options.temperature <= 0.0f) {
    drawn.token = static_cast<int32_t>(std::find(logits, logits + n, maximum) - logits);
    drawn.logprob = static_cast<float>(-whole_log_mass);
    return drawn;
  }

  float threshold = std::clamp(options.min_p, 0.0f, 1.0f);
  bool truncated = threshold > 0.0f;
  if ((options.top_k > 0 && options.top_k < n) || options.top_p < 1.0f) {
    threshold = std::max(threshold, filter_threshold(weights, n, mass, options, candidates, search));
    truncated = true;
  }
  if (truncated) {
    const SampleTag d;
    const WideTag wide;
    const SampleVec bound = hn::Set(d, threshold);
    WideVec sum = hn::Zero(wide);
    for (int64_t i = 0; i < n; i += kSampleLanes) {
      const SampleVec w = hn::LoadU(d, weights + i);
      sum = add_wide(sum, hn::IfThenElseZero(hn::Ge(w, bound), w));
    }
    mass = sum_of_lanes(sum);
  }

  drawn.token = static_cast<int32_t>(find_drawn(weights, n, threshold, uniform * mass));
  const float logit = logits[drawn.token];
  drawn.logprob = logprob_at(temperature.value, logit, maximum, whole_log_mass);
  drawn.sampling_logprob = logprob_at(temperature.value, logit, maximum, std::log(mass));
  return drawn;
}

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace merf
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace merf {
namespace {
HWY_EXPORT(draw);
}  // namespace

void CpuBackend::sample_tokens(const Tensor& logits, const Tensor& keys, const Tensor& positions,
                               const SamplingOptions& options, const Tensor& tokens,
                               const Tensor& sampling_logprobs, const Tensor& logprobs,
                               const Tensor& entropies) {
  const int64_t rows = logits.shape[0], vocabulary = logits.shape[1];
  if (rows == 0 || vocabulary == 0) return;
  const int threads = static_cast<int>(std::min<int64_t>(num_threads(), rows));
  const int64_t room = (vocabulary + kWidestLanes - 1) / kWidestLanes * kWidestLanes;
  const Tensor weights = allocate(DType::f32, {threads, 2, room});

#pragma omp parallel num_threads(threads)
  {
    ThresholdSearch search;
    float* own_weights = weights.as<float>() + omp_get_thread_num() * 2 * room;
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
      if (interrupted()) continue;
      const int32_t* key = keys.as<int32_t>() + 2 * row;
      const double uniform =
          sampling_uniform(options.seed, static_cast<uint32_t>(key[0]), static_cast<uint32_t>(key[1]),
                           static_cast<uint32_t>(positions.as<int32_t>()[row]));
      const Drawn drawn =
          HWY_DYNAMIC_DISPATCH(draw)(logits.as<float>() + row * vocabulary, vocabulary, uniform, options,
                                     static_cast<bool>(entropies), own_weights, own_weights + room, search);
      tokens.as<int32_t>()[row] = drawn.token;
      sampling_logprobs.as<float>()[row] = drawn.sampling_logprob;
      logprobs.as<float>()[row] = drawn.logprob;
      if (entropies) entropies.as<float>()[row] = drawn.entropy;
    }
  }
  check_interrupted();
}

void CpuBackend::next_tokens(const Tensor& drawn, const Tensor& sources, const Tensor& ids) {
  const int32_t* token = drawn.as<const int32_t>();
  for (int64_t b = 0; b < sources.size(); ++b) {
    const int32_t source = sources.as<const int32_t>()[b];
    ids.as<int32_t>()[b] = source < 0 ? -1 - source : token[source];
  }
}

}  // namespace merf
#endif
