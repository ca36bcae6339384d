// The CPU. Matrix products are of libxsmm's kernels; everything else is hand-vectorised with Highway and parallel over OpenMP.
// Each operator family is defined in the file of its name.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "backend/backend.h"

namespace merf {

class AmxProducts;
class MemoryPool;
struct DecodeWork;

class CpuBackend final : public Backend {
 public:
  // threads 0: one for each processor that this process may run on.
  explicit CpuBackend(int threads);
  ~CpuBackend() override;

  int num_threads() const { return info_.threads; }

  const DeviceInfo& info() const override { return info_; }

  // memory.cc, cast.cc
  Tensor allocate(DType dtype, std::initializer_list<int64_t> shape) override;
  void upload(const Tensor& destination, const void* host, size_t bytes) override;
  void download(void* host, const Tensor& source, size_t bytes) override;
  std::unique_ptr<Download> make_download(size_t bytes) override;
  void copy(const Tensor& destination, const Tensor& source) override;
  void zero(const Tensor& destination) override;
  void cast(const Tensor& destination, const Tensor& source) override;
  void split_master(const Tensor& master, const Tensor& weight, const Tensor& lower) override;
  void join_master(const Tensor& weight, const Tensor& lower, const Tensor& master) override;
  void synchronize() override {}
  int64_t memory_free() const override;
  int64_t memory_used() const override;
  int64_t memory_peak() const override;
  void reset_peak_memory() override;

  // matmul.cc
  std::unique_ptr<PackedWeight> pack_weight(const Tensor& weight, bool for_backward,
                                            bool for_lookup) override;
  void repack_weight(PackedWeight& packed, const Tensor& weight) override;
  void unpack_weight(const PackedWeight& packed, const Tensor& weight) override;
  void linear(const Tensor& x, const PackedWeight& weight, const Tensor& bias, const Tensor& y,
              bool accumulate) override;
  void linear_backward_input(const Tensor& dy, const PackedWeight& weight, const Tensor& dx,
                             bool accumulate) override;
  void linear_backward_weight(const Tensor& dy, const Tensor& x, const Tensor& dw,
                              const Tensor& dbias) override;

  // embedding.cc
  void embedding(const Tensor& ids, const PackedWeight& table, const Tensor& y) override;
  void embedding_backward(const Tensor& ids, const Tensor& dy, const Tensor& dtable,
                          int32_t padding) override;
  void gather_rows(const Tensor& x, const Tensor& rows, const Tensor& y) override;
  void store_rows(const std::vector<RowsCopy>& copies, const Tensor& place) override;

  // norm.cc
  void rms_norm(const Tensor& x, const Tensor& weight, float epsilon, const Tensor& y,
                const Tensor& rstd) override;
  void rms_norm_backward(const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& rstd,
                         const Tensor& dx, const Tensor& dweight) override;
  void add(const Tensor& y, const Tensor& x) override;

  // rope.cc
  void rope(const HeadsView& x, const Tensor& positions, const Tensor& inverse_frequencies, bool inverse,
            float attention_scale) override;

  // swiglu.cc
  void swiglu(const Tensor& gate_up, const Tensor& y) override;
  void swiglu_backward(const Tensor& dy, const Tensor& gate_up, const Tensor& dgate_up) override;

  // attention.cc
  void attention(const HeadsView& q, const HeadsView& k, const HeadsView& v, const Tensor& visible_until,
                 const std::vector<int32_t>& visible_until_host, float scale, const HeadsView& out,
                 const Tensor& lse, int64_t first_query) override;
  void attention_backward(const HeadsView& dout, const HeadsView& q, const HeadsView& k, const HeadsView& v,
                          const HeadsView& out, const Tensor& lse, const Tensor& visible_until,
                          const std::vector<int32_t>& visible_until_host, float scale, const HeadsView& dq,
                          const HeadsView& dk, const HeadsView& dv, int64_t first_query) override;

  // attention_decode.cc
  void cache_write(const HeadsView& k, const HeadsView& v, const Tensor& slots,
                   const PagedLayer& cache) override;
  Tensor plan_decode(const DecodePlan& plan, int64_t batch, const std::vector<int32_t>& inputs) override;
  void attention_decode(const HeadsView& q, const PagedLayer& cache, float scale,
                        const HeadsView& out) override;

  // head.cc
  void head_logprobs(const Tensor& hidden, const PackedWeight& head, const std::vector<int32_t>& rows,
                     const std::vector<int32_t>& targets, const Tensor& logprobs, const Tensor& entropies,
                     float temperature) override;
  double head_loss(const Tensor& hidden, const PackedWeight& head, const std::vector<int32_t>& rows,
                   const std::vector<int32_t>& targets, const LossRows& loss_rows, const LossOptions& options,
                   const Tensor& logprobs, const Tensor& entropies, const Tensor& dhidden,
                   const Tensor& dhead) override;

  // policy_loss.cc
  double policy_loss(const Tensor& logprobs, const Tensor& entropies, const LossRows& loss_rows,
                     const LossOptions& options, const Tensor& coefficients) override;

  // sampling.cc
  void sample_tokens(const Tensor& logits, const Tensor& keys, const Tensor& positions,
                     const SamplingOptions& options, const Tensor& tokens, const Tensor& sampling_logprobs,
                     const Tensor& logprobs, const Tensor& entropies) override;
  void next_tokens(const Tensor& drawn, const Tensor& sources, const Tensor& ids) override;

  // group_advantages.cc
  void group_advantages(const Tensor& rewards, const std::vector<int64_t>& group_offsets, AdvantageKind kind,
                        bool scale, float epsilon, const Tensor& advantages) override;

  // adamw.cc
  void adamw(const std::vector<AdamWTensor>& tensors, const AdamWOptions& options) override;
  double sum_of_squares(const std::vector<Tensor>& tensors) override;

 private:
  DeviceInfo info_;
  std::shared_ptr<MemoryPool> pool_;
  std::unique_ptr<AmxProducts> amx_;  // where the processor has AMX
  std::shared_ptr<DecodeWork> decode_;
};

}  // namespace merf
