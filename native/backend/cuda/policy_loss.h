// What the head needs of the policy loss: its work enqueued, without the wait for its result.
#pragma once

#include "backend/backend.h"
#include "backend/cuda/gpu.h"

namespace merf::cuda {

// The rows of a loss on the GPU, all [R]; null where the kind does not need them.
struct PolicyLossRows {
  const float* logprobs;
  const float* entropies;
  const float* weights;
  const float* advantages;
  const float* old_logprobs;
  const float* reference_logprobs;
  const int32_t* sequences;
  float* coefficients;  // out: d loss / d logprobs
  double* losses;       // out: each row's share of the loss
};

PolicyLossRows policy_loss_rows(const Tensor& logprobs, const Tensor& entropies, const LossRows& loss_rows,
                                const Tensor& coefficients, double* losses);

// Coefficients and losses of `count` rows: of rows[order[0..count)], or of the first ones where order is null. Every
// kind but gspo, whose rows hang together.
void enqueue_policy_loss(Gpu& gpu, const PolicyLossRows& rows, const LossOptions& options,
                         const int32_t* order, int64_t count);
// Enqueues the loss of gspo, whose `count` rows are all there are.
void enqueue_policy_loss_by_sequence(Gpu& gpu, const PolicyLossRows& rows, const LossOptions& options,
                                     int64_t count);

}  // namespace merf::cuda
