// The policy loss from given log-probabilities: rows are few, so this is plain float64 arithmetic in row order.
#include "backend/policy_loss_row.h"

#include "backend/cpu/cpu_backend.h"

namespace merf {

double CpuBackend::policy_loss(const Tensor& logprobs, const Tensor& entropies, const LossRows& loss_rows,
                               const LossOptions& options, const Tensor& coefficients) {
  const int64_t count = logprobs.size();
  const PolicyLossRows rows = policy_loss_rows(logprobs, entropies, loss_rows);
  float* coefficient = coefficients.as<float>();

  double loss = 0.0;
  if (options.kind != LossKind::gspo) {
    for (int64_t r = 0; r < count; ++r) {
      const PolicyLossWeights weights = policy_loss_weights(options, rows, r);
      const double log_ratio = policy_loss_has_ratio(options, weights) ? policy_loss_log_ratio(rows, r) : 0.0;
      const PolicyLossRow row = policy_loss_row(options, rows, weights, r, log_ratio);
      loss += row.loss;
      coefficient[r] = static_cast<float>(row.from_log_ratio + row.from_logprob);
    }
    return loss;
  }

  for (int64_t begin = 0, end = 0; begin < count; begin = end) {
    double sum = 0.0;
    int64_t counted = 0;
    for (end = begin; end < count && rows.sequences[end] == rows.sequences[begin]; ++end) {
      if (!policy_loss_has_ratio(options, policy_loss_weights(options, rows, end))) continue;
      sum += policy_loss_log_ratio(rows, end);
      ++counted;
    }
    const double log_ratio = counted == 0 ? 0.0 : sum / static_cast<double>(counted);
    double from_log_ratio = 0.0;
    for (int64_t r = begin; r < end; ++r) {
      from_log_ratio +=
          policy_loss_row(options, rows, policy_loss_weights(options, rows, r), r, log_ratio).from_log_ratio;
    }
    if (counted != 0) from_log_ratio /= static_cast<double>(counted);
    for (int64_t r = begin; r < end; ++r) {
      const PolicyLossWeights weights = policy_loss_weights(options, rows, r);
      const PolicyLossRow row = policy_loss_row(options, rows, weights, r, log_ratio);
      loss += row.loss;
      coefficient[r] = static_cast<float>((policy_loss_has_ratio(options, weights) ? from_log_ratio : 0.0) +
                                          row.from_logprob);
    }
  }
  return loss;
}

}  // namespace merf
