// The last step of the sums that come out as one number.
#pragma once

#include <cstdint>

#include "backend/cuda/gpu.h"

namespace merf::cuda {

// *sum = the sum of values[0..count), in a fixed order.
void enqueue_sum(Gpu& gpu, const double* values, int64_t count, double* sum);

}  // namespace merf::cuda
