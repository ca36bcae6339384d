// The projections of a layer, composed of the operators that every device has.
#include "backend/backend.h"

namespace merf {

namespace {

void project(Backend& backend, const Tensor& x, const AdaptedWeight& weight, const Tensor& low_rank,
             const Tensor& y, bool accumulate) {
  backend.linear(x, *weight.weight, weight.bias, y, accumulate);
  if (weight.adapter_a == nullptr) return;
  backend.linear(x, *weight.adapter_a, Tensor(), low_rank);
  backend.linear(low_rank, *weight.adapter_b, Tensor(), y, true);
}

}  // namespace

HeadsView ProjectedHeads::view(int64_t first, int64_t count) const {
  HeadsView v;
  v.data = static_cast<char*>(qkv.data) + static_cast<size_t>(first * head_size) * size_of(qkv.dtype);
  v.dtype = qkv.dtype;
  v.tokens = qkv.shape[0];
  v.heads = count;
  v.head_size = head_size;
  v.row_stride = qkv.row_size();
  return v;
}

void Backend::project_heads(const NormedRows& in, const AdaptedWeight& weight, const Tensor& low_rank,
                            const ProjectedHeads& out) {
  rms_norm(in.x, in.weight, in.epsilon, in.normed, in.rstd);
  project(*this, in.normed, weight, low_rank, out.qkv, false);
  rope(out.view(0, out.heads + out.kv_heads), out.positions, out.inverse_frequencies, false, out.rope_scale);
  if (out.cache == nullptr) return;
  cache_write(out.view(out.heads, out.kv_heads), out.view(out.heads + out.kv_heads, out.kv_heads), out.slots,
              *out.cache);
}

void Backend::project_gated(const NormedRows& in, const AdaptedWeight& weight, const Tensor& low_rank,
                            const Tensor& gate_up, bool, const Tensor& gated) {
  rms_norm(in.x, in.weight, in.epsilon, in.normed, in.rstd);
  project(*this, in.normed, weight, low_rank, gate_up, false);
  swiglu(gate_up, gated);
}

bool Backend::project_residual(const Tensor& x, const AdaptedWeight& weight, const Tensor& low_rank,
                               const Tensor& from, const Tensor& to, const Tensor&) {
  if (to.data != from.data) copy(to, from);
  project(*this, x, weight, low_rank, to, true);
  return false;
}

}  // namespace merf
