// Attention of bfloat16 heads of up to 128 on GPUs of compute capability 9.0, by products of warpgroups (wgmma.h). Each
// function gives false, and has done nothing, where the kernels for every GPU have to do the work.
#pragma once

#include "backend/cuda/attention_plan.h"
#include "backend/cuda/cuda_backend.h"

namespace merf::cuda {

// Whether this GPU has compute capability 9.0 and its shared memory, of which an emulated one may have been
// given less, and the heads are bfloat16 of size 128 at most.
inline bool attention_fits_hopper(CudaBackend& backend, const HeadsView& q) {
  const GpuProperties& gpu = backend.gpu().properties();
  return gpu.major == 9 && gpu.minor == 0 && gpu.shared_bytes >= size_t{227} << 10 &&
         q.dtype == DType::bf16 && q.head_size <= 128;
}

// What CudaBackend::attention does.
bool attention_on_hopper(CudaBackend& backend, AttentionPlan& plan, const HeadsView& q, const HeadsView& k,
                         const HeadsView& v, float scale, const HeadsView& out, const Tensor& lse);

struct AttentionGradients {
  HeadsView q, k, v, dout;  // read
  HeadsView dq, dk, dv;     // written
};
// The passes over keys and over queries. lse2, delta [q_heads, padded]: what attention_delta_kernel makes.
bool attention_backward_on_hopper(CudaBackend& backend, AttentionPlan& plan, const AttentionGradients& views,
                                  const float* lse2, const float* delta, float scale);

// Adds what blocks of threads left of tiles of keys in pieces, partial [slots, kv_heads, 2 (dk, dv), key tokens, kHead],
// and writes it as bfloat16. kHead is 64 or 128.
void add_attention_pieces(CudaBackend& backend, const AttentionSchedule& schedule, const Tensor& partial,
                          const HeadsView& dk, const HeadsView& dv);

}  // namespace merf::cuda
