// The loss over a batch's rows: how they are weighted, and the statistics that a trainer watches.
#pragma once

#include <cstdint>
#include <vector>

#include "backend/backend.h"
#include "model/batch.h"

namespace merf {

// The loss over a batch's R rows; see LossOptions and LossRows in backend/backend.h.
struct BatchLoss {
  LossOptions options;
  std::vector<float> weights, advantages;
  // NaN where the model as it is now stands in: the ratio is 1 there.
  std::vector<float> old_logprobs;
  // NaN where a row has none, which a KL term cannot do with.
  std::vector<float> reference_logprobs;
  std::vector<int32_t> sequences;
};

// How the losses of rows become one number; `sequences` are the completions of a batch.
enum class LossAggregation : uint8_t {
  token_mean,     // the sum over all rows by their number                            (DAPO, BNPO, CISPO)
  sequence_mean,  // the mean over a completion's rows, then the mean over completions (GRPO, GSPO)
  constant,       // the sum by completions times `max_tokens`                         (Dr. GRPO)
};

// The weights [R] of rows: sequences [R], rising from 0 by at most 1, says which of the `completions` a row
// belongs to. Completions without rows count, too, and come last. max_tokens is read by `constant` alone.
std::vector<float> loss_weights(LossAggregation aggregation, const std::vector<int32_t>& sequences,
                                int64_t completions, int64_t max_tokens);

// Means are over the rows, without those of weight 0, and taken in float64.
struct LossStatistics {
  int64_t tokens = 0;
  double kl = 0.0;  // the k3 estimate of KL(policy || reference) in nats; 0 where there is no reference
  // Shares of rows whose ratio is clipped so that no gradient flows: below with A < 0, above with A > 0.
  double clip_low_fraction = 0.0;
  double clip_high_fraction = 0.0;
  double clip_fraction() const { return clip_low_fraction + clip_high_fraction; }
  // The importance ratio by row, for gspo by sequence; 1 where the loss has none.
  double ratio_mean = 1.0;
  double ratio_min = 1.0;
  double ratio_max = 1.0;
  double entropy = 0.0;  // of the next-token distribution, in nats
};

LossStatistics loss_statistics(const BatchLoss& loss, const Scores& scores);
// The statistics of a loss that was not finite, at whose first such row the pass over `rows` rows ended: NaN.
LossStatistics unknown_statistics(size_t rows);

}  // namespace merf
