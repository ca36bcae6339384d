// One row of the policy loss and its derivatives, shared by all devices; the formulas stand at LossOptions in
// backend.h.
#pragma once

#include <cmath>

#include "backend/backend.h"
#include "backend/host_device.h"

namespace merf {

struct PolicyLossRow {
  double loss;            // of the row, times its weight
  double from_log_ratio;  // d loss / d log ratio, 0 for kinds without a ratio that carries gradient
  double from_logprob;    // d loss / d logprob beside the path through the log ratio
};

// log_ratio is the row's own logprob - old_logprob, or for gspo the mean of it over the sequence. The derivative of
// a clipped ratio is that of PyTorch's clamp and min: bounds are inside, and nothing flows through the clipped side.
// `reference` is null where there is no KL term. `entropy` is read only where its coefficient is not 0.
MERF_HOST_DEVICE inline PolicyLossRow policy_loss_row(const LossOptions& options, double weight,
                                                      double logprob, double log_ratio, double advantage,
                                                      const float* reference, double entropy) {
  PolicyLossRow row{0, 0, 0};
  switch (options.kind) {
    case LossKind::policy_gradient_clip:
    case LossKind::gspo: {
      const double ratio = std::exp(log_ratio);
      const double low = 1.0 - static_cast<double>(options.clip_low);
      const double high = 1.0 + static_cast<double>(options.clip_high);
      const double clipped = ratio < low ? low : (ratio > high ? high : ratio);
      const bool stopped = (advantage > 0 && ratio > high) || (advantage < 0 && ratio < low);
      row.loss = -(stopped ? clipped : ratio) * advantage;
      row.from_log_ratio = stopped ? 0.0 : -ratio * advantage;
      break;
    }
    case LossKind::cispo: {
      const double ratio = std::exp(log_ratio);
      const double high = 1.0 + static_cast<double>(options.clip_high);
      const double factor = (ratio > high ? high : ratio) * advantage;
      row.loss = -factor * logprob;
      row.from_logprob = -factor;
      break;
    }
    case LossKind::cross_entropy:
      row.loss = -logprob;
      row.from_logprob = -1.0;
      break;
  }
  if (reference != nullptr && options.kl_coefficient != 0.0f) {
    const double difference = static_cast<double>(*reference) - logprob;
    const double ratio = std::exp(difference);
    row.loss += options.kl_coefficient * (ratio - difference - 1.0);
    row.from_logprob += options.kl_coefficient * (1.0 - ratio);
  }
  if (options.entropy_coefficient != 0.0f) row.loss -= options.entropy_coefficient * entropy;
  row.loss *= weight;
  row.from_log_ratio *= weight;
  row.from_logprob *= weight;
  return row;
}

}  // namespace merf
