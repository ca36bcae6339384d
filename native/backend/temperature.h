// How a temperature enters softmax(logits / temperature), shared by what draws tokens and what scores and trains on
// them: the same logits give the same log-probability in each, and temperature 1 what there is without one.
#pragma once

#include <algorithm>
#include <limits>

#include "backend/host_device.h"

namespace merf {

// The weight of logit x is 2^((x - max) * factor).
struct Temperature {
  double value;
  float factor;   // log2(e) / value, at most the largest float
  float inverse;  // 1 / value
};

// Greedy draws, whose temperature is 0, have the log-probabilities of temperature 1.
inline Temperature temperature_of(float given) {
  constexpr double kLog2e = 1.44269504088896340736;
  const double value = given > 0.0f ? static_cast<double>(given) : 1.0;
  constexpr double most = std::numeric_limits<float>::max();
  return {value, static_cast<float>(std::min(kLog2e / value, most)),
          static_cast<float>(std::min(1.0 / value, most))};
}

// The log-probability of a logit by how far it is from the greatest, `log_mass` being the logarithm of the weights' sum.
MERF_HOST_DEVICE inline float logprob_at(double temperature, float logit, float max, double log_mass) {
  return static_cast<float>((static_cast<double>(logit) - static_cast<double>(max)) / temperature - log_mass);
}

}  // namespace merf
