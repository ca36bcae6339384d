// Attention of bfloat16 heads of up to 128 on GPUs of compute capability 9.0, by products of warpgroups (wgmma.h).
#pragma once

#include "backend/cuda/attention_plan.h"
#include "backend/cuda/cuda_backend.h"

namespace merf::cuda {

// What CudaBackend::attention does; false where the kernels for every GPU have to.
bool attention_on_hopper(CudaBackend& backend, AttentionPlan& plan, const HeadsView& q, const HeadsView& k,
                         const HeadsView& v, float scale, const HeadsView& out, const Tensor& lse);

}  // namespace merf::cuda
