// Advantages from rewards, in float64.
#include <cmath>

#include "backend/cpu/cpu_backend.h"

namespace merf {

namespace {

struct Moments {
  double mean;
  double standard_deviation;  // of the sample (n - 1); 0 where n < 2
};

Moments moments_of(const float* values, int64_t begin, int64_t end) {
  const double n = static_cast<double>(end - begin);
  double sum = 0.0;
  for (int64_t i = begin; i < end; ++i) sum += values[i];
  const double mean = sum / n;
  double squares = 0.0;
  for (int64_t i = begin; i < end; ++i) squares += (values[i] - mean) * (values[i] - mean);
  return {mean, end - begin > 1 ? std::sqrt(squares / (n - 1.0)) : 0.0};
}

}  // namespace

void CpuBackend::group_advantages(const Tensor& rewards, const std::vector<int64_t>& group_offsets,
                                  AdvantageKind kind, bool scale, float epsilon, const Tensor& advantages) {
  const float* reward = rewards.as<float>();
  float* advantage = advantages.as<float>();
  const int64_t rows = rewards.size();
  const double batch_divisor =
      kind == AdvantageKind::batch && scale && rows > 0
          ? moments_of(reward, 0, rows).standard_deviation + static_cast<double>(epsilon)
          : 1.0;

  for (size_t g = 0; g + 1 < group_offsets.size(); ++g) {
    const int64_t begin = group_offsets[g], end = group_offsets[g + 1];
    const int64_t count = end - begin;
    if (count == 1) advantage[begin] = 0.0f;
    if (count < 2) continue;
    const Moments group = moments_of(reward, begin, end);
    double factor = 1.0;
    switch (kind) {
      case AdvantageKind::group:
        if (scale) factor = 1.0 / (group.standard_deviation + static_cast<double>(epsilon));
        break;
      case AdvantageKind::batch:
        factor = 1.0 / batch_divisor;
        break;
      case AdvantageKind::leave_one_out:
        // r - (sum - r) / (n - 1) = (r - mean) * n / (n - 1)
        factor = static_cast<double>(count) / static_cast<double>(count - 1);
        break;
    }
    for (int64_t i = begin; i < end; ++i) {
      const double centred = reward[i] - group.mean;
      // A group of equal rewards has no direction to push, and with epsilon 0 its factor is infinite.
      advantage[i] = centred == 0.0 ? 0.0f : static_cast<float>(centred * factor);
    }
  }
}

}  // namespace merf
