// What the head needs of the policy loss: its work enqueued, without the wait for its result.
#pragma once

#include "backend/backend.h"
#include "backend/cuda/gpu.h"
#include "backend/policy_loss_row.h"

namespace merf::cuda {

// What becomes of the rows of a loss, both [R].
struct PolicyLossOutputs {
  float* coefficients;  // d loss / d logprobs
  double* losses;       // each row's share of the loss
};

// Coefficients and losses of `count` rows: of rows[order[0..count)], or of the first ones where order is null. Every
// kind but gspo, whose rows hang together.
void enqueue_policy_loss(Gpu& gpu, const PolicyLossRows& rows, const PolicyLossOutputs& outputs,
                         const LossOptions& options, const int32_t* order, int64_t count);
// Enqueues the loss of gspo, whose `count` rows are all there are.
void enqueue_policy_loss_by_sequence(Gpu& gpu, const PolicyLossRows& rows, const PolicyLossOutputs& outputs,
                                     const LossOptions& options, int64_t count);

}  // namespace merf::cuda
