#include "backend/cuda/sum.h"

#include "backend/cuda/launch.h"
#include "backend/cuda/primitives/shared.h"
#include "backend/cuda/primitives/warp.h"

namespace merf::cuda {

namespace {

constexpr int kThreads = 1024;

// Sums `count` values in one block.
__global__ void __launch_bounds__(kThreads) sum_kernel(const double* values, int64_t count, double* sum) {
  SharedMemory shared;
  double* scratch = shared.take<double>(kThreads / kWarp);
  double own = 0.0;
  for (int64_t i = thread_index(); i < count; i += thread_count()) own += values[i];
  own = block_sum(own, scratch);
  if (thread_index() == 0) *sum = own;
}

}  // namespace

void enqueue_sum(Gpu& gpu, const double* values, int64_t count, double* sum) {
  const int threads = count > 1024 ? kThreads : 128;
  launch(gpu, "sum", sum_kernel, {blocks(1), threads, shared_bytes<double>(kThreads / kWarp)}, values, count,
         sum);
}

}  // namespace merf::cuda
