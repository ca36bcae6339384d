// Weights as the CUDA device keeps them, for the operators that multiply by them.
#pragma once

#include "backend/backend.h"

namespace merf::cuda {

// A copy of the weight as it is: the products read rows and columns alike.
struct CudaPackedWeight final : PackedWeight {
  Tensor values;  // [N, K]

  // The outputs [begin, end) as a weight of their own, sharing the values.
  CudaPackedWeight outputs_between(int64_t begin, int64_t end) const {
    CudaPackedWeight part;
    part.outputs = end - begin;
    part.inputs = inputs;
    part.dtype = dtype;
    part.values = values.rows(begin, end);
    return part;
  }
};

}  // namespace merf::cuda
