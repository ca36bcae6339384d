#include "model/batch_loss.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace merf {

std::vector<float> loss_weights(LossAggregation aggregation, const std::vector<int32_t>& sequences,
                                const LossNormalizer& normalizer, int64_t max_tokens) {
  const auto [all, tokens] = normalizer;
  if (aggregation != LossAggregation::sequence_mean) {
    const double divisor =
        aggregation == LossAggregation::constant ? all * static_cast<double>(max_tokens) : tokens;
    return std::vector<float>(sequences.size(), static_cast<float>(1.0 / divisor));
  }
  std::vector<int64_t> lengths(sequences.size(), 0);  // no sequence has a higher number
  for (const int32_t sequence : sequences) ++lengths[static_cast<size_t>(sequence)];
  std::vector<float> weights;
  weights.reserve(sequences.size());
  for (const int32_t sequence : sequences) {
    const double length = static_cast<double>(lengths[static_cast<size_t>(sequence)]);
    weights.push_back(static_cast<float>(1.0 / (all * length)));
  }
  return weights;
}

LossStatistics loss_statistics(const BatchLoss& loss, const Scores& scores) {
  const bool has_ratio = loss.options.kind != LossKind::cross_entropy;
  const bool by_sequence = loss.options.kind == LossKind::gspo;
  const double low = 1.0 - static_cast<double>(loss.options.clip_low);
  const double high = 1.0 + static_cast<double>(loss.options.clip_high);
  const size_t rows = scores.logprobs.size();
  const auto logprob = [&](size_t r) { return static_cast<double>(scores.logprobs[r]); };
  const auto kl_weight = [&](size_t r) {
    return (loss.kl_weights.empty() ? loss.weights : loss.kl_weights)[r];
  };
  const auto entropy_weight = [&](size_t r) {
    return (loss.entropy_weights.empty() ? loss.weights : loss.entropy_weights)[r];
  };
  const auto penalized = [&](size_t r) {
    return !loss.reference_logprobs.empty() && !std::isnan(loss.reference_logprobs[r]) &&
           kl_weight(r) != 0.0f;
  };
  const auto with_ratio = [&](size_t r) {
    return has_ratio && (loss.weights[r] != 0.0f || (loss.options.kl_ratio && penalized(r)));
  };
  const auto log_ratio = [&](size_t r) {
    const float old = loss.old_logprobs[r];
    return std::isnan(old) ? 0.0 : logprob(r) - static_cast<double>(old);
  };

  LossStatistics statistics;
  int64_t ratios = 0, penalties = 0;
  double clipped_low = 0.0, clipped_high = 0.0, kl = 0.0, entropy = 0.0, ratio_sum = 0.0;
  double least = std::numeric_limits<double>::infinity(), most = -least;
  for (size_t begin = 0, end = 0; begin < rows; begin = end) {
    // Rows [begin, end) share a ratio.
    end = begin + 1;
    while (by_sequence && end < rows && loss.sequences[end] == loss.sequences[begin]) ++end;
    double sum = 0.0, own_kl = 0.0;
    int64_t length = 0;
    for (size_t r = begin; r < end; ++r) {
      if (loss.weights[r] == 0.0f && kl_weight(r) == 0.0f && entropy_weight(r) == 0.0f) continue;
      ++statistics.tokens;
      entropy += static_cast<double>(scores.entropies[r]);
      if (with_ratio(r)) {
        ++length;
        sum += log_ratio(r);
      }
      if (!penalized(r)) continue;
      const double difference = static_cast<double>(loss.reference_logprobs[r]) - logprob(r);
      own_kl += std::exp(difference) - difference - 1.0;
      ++penalties;
    }
    const double ratio = length == 0 ? 1.0 : std::exp(sum / static_cast<double>(length));
    kl += loss.options.kl_ratio ? ratio * own_kl : own_kl;
    if (length == 0) continue;
    ratio_sum += ratio;
    ++ratios;
    least = std::min(least, ratio);
    most = std::max(most, ratio);
    int64_t below = 0, above = 0;
    for (size_t r = begin; r < end; ++r) {
      if (!with_ratio(r)) continue;
      below += loss.options.kind != LossKind::cispo && ratio < low && loss.advantages[r] < 0.0f;
      above += ratio > high && loss.advantages[r] > 0.0f;
    }
    clipped_low += static_cast<double>(below) / static_cast<double>(length);
    clipped_high += static_cast<double>(above) / static_cast<double>(length);
  }
  if (statistics.tokens == 0) return statistics;
  statistics.entropy = entropy / static_cast<double>(statistics.tokens);
  if (penalties > 0) statistics.kl = kl / static_cast<double>(penalties);
  if (ratios > 0) {
    const double all = static_cast<double>(ratios);
    statistics.clip_low_fraction = clipped_low / all;
    statistics.clip_high_fraction = clipped_high / all;
    statistics.ratio_mean = ratio_sum / all;
    statistics.ratio_min = least;
    statistics.ratio_max = most;
  }
  return statistics;
}

LossStatistics unknown_statistics(size_t rows) {
  const double none = std::numeric_limits<double>::quiet_NaN();
  return {static_cast<int64_t>(rows), none, none, none, none, none, none, none};
}

}  // namespace merf
