// The policy loss from given log-probabilities, in float64 by the formulas that all devices share. Losses are kept by
// row and added in a fixed order afterwards. gspo's ratio belongs to a sequence: a warp goes over its rows three times,
// for the mean log ratio, for the gradient that flows through it, and for what each row gets.
#include "backend/cuda/policy_loss.h"

#include "backend/cuda/cuda_backend.h"
#include "backend/cuda/launch.h"
#include "backend/cuda/primitives/warp.h"
#include "backend/cuda/sum.h"
#include "backend/policy_loss_row.h"

namespace merf::cuda {

namespace {

constexpr int kThreads = 256;

// order [count] or null.
__global__ void __launch_bounds__(kThreads)
    policy_loss_kernel(PolicyLossRows rows, PolicyLossOutputs outputs, LossOptions options,
                       const int32_t* order, int64_t count) {
  const int64_t i = grid_index();
  if (i >= count) return;
  const int64_t r = order == nullptr ? i : order[i];
  const PolicyLossWeights weights = policy_loss_weights(options, rows, r);
  const double log_ratio = policy_loss_has_ratio(options, weights) ? policy_loss_log_ratio(rows, r) : 0.0;
  const PolicyLossRow row = policy_loss_row(options, rows, weights, r, log_ratio);
  outputs.losses[r] = row.loss;
  outputs.coefficients[r] = static_cast<float>(row.from_log_ratio + row.from_logprob);
}

// Calls body(r) in the lane that has row r of the sequence which begins at `begin`; whole warps call it.
template <typename Body>
__device__ inline void for_rows_of_sequence(const int32_t* sequences, int64_t begin, int64_t count,
                                            Body&& body) {
  const int32_t sequence = sequences[begin];
  bool more = true;
  for (int64_t r = begin + lane_index(); more; r += kWarp) {
    const bool inside = r < count && sequences[r] == sequence;
    if (inside) body(r);
    more = ballot(inside) == 0xffffffffu;
  }
}

// A warp looks at 32 rows and goes over the sequences that begin among them, wherever they end.
__global__ void __launch_bounds__(kThreads)
    policy_loss_by_sequence_kernel(PolicyLossRows rows, PolicyLossOutputs outputs, LossOptions options,
                                   int64_t count) {
  const int64_t first = grid_index() / kWarp * kWarp;
  const int64_t own = first + lane_index();
  uint32_t begins = ballot(own < count && (own == 0 || rows.sequences[own] != rows.sequences[own - 1]));
  for (int at = 0; begins != 0; ++at, begins >>= 1) {
    if ((begins & 1u) == 0) continue;
    const int64_t begin = first + at;
    double sum = 0.0, counted = 0.0;
    for_rows_of_sequence(rows.sequences, begin, count, [&](int64_t r) {
      if (!policy_loss_has_ratio(options, policy_loss_weights(options, rows, r))) return;
      sum += policy_loss_log_ratio(rows, r);
      counted += 1.0;
    });
    sum = warp_sum(sum);
    counted = warp_sum(counted);
    const double log_ratio = counted == 0.0 ? 0.0 : sum / counted;
    double from_log_ratio = 0.0;
    for_rows_of_sequence(rows.sequences, begin, count, [&](int64_t r) {
      from_log_ratio +=
          policy_loss_row(options, rows, policy_loss_weights(options, rows, r), r, log_ratio).from_log_ratio;
    });
    from_log_ratio = warp_sum(from_log_ratio);
    if (counted != 0.0) from_log_ratio /= counted;
    for_rows_of_sequence(rows.sequences, begin, count, [&](int64_t r) {
      const PolicyLossWeights weights = policy_loss_weights(options, rows, r);
      const PolicyLossRow row = policy_loss_row(options, rows, weights, r, log_ratio);
      outputs.losses[r] = row.loss;
      outputs.coefficients[r] = static_cast<float>(
          (policy_loss_has_ratio(options, weights) ? from_log_ratio : 0.0) + row.from_logprob);
    });
  }
}

}  // namespace

void enqueue_policy_loss(Gpu& gpu, const PolicyLossRows& rows, const PolicyLossOutputs& outputs,
                         const LossOptions& options, const int32_t* order, int64_t count) {
  launch(gpu, "policy_loss", policy_loss_kernel, {blocks(divide_up(count, kThreads)), kThreads}, rows,
         outputs, options, order, count);
}

void enqueue_policy_loss_by_sequence(Gpu& gpu, const PolicyLossRows& rows, const PolicyLossOutputs& outputs,
                                     const LossOptions& options, int64_t count) {
  launch(gpu, "policy_loss_by_sequence", policy_loss_by_sequence_kernel,
         {blocks(divide_up(count, kThreads)), kThreads}, rows, outputs, options, count);
}

double CudaBackend::policy_loss(const Tensor& logprobs, const Tensor& entropies, const LossRows& loss_rows,
                                const LossOptions& options, const Tensor& coefficients) {
  const int64_t count = logprobs.size();
  if (count == 0) return 0.0;
  // Float64, for which tensors have no type: the rows' losses and their sum.
  const Tensor losses = allocate(DType::i32, {count + 1, 2});
  double* sum = losses.as<double>() + count;
  const PolicyLossRows rows = policy_loss_rows(logprobs, entropies, loss_rows);
  const PolicyLossOutputs outputs{coefficients.as<float>(), losses.as<double>()};
  if (options.kind == LossKind::gspo) {
    enqueue_policy_loss_by_sequence(gpu(), rows, outputs, options, count);
  } else {
    enqueue_policy_loss(gpu(), rows, outputs, options, nullptr, count);
  }
  enqueue_sum(gpu(), losses.as<const double>(), count, sum);
  double loss = 0.0;
  download(&loss, losses.rows(count, count + 1), sizeof(loss));
  return loss;
}

}  // namespace merf::cuda
