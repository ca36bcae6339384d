// One row of the policy loss and its derivatives, shared by all devices; the formulas stand at LossOptions in
// backend.h.
#pragma once

#include <cmath>

#include "backend/backend.h"
#include "backend/host_device.h"

namespace merf {

// The rows of a loss where a device can read them, all [R]; null where the kind does not need them.
struct PolicyLossRows {
  const float* logprobs;
  const float* entropies;
  const float* weights;
  const float* kl_weights;
  const float* entropy_weights;
  const float* advantages;
  const float* old_logprobs;
  const float* reference_logprobs;
  const int32_t* sequences;
};

inline PolicyLossRows policy_loss_rows(const Tensor& logprobs, const Tensor& entropies,
                                       const LossRows& loss_rows) {
  const float* const weights = loss_rows.weights.as<const float>();
  return {logprobs.as<const float>(),
          entropies.as<const float>(),
          weights,
          loss_rows.kl_weights ? loss_rows.kl_weights.as<const float>() : weights,
          loss_rows.entropy_weights ? loss_rows.entropy_weights.as<const float>() : weights,
          loss_rows.advantages.as<const float>(),
          loss_rows.old_logprobs.as<const float>(),
          loss_rows.reference_logprobs.as<const float>(),
          loss_rows.sequences.as<const int32_t>()};
}

// What the terms of a row are multiplied by, coefficients included.
struct PolicyLossWeights {
  double policy, kl, entropy;
};

MERF_HOST_DEVICE inline PolicyLossWeights policy_loss_weights(const LossOptions& options,
                                                              const PolicyLossRows& rows, int64_t r) {
  return {rows.weights[r],
          rows.reference_logprobs == nullptr
              ? 0.0
              : static_cast<double>(options.kl_coefficient) * static_cast<double>(rows.kl_weights[r]),
          static_cast<double>(options.entropy_coefficient) * static_cast<double>(rows.entropy_weights[r])};
}

// Whether anything of a row's loss is made of its ratio. Where it is not, its old log-probability may be anything, and
// under gspo it is left out of the mean over its sequence, as TRL's masked mean does.
MERF_HOST_DEVICE inline bool policy_loss_has_ratio(const LossOptions& options,
                                                   const PolicyLossWeights& weights) {
  return options.kind != LossKind::cross_entropy &&
         (weights.policy != 0.0 || (options.kl_ratio && weights.kl != 0.0));
}

// Where a row has no old log-probability its own stands in: the ratio is 1, and carries gradient.
MERF_HOST_DEVICE inline double policy_loss_log_ratio(const PolicyLossRows& rows, int64_t r) {
  const double logprob = rows.logprobs[r], old = rows.old_logprobs[r];
  return logprob - (old == old ? old : logprob);
}

struct PolicyLossRow {
  double loss;            // of the row, weighted
  double from_log_ratio;  // d loss / d log ratio, 0 for kinds without a ratio that carries gradient
  double from_logprob;    // d loss / d logprob beside the path through the log ratio
};

// log_ratio is the row's own logprob - old_logprob, or for gspo the mean of it over the sequence; it is read only where
// the row has a ratio. The derivative of a clipped ratio is that of PyTorch's clamp and min: bounds are inside, and
// nothing flows through the clipped side.
MERF_HOST_DEVICE inline PolicyLossRow policy_loss_row(const LossOptions& options, const PolicyLossRows& rows,
                                                      const PolicyLossWeights& weights, int64_t r,
                                                      double log_ratio) {
  const double logprob = rows.logprobs[r];
  PolicyLossRow row{0, 0, 0};
  if (weights.entropy != 0.0) row.loss = -weights.entropy * static_cast<double>(rows.entropies[r]);
  const double ratio = policy_loss_has_ratio(options, weights) ? std::exp(log_ratio) : 1.0;
  if (weights.kl != 0.0) {
    const double difference = static_cast<double>(rows.reference_logprobs[r]) - logprob;
    const double reference_ratio = std::exp(difference);
    const double weight = options.kl_ratio ? weights.kl * ratio : weights.kl;
    const double penalty = weight * (reference_ratio - difference - 1.0);
    row.loss += penalty;
    row.from_logprob = weight * (1.0 - reference_ratio);
    if (options.kl_ratio) row.from_log_ratio = penalty;
  }
  if (weights.policy == 0.0) return row;
  switch (options.kind) {
    case LossKind::policy_gradient_clip:
    case LossKind::gspo: {
      const double advantage = rows.advantages[r], gain = weights.policy * advantage;
      const double low = 1.0 - static_cast<double>(options.clip_low);
      const double high = 1.0 + static_cast<double>(options.clip_high);
      if (advantage > 0 && ratio > high) {
        row.loss -= high * gain;
      } else if (advantage < 0 && ratio < low) {
        row.loss -= low * gain;
      } else {
        row.loss -= ratio * gain;
        row.from_log_ratio -= ratio * gain;
      }
      break;
    }
    case LossKind::cispo: {
      const double high = 1.0 + static_cast<double>(options.clip_high);
      const double factor =
          weights.policy * (ratio > high ? high : ratio) * static_cast<double>(rows.advantages[r]);
      row.loss -= factor * logprob;
      row.from_logprob -= factor;
      break;
    }
    case LossKind::cross_entropy:
      row.loss -= weights.policy * logprob;
      row.from_logprob -= weights.policy;
      break;
  }
  return row;
}

}  // namespace merf
