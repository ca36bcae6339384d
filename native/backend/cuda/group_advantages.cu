// Advantages from rewards, in float64: a warp a group.
#include "backend/cuda/cuda_backend.h"
#include "backend/cuda/launch.h"
#include "backend/cuda/primitives/math.h"
#include "backend/cuda/primitives/shared.h"
#include "backend/cuda/primitives/warp.h"

namespace merf::cuda {

namespace {

constexpr int kThreads = 128;
constexpr int kBatchThreads = 512;

// One block. divisor: the sample standard deviation of rewards [count], plus epsilon.
__global__ void __launch_bounds__(kBatchThreads)
    batch_divisor_kernel(const float* rewards, int64_t count, double epsilon, double* divisor) {
  SharedMemory shared;
  double* scratch = shared.take<double>(kBatchThreads / kWarp);
  double sum = 0.0;
  for (int64_t i = thread_index(); i < count; i += thread_count()) sum += rewards[i];
  const double mean = block_sum(sum, scratch) / static_cast<double>(count);
  double squares = 0.0;
  for (int64_t i = thread_index(); i < count; i += thread_count()) {
    const double centred = rewards[i] - mean;
    squares += centred * centred;
  }
  squares = block_sum(squares, scratch);
  if (thread_index() == 0)
    *divisor = (count > 1 ? sqrt(squares / static_cast<double>(count - 1)) : 0.0) + epsilon;
}

// offsets [groups + 1]; divisor: of the whole batch, or null.
__global__ void __launch_bounds__(kThreads)
    group_advantages_kernel(const float* rewards, const int64_t* offsets, int64_t groups,
                            Backend::AdvantageKind kind, bool scale, double epsilon, const double* divisor,
                            float* advantages) {
  const int64_t group = grid_index() / kWarp;
  if (group >= groups) return;
  const int64_t begin = offsets[group], end = offsets[group + 1];
  const double count = static_cast<double>(end - begin);
  if (end - begin < 2) {
    if (begin < end && lane_index() == 0) advantages[begin] = 0.0f;
    return;
  }
  double sum = 0.0;
  for (int64_t i = begin + lane_index(); i < end; i += kWarp) sum += rewards[i];
  const double mean = warp_sum(sum) / count;
  double factor = 1.0;
  switch (kind) {
    case Backend::AdvantageKind::group:
      if (scale) {
        double squares = 0.0;
        for (int64_t i = begin + lane_index(); i < end; i += kWarp) {
          const double centred = rewards[i] - mean;
          squares += centred * centred;
        }
        factor = 1.0 / (sqrt(warp_sum(squares) / (count - 1.0)) + epsilon);
      }
      break;
    case Backend::AdvantageKind::batch:
      if (divisor != nullptr) factor = 1.0 / *divisor;
      break;
    case Backend::AdvantageKind::leave_one_out:
      // r - (sum - r) / (n - 1) = (r - mean) * n / (n - 1)
      factor = count / (count - 1.0);
      break;
  }
  for (int64_t i = begin + lane_index(); i < end; i += kWarp) {
    const double centred = rewards[i] - mean;
    // A group of equal rewards has no direction to push, and with epsilon 0 its factor is infinite.
    advantages[i] = centred == 0.0 ? 0.0f : static_cast<float>(centred * factor);
  }
}

}  // namespace

void CudaBackend::group_advantages(const Tensor& rewards, const std::vector<int64_t>& group_offsets,
                                   AdvantageKind kind, bool scale, float epsilon, const Tensor& advantages) {
  const int64_t rows = rewards.size();
  const int64_t groups = static_cast<int64_t>(group_offsets.size()) - 1;
  if (rows == 0 || groups < 1) return;
  // 64 bits an element, for which tensors have no type.
  const Tensor offsets = allocate(DType::i32, {groups + 1, 2});
  upload(offsets, group_offsets.data(), offsets.bytes());
  Tensor divisor;
  if (kind == AdvantageKind::batch && scale) {
    divisor = allocate(DType::i32, {2});
    launch(gpu(), "batch_divisor", batch_divisor_kernel,
           {blocks(1), kBatchThreads, shared_bytes<double>(kBatchThreads / kWarp)}, rewards.as<const float>(),
           rows, epsilon, divisor.as<double>());
  }
  launch(gpu(), "group_advantages", group_advantages_kernel,
         {blocks(divide_up(groups, kThreads / kWarp)), kThreads}, rewards.as<const float>(),
         offsets.as<const int64_t>(), groups, kind, scale, epsilon, divisor.as<const double>(),
         advantages.as<float>());
}

}  // namespace merf::cuda
