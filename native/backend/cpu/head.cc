// The language-model head fused with log-softmax, the policy loss and their backward. Rows go through it in blocks, and
// those of a block in strips: the logits of a strip are turned into log-probabilities, coefficients and the gradient
// of the logits while they are in the cache, and the gradients of a block go through both backward products at once,
// which read and write the gradient of the head whole. No more than one block of gradients is ever held.
//
// Loss rows that share a source row (the last prompt token predicts the first token of every completion) share its
// logits, so the products run over the distinct source rows.
#include "backend/cpu/simd_targets.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <utility>
#include <vector>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "backend/cpu/head.cc"
#include "backend/cpu/cpu_backend.h"
#include "backend/cpu/parallel.h"
#include "backend/policy_loss_row.h"
#include "backend/temperature.h"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "hwy/highway.h"

// These come after highway.h, which they read.
#include "backend/cpu/exact_sum-inl.h"
#include "backend/cpu/load_store-inl.h"

#ifndef MERF_BACKEND_CPU_HEAD_ONCE_
#define MERF_BACKEND_CPU_HEAD_ONCE_
namespace merf {

// What the loss needs to know of one row of logits x.
struct RowStatistics {
  float max = 0.0f;
  double log_sum = 0.0;  // log of the sum of exp(x - max)
  double entropy = 0.0;
};

// One distinct source row and the loss rows that it predicts: order[begin, end).
struct SourceRow {
  int32_t row;
  int64_t begin;
  int64_t end;
};

// d loss / d logits of a source row: p * (entropy_weight * (log p + entropy) - coefficient), plus each target's own
// coefficient at the target. All of them have been divided by the temperature.
struct RowGradient {
  float coefficient = 0.0f;
  float entropy_weight = 0.0f;
  std::vector<std::pair<int32_t, float>> targets;  // distinct
};

}  // namespace merf
#endif

