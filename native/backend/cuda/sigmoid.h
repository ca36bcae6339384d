// The gate of SwiGLU, as every kernel that has one computes it, to the same bits.
#pragma once

#include "backend/cuda/primitives/math.h"

namespace merf::cuda {

__device__ inline float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

}  // namespace merf::cuda
