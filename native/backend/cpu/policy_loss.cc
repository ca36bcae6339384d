// The policy loss from given log-probabilities: rows are few, so this is plain float64 arithmetic in row order.
#include "backend/policy_loss_row.h"

#include "backend/cpu/cpu_backend.h"

namespace merf {

// Rows of weight 0 are not looked at: they may hold anything, and gspo's mean over a sequence leaves them out, as
// TRL's masked mean does.
double CpuBackend::policy_loss(const Tensor& logprobs, const Tensor& entropies, const LossRows& loss_rows,
                               const LossOptions& options, const Tensor& coefficients) {
  const int64_t rows = logprobs.size();
  const float* logprob = logprobs.as<float>();
  const float* weight = loss_rows.weights.as<float>();
  const float* advantage = loss_rows.advantages.as<float>();
  const float* old_logprob = loss_rows.old_logprobs.as<float>();
  const float* reference = loss_rows.reference_logprobs.as<float>();
  const int32_t* sequence = loss_rows.sequences.as<int32_t>();
  const float* entropy = entropies.as<float>();
  float* coefficient = coefficients.as<float>();
  const bool has_ratio = options.kind != LossKind::cross_entropy;

  const auto log_ratio_of = [&](int64_t r) {
    return has_ratio ? static_cast<double>(logprob[r]) - static_cast<double>(old_logprob[r]) : 0.0;
  };
  const auto loss_of = [&](int64_t r, double log_ratio) {
    return policy_loss_row(options, weight[r], logprob[r], log_ratio, has_ratio ? advantage[r] : 0.0f,
                           reference ? reference + r : nullptr, entropy ? entropy[r] : 0.0f);
  };

  double loss = 0.0;
  if (options.kind != LossKind::gspo) {
    for (int64_t r = 0; r < rows; ++r) {
      coefficient[r] = 0.0f;
      if (weight[r] == 0.0f) continue;
      const PolicyLossRow row = loss_of(r, log_ratio_of(r));
      loss += row.loss;
      coefficient[r] = static_cast<float>(row.from_log_ratio + row.from_logprob);
    }
    return loss;
  }

  for (int64_t begin = 0, end = 0; begin < rows; begin = end) {
    double sum = 0.0;
    int64_t counted = 0;
    for (end = begin; end < rows && sequence[end] == sequence[begin]; ++end) {
      coefficient[end] = 0.0f;
      if (weight[end] == 0.0f) continue;
      sum += log_ratio_of(end);
      ++counted;
    }
    if (counted == 0) continue;
    const double log_ratio = sum / static_cast<double>(counted);
    double from_log_ratio = 0.0;
    for (int64_t r = begin; r < end; ++r) {
      if (weight[r] != 0.0f) from_log_ratio += loss_of(r, log_ratio).from_log_ratio;
    }
    from_log_ratio /= static_cast<double>(counted);
    for (int64_t r = begin; r < end; ++r) {
      if (weight[r] == 0.0f) continue;
      const PolicyLossRow row = loss_of(r, log_ratio);
      loss += row.loss;
      coefficient[r] = static_cast<float>(from_log_ratio + row.from_logprob);
    }
  }
  return loss;
}

}  // namespace merf
