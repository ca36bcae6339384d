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
  std::vector<float> kl_weights, entropy_weights;
};

// How the losses of rows become one number; `sequences` are the completions of a batch.
enum class LossAggregation : uint8_t {
  token_mean,     // the sum over all rows by their number                            (DAPO, BNPO, CISPO)
  sequence_mean,  // the mean over a completion's rows, then the mean over completions (GRPO, GSPO)
  constant,       // the sum by completions times `max_tokens`                         (Dr. GRPO)
};

// What sums are divided by. A batch that is a part of a larger one, or that was left something out of, is divided by
// what the whole has.
struct LossNormalizer {
  double completions = 1.0;
  double tokens = 1.0;
};

// The weights [R] of rows: sequences [R], rising from 0 by at most 1, says which completion a row belongs to. max_tokens
// is read by `constant` alone.
std::vector<float> loss_weights(LossAggregation aggregation, const std::vector<int32_t>& sequences,
                                const LossNormalizer& normalizer, int64_t max_tokens);

// Means are over the rows, without those whose weights are all 0, and taken in float64.
struct LossStatistics {
  int64_t tokens = 0;
  // The k3 estimate of KL(policy || reference) in nats, over the rows that have a reference and a weight for it, times
  // their ratios under kl_ratio; 0 where there are none.
  double kl = 0.0;
  // Shares of the ratios, by row and for gspo by sequence, that are clipped so that no gradient flows: below with A < 0,
  // above with A > 0.
  double clip_low_fraction = 0.0;
  double clip_high_fraction = 0.0;
  double clip_fraction() const { return clip_low_fraction + clip_high_fraction; }
  // The importance ratio by row of a weight other than 0, for gspo by sequence; 1 where the loss has none.
  double ratio_mean = 1.0;
  double ratio_min = 1.0;
  double ratio_max = 1.0;
  double entropy = 0.0;  // of the next-token distribution, in nats
};

LossStatistics loss_statistics(const BatchLoss& loss, const Scores& scores);
// The statistics of a loss that was not finite, at whose first such row the pass over `rows` rows ended: NaN.
LossStatistics unknown_statistics(size_t rows);

}  // namespace merf