HWY_BEFORE_NAMESPACE();
namespace merf {
namespace HWY_NAMESPACE {

void row_statistics(const float* logits, int64_t size, const Temperature& temperature,
                    RowStatistics* statistics) {
  const F32 d;
  VF32 greatest = hn::Set(d, -INFINITY);
  for_vectors(d, size, [&](size_t i, size_t n, auto whole) {
    if constexpr (decltype(whole)::value) {
      greatest = hn::Max(greatest, load(d, logits + i));
    } else {
      for (size_t j = 0; j < n; ++j) greatest = hn::Max(greatest, hn::Set(d, logits[i + j]));
    }
  });
  const float max = hn::GetLane(hn::MaxOfLanes(d, greatest));
  const VF32 vmax = hn::Set(d, max);
  const VF32 factor = hn::Set(d, temperature.factor);
  // The sum of weights is exact, as it is where tokens are drawn: the same logits give the same log-probability here
  // and there. Of the entropy's sum short float32 stretches are joined in float64: exact enough for any vocabulary.
  constexpr int64_t kStretch = 2048;
  WideVec sums = hn::Zero(WideTag());
  double weighted = 0.0;
  for (int64_t first = 0; first < size; first += kStretch) {
    VF32 w = hn::Zero(d);
    for_vectors(d, std::min(kStretch, size - first), [&](size_t i, size_t n, auto whole) {
      const VF32 x = hn::Sub(load_part(d, logits + first + i, n, whole), vmax);
      VF32 e = exact_weight(hn::Mul(x, factor));
      if constexpr (!decltype(whole)::value) e = hn::IfThenElseZero(hn::FirstN(d, n), e);
      sums = add_wide(sums, e);
      w = hn::MulAdd(e, x, w);
    });
    weighted += hn::GetLane(hn::SumOfLanes(d, w));
  }
  const double sum = sum_of_lanes(sums);
  statistics->max = max;
  statistics->log_sum = std::log(sum);
  statistics->entropy = statistics->log_sum - weighted / sum / temperature.value;
}

void rows_statistics(int threads, const float* logits, int64_t rows, int64_t size,
                     const Temperature& temperature, RowStatistics* statistics) {
  parallel_for(threads, rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      row_statistics(logits + row * size, size, temperature, statistics + row);
  });
}

template <typename T>
void row_gradient(const float* logits, int64_t size, const Temperature& temperature,
                  const RowStatistics& statistics, const RowGradient& gradient, T* out) {
  const F32 d;
  const float log_sum = static_cast<float>(statistics.log_sum);
  const float shift = static_cast<float>(statistics.entropy - statistics.log_sum);
  const float scale = static_cast<float>(std::exp(-statistics.log_sum));
  // Logits at the targets, kept before the row is overwritten.
  float at_targets[16];
  std::vector<float> more;
  float* values = at_targets;
  if (gradient.targets.size() > 16) {
    more.resize(gradient.targets.size());
    values = more.data();
  }
  for (size_t i = 0; i < gradient.targets.size(); ++i) {
    const float x = (logits[gradient.targets[i].first] - statistics.max) * temperature.inverse;
    const float p = std::exp(x - log_sum);
    values[i] =
        p * (gradient.entropy_weight * (x + shift) - gradient.coefficient) + gradient.targets[i].second;
  }
  const VF32 vmax = hn::Set(d, statistics.max);
  const VF32 vfactor = hn::Set(d, temperature.factor);
  const VF32 vscale = hn::Set(d, scale);
  const VF32 vcoefficient = hn::Set(d, -gradient.coefficient);
  if (gradient.entropy_weight == 0.0f) {
    const VF32 factor = hn::Mul(vscale, vcoefficient);
    for_vectors(d, size, [&](size_t i, size_t n, auto whole) {
      const VF32 x = hn::Sub(load_part(d, logits + i, n, whole), vmax);
      store_part(d, hn::Mul(exp2_nonpositive(d, hn::Mul(x, vfactor)), factor), out + i, n, whole);
    });
  } else {
    const VF32 vinverse = hn::Set(d, temperature.inverse);
    const VF32 vshift = hn::Set(d, shift);
    const VF32 vweight = hn::Set(d, gradient.entropy_weight);
    for_vectors(d, size, [&](size_t i, size_t n, auto whole) {
      const VF32 x = hn::Sub(load_part(d, logits + i, n, whole), vmax);
      const VF32 p = hn::Mul(exp2_nonpositive(d, hn::Mul(x, vfactor)), vscale);
      const VF32 surprise = hn::MulAdd(x, vinverse, vshift);  // log p + entropy
      store_part(d, hn::Mul(p, hn::MulAdd(vweight, surprise, vcoefficient)), out + i, n, whole);
    });
  }
  for (size_t i = 0; i < gradient.targets.size(); ++i)
    out[gradient.targets[i].first] = from_f32<T>(values[i]);
}

// dlogits may be the logits themselves where it is f32.
void rows_gradient(int threads, const float* logits, int64_t rows, int64_t size,
                   const Temperature& temperature, const RowStatistics* statistics,
                   const RowGradient* gradients, const Tensor& dlogits) {
  parallel_for(threads, rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const float* from = logits + row * size;
      if (dlogits.dtype == DType::bf16) {
        row_gradient(from, size, temperature, statistics[row], gradients[row],
                     dlogits.as<bf16>() + row * size);
      } else {
        row_gradient(from, size, temperature, statistics[row], gradients[row],
                     dlogits.as<float>() + row * size);
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

HWY_EXPORT(rows_statistics);
HWY_EXPORT(rows_gradient);

namespace {

// Bytes of the logits of a strip, and of the gradients that go through the backward products at once.
constexpr int64_t kStripBytes = int64_t{12} << 20;
constexpr int64_t kBlockBytes = int64_t{48} << 20;

int64_t rows_within(int64_t bytes, int64_t row_bytes) {
  return std::clamp<int64_t>(bytes / row_bytes / 32 * 32, 32, 2048);
}

// The loss rows by source row.
struct Plan {
  std::vector<int32_t> order;  // loss rows
  std::vector<SourceRow> sources;
};

Plan plan_rows(const std::vector<int32_t>& row) {
  Plan plan;
  plan.order.resize(row.size());
  std::iota(plan.order.begin(), plan.order.end(), 0);
  const auto before = [&](int32_t a, int32_t b) { return row[a] < row[b]; };
  if (!std::is_sorted(plan.order.begin(), plan.order.end(), before)) {
    std::stable_sort(plan.order.begin(), plan.order.end(), before);
  }
  for (int64_t i = 0; i < static_cast<int64_t>(row.size()); ++i) {
    const int32_t source = row[plan.order[i]];
    if (plan.sources.empty() || plan.sources.back().row != source) plan.sources.push_back({source, i, i});
    plan.sources.back().end = i + 1;
  }
  return plan;
}

// What blocks of source rows need, reused from block to block.
class HeadBlocks {
 public:
  HeadBlocks(CpuBackend& backend, const Tensor& hidden, const PackedWeight& head,
             const std::vector<int32_t>& rows, const std::vector<int32_t>& targets, const Tensor& logprobs,
             const Tensor& entropies, float temperature, bool for_backward)
      : backend_(backend),
        hidden_(hidden),
        head_(head),
        targets_(targets),
        logprobs_(logprobs.as<float>()),
        entropies_(entropies.as<float>()),
        temperature_(temperature_of(temperature)),
        plan_(plan_rows(rows)) {
    const auto most = [&](int64_t bytes, DType dtype) {
      const int64_t within = rows_within(bytes, head.outputs * static_cast<int64_t>(size_of(dtype)));
      return std::min(within, std::max<int64_t>(1, sources()));
    };
    strip_ = most(kStripBytes, DType::f32);
    block_ = for_backward ? std::max(strip_, most(kBlockBytes, head.dtype)) : strip_;
    source_rows_ = backend.allocate(DType::i32, {strip_});
    gathered_ = backend.allocate(hidden.dtype, {block_, head.inputs});
    statistics_.resize(static_cast<size_t>(sources()));
    if (for_backward) {
      dhidden_block_ = backend.allocate(hidden.dtype, {block_, head.inputs});
      dlogits_ = backend.allocate(head.dtype, {block_, head.outputs});
    }
    // Gradients in float32 take the place of the logits.
    if (!for_backward || head.dtype != DType::f32) {
      strip_logits_ = backend.allocate(DType::f32, {strip_, head.outputs});
    }
  }

  int64_t sources() const { return static_cast<int64_t>(plan_.sources.size()); }
  int64_t strip() const { return strip_; }

  template <class Body>
  void for_blocks(Body&& body) {
    for (int64_t begin = 0; begin < sources(); begin += block_)
      body(begin, std::min(sources(), begin + block_));
  }

  // Calls body(begin, end) for the strips of source rows [begin, end).
  template <class Body>
  void for_strips(int64_t begin, int64_t end, Body&& body) {
    for (; begin < end; begin += strip_) body(begin, std::min(end, begin + strip_));
  }

  // Calls body(loss row) for the loss rows of source rows [begin, end).
  template <class Body>
  void for_loss_rows(int64_t begin, int64_t end, Body&& body) {
    for (int64_t j = plan_.sources[begin].begin; j < plan_.sources[end - 1].end; ++j) body(plan_.order[j]);
  }

  // The logits of the strip of source rows [begin, end) in the block that begins with `block`.
  void compute_logits(int64_t block, int64_t begin, int64_t end) {
    backend_.check_interrupted();
    const int64_t at = begin - block, count = end - begin;
    for (int64_t i = begin; i < end; ++i) source_rows_.as<int32_t>()[i - begin] = plan_.sources[i].row;
    const Tensor hidden = gathered_.rows(at, at + count);
    backend_.gather_rows(hidden_, source_rows_.rows(0, count), hidden);
    logits_ = strip_logits_ ? strip_logits_.rows(0, count) : dlogits_.rows(at, at + count);
    backend_.linear(hidden, head_, {}, logits_, false);
  }

  // The log-probabilities and entropies of the strip whose logits were computed last.
  void compute_logprobs(int64_t begin, int64_t end) {
    HWY_DYNAMIC_DISPATCH(rows_statistics)
    (backend_.num_threads(), logits_.as<const float>(), end - begin, head_.outputs, temperature_,
     statistics_.data() + begin);
    for (int64_t i = begin; i < end; ++i) {
      const SourceRow& source = plan_.sources[i];
      const RowStatistics& of = statistics_[i];
      const float* logits = logits_.as<const float>() + (i - begin) * head_.outputs;
      for (int64_t j = source.begin; j < source.end; ++j) {
        const int32_t r = plan_.order[j];
        logprobs_[r] = logprob_at(temperature_.value, logits[targets_[r]], of.max, of.log_sum);
        if (entropies_) entropies_[r] = static_cast<float>(of.entropy);
      }
    }
  }

  // The gradients of the logits of that strip. coefficients and entropy_weights [R]: d loss / d logprob and
  // -d loss / d entropy. Returns whether any is not 0.
  bool compute_gradients(int64_t block, int64_t begin, int64_t end, const float* coefficients,
                         const float* entropy_weights) {
    bool any = false;
    gradients_.assign(static_cast<size_t>(end - begin), {});
    for (int64_t i = begin; i < end; ++i) {
      const SourceRow& source = plan_.sources[i];
      RowGradient& gradient = gradients_[i - begin];
      std::vector<std::pair<int32_t, float>> all;
      double coefficient = 0.0;
      double entropy_weight = 0.0;
      for (int64_t j = source.begin; j < source.end; ++j) {
        const int32_t r = plan_.order[j];
        coefficient += coefficients[r];
        entropy_weight += entropy_weights[r];
        all.emplace_back(targets_[r], coefficients[r] * temperature_.inverse);
        any = any || coefficients[r] != 0.0f || entropy_weights[r] != 0.0f;
      }
      std::stable_sort(all.begin(), all.end(),
                       [](const auto& a, const auto& b) { return a.first < b.first; });
      for (const auto& [target, of_target] : all) {
        if (gradient.targets.empty() || gradient.targets.back().first != target) {
          gradient.targets.emplace_back(target, 0.0f);
        }
        gradient.targets.back().second += of_target;
      }
      gradient.coefficient = static_cast<float>(coefficient / temperature_.value);
      gradient.entropy_weight = static_cast<float>(entropy_weight / temperature_.value);
    }
    HWY_DYNAMIC_DISPATCH(rows_gradient)
    (backend_.num_threads(), logits_.as<const float>(), end - begin, head_.outputs, temperature_,
     statistics_.data() + begin, gradients_.data(), dlogits_.rows(begin - block, end - block));
    return any;
  }

  // Adds what the gradients of the logits of the block of source rows [begin, end) give.
  void backward(int64_t begin, int64_t end, const Tensor& dhidden, const Tensor& dhead) {
    const int64_t count = end - begin;
    const Tensor dlogits = dlogits_.rows(0, count), dhidden_rows = dhidden_block_.rows(0, count);
    backend_.linear_backward_input(dlogits, head_, dhidden_rows, false);
    const size_t bytes = static_cast<size_t>(head_.inputs) * size_of(dhidden.dtype);
    for (int64_t i = begin; i < end; ++i) {
      std::memcpy(dhidden.as<char>() + plan_.sources[i].row * bytes,
                  dhidden_rows.as<const char>() + (i - begin) * bytes, bytes);
    }
    if (dhead) backend_.linear_backward_weight(dlogits, gathered_.rows(0, count), dhead, {});
  }

 private:
  CpuBackend& backend_;
  const Tensor& hidden_;
  const PackedWeight& head_;
  const std::vector<int32_t>& targets_;
  float* logprobs_;
  float* entropies_;
  Temperature temperature_;
  Plan plan_;
  int64_t strip_ = 0, block_ = 0;  // of source rows, at most
  Tensor source_rows_, gathered_, strip_logits_, logits_, dlogits_, dhidden_block_;
  std::vector<RowStatistics> statistics_;
  std::vector<RowGradient> gradients_;
};

}  // namespace

void CpuBackend::head_logprobs(const Tensor& hidden, const PackedWeight& head,
                               const std::vector<int32_t>& rows, const std::vector<int32_t>& targets,
                               const Tensor& logprobs, const Tensor& entropies, float temperature) {
  HeadBlocks blocks(*this, hidden, head, rows, targets, logprobs, entropies, temperature, false);
  blocks.for_strips(0, blocks.sources(), [&](int64_t begin, int64_t end) {
    blocks.compute_logits(begin, begin, end);
    blocks.compute_logprobs(begin, end);
  });
}

double CpuBackend::head_loss(const Tensor& hidden, const PackedWeight& head, const std::vector<int32_t>& rows,
                             const std::vector<int32_t>& targets, const LossRows& loss_rows,
                             const LossOptions& options, const Tensor& logprobs, const Tensor& entropies,
                             const Tensor& dhidden, const Tensor& dhead) {
  const int64_t count = static_cast<int64_t>(rows.size());
  // The loss reads entropies where it has a term of them, wanted as an output or not.
  const Tensor own_entropies = entropies ? entropies : allocate(DType::f32, {count});
  HeadBlocks blocks(*this, hidden, head, rows, targets, logprobs, own_entropies, options.temperature, true);
  zero(dhidden);

  const PolicyLossRows policy_rows = policy_loss_rows(logprobs, own_entropies, loss_rows);
  std::vector<float> entropy_weights(static_cast<size_t>(count));
  for (int64_t r = 0; r < count; ++r) {
    entropy_weights[r] = static_cast<float>(policy_loss_weights(options, policy_rows, r).entropy);
  }

  std::vector<float> coefficients(static_cast<size_t>(count));
  // Calls logits(block, begin, end) for each strip of a block before its gradients are taken.
  const auto backward = [&](auto&& logits) {
    blocks.for_blocks([&](int64_t block, int64_t block_end) {
      bool any = false;
      blocks.for_strips(block, block_end, [&](int64_t begin, int64_t end) {
        logits(block, begin, end);
        any |= blocks.compute_gradients(block, begin, end, coefficients.data(), entropy_weights.data());
      });
      if (any) blocks.backward(block, block_end, dhidden, dhead);
    });
  };

  // The ratio of a sequence takes all of its rows, so gspo's logits are computed twice.
  if (options.kind == LossKind::gspo) {
    blocks.for_strips(0, blocks.sources(), [&](int64_t begin, int64_t end) {
      blocks.compute_logits(begin, begin, end);
      blocks.compute_logprobs(begin, end);
    });
    const Tensor of_logprobs = allocate(DType::f32, {count});
    const double loss = policy_loss(logprobs, own_entropies, loss_rows, options, of_logprobs);
    std::copy_n(of_logprobs.as<const float>(), count, coefficients.data());
    backward([&](int64_t block, int64_t begin, int64_t end) {
      if (blocks.sources() > blocks.strip()) blocks.compute_logits(block, begin, end);
    });
    return loss;
  }

  std::vector<double> losses(static_cast<size_t>(count));
  backward([&](int64_t block, int64_t begin, int64_t end) {
    blocks.compute_logits(block, begin, end);
    blocks.compute_logprobs(begin, end);
    blocks.for_loss_rows(begin, end, [&](int64_t r) {
      const PolicyLossWeights weights = policy_loss_weights(options, policy_rows, r);
      const double log_ratio =
          policy_loss_has_ratio(options, weights) ? policy_loss_log_ratio(policy_rows, r) : 0.0;
      const PolicyLossRow row = policy_loss_row(options, policy_rows, weights, r, log_ratio);
      losses[r] = row.loss;
      coefficients[r] = static_cast<float>(row.from_log_ratio + row.from_logprob);
    });
  });
  return std::accumulate(losses.begin(), losses.end(), 0.0);
}

}  // namespace merf
#endif  // HWY_ONCE
