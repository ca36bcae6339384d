// The GPU, real or emulated. Every operator family is defined in the .cu file of its name; matrix products are
// cuBLASLt's where that is found, else our own.
#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "backend/cuda/gpu.h"

namespace merf::cuda {

class MatrixLibrary;
class AttentionPlan;
class GpuRecorder;
struct DecodeWork;

// The GPU with the count of what is allocated on it: outlives the backend while tensors do. Tensors may be given back
// on any thread.
struct Device {
  explicit Device(int threads) : gpu(threads) {}
  Gpu gpu;
  std::mutex mutex;
  size_t used = 0, peak = 0;  // bytes
};

class CudaBackend final : public Backend {
 public:
  // threads: see Gpu.
  explicit CudaBackend(int threads);
  ~CudaBackend() override;

  Gpu& gpu() { return device_->gpu; }
  const DeviceInfo& info() const override { return info_; }

  // memory.cu, cast.cu
  Tensor allocate(DType dtype, std::initializer_list<int64_t> shape) override;
  void upload(const Tensor& destination, const void* host, size_t bytes) override;
  void download(void* host, const Tensor& source, size_t bytes) override;
  std::unique_ptr<Download> make_download(size_t bytes) override;
  void copy(const Tensor& destination, const Tensor& source) override;
  void zero(const Tensor& destination) override;
  void cast(const Tensor& destination, const Tensor& source) override;
  void split_master(const Tensor& master, const Tensor& weight, const Tensor& lower) override;
  void join_master(const Tensor& weight, const Tensor& lower, const Tensor& master) override;
  void synchronize() override;
  std::unique_ptr<Recorder> make_recorder() override;
  void release_recordings() override;
  int64_t memory_free() const override;
  int64_t memory_used() const override;
  int64_t memory_peak() const override;
  void reset_peak_memory() override;
  std::optional<int64_t> memory_retries() const override { return device_->gpu.memory_retries(); }

  // A tensor with these values, for what an operator lays out on the host.
  Tensor make(const std::vector<int32_t>& values);

  // matmul.cu
  std::unique_ptr<PackedWeight> pack_weight(const Tensor& weight, bool for_backward,
                                            bool for_lookup) override;
  void repack_weight(PackedWeight& packed, const Tensor& weight) override;
  void unpack_weight(const PackedWeight& packed, const Tensor& weight) override;
  Tensor packed_values(PackedWeight& packed) override;
  void linear(const Tensor& x, const PackedWeight& weight, const Tensor& bias, const Tensor& y,
              bool accumulate) override;
  void linear_backward_input(const Tensor& dy, const PackedWeight& weight, const Tensor& dx,
                             bool accumulate) override;
  void linear_backward_weight(const Tensor& dy, const Tensor& x, const Tensor& dw,
                              const Tensor& dbias) override;

  // decode_products.cu, where rows are few
  void project_heads(const NormedRows& in, const AdaptedWeight& weight, const Tensor& low_rank,
                     const ProjectedHeads& out) override;
  void project_gated(const NormedRows& in, const AdaptedWeight& weight, const Tensor& low_rank,
                     const Tensor& gate_up, bool keep_gate_up, const Tensor& gated) override;
  bool project_residual(const Tensor& x, const AdaptedWeight& weight, const Tensor& low_rank,
                        const Tensor& from, const Tensor& to, const Tensor& squares) override;

  // embedding.cu
  void embedding(const Tensor& ids, const PackedWeight& table, const Tensor& y) override;
  void embedding_backward(const Tensor& ids, const Tensor& dy, const Tensor& dtable,
                          int32_t padding) override;
  void gather_rows(const Tensor& x, const Tensor& rows, const Tensor& y) override;

  // norm.cu
  void rms_norm(const Tensor& x, const Tensor& weight, float epsilon, const Tensor& y,
                const Tensor& rstd) override;
  void rms_norm_backward(const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& rstd,
                         const Tensor& dx, const Tensor& dweight) override;
  void add(const Tensor& y, const Tensor& x) override;

  // rope.cu
  void rope(const HeadsView& x, const Tensor& positions, const Tensor& inverse_frequencies, bool inverse,
            float attention_scale) override;

  // swiglu.cu
  void swiglu(const Tensor& gate_up, const Tensor& y) override;
  void swiglu_backward(const Tensor& dy, const Tensor& gate_up, const Tensor& dgate_up) override;

  // attention.cu, attention_backward.cu
  void attention(const HeadsView& q, const HeadsView& k, const HeadsView& v, const Tensor& visible_until,
                 const std::vector<int32_t>& visible_until_host, float scale, const HeadsView& out,
                 const Tensor& lse, int64_t first_query) override;
  void attention_backward(const HeadsView& dout, const HeadsView& q, const HeadsView& k, const HeadsView& v,
                          const HeadsView& out, const Tensor& lse, const Tensor& visible_until,
                          const std::vector<int32_t>& visible_until_host, float scale, const HeadsView& dq,
                          const HeadsView& dk, const HeadsView& dv, int64_t first_query) override;

  // attention_decode.cu
  void cache_write(const HeadsView& k, const HeadsView& v, const Tensor& slots,
                   const PagedLayer& cache) override;
  Tensor plan_decode(const DecodePlan& plan, int64_t batch, const std::vector<int32_t>& inputs) override;
  void attention_decode(const HeadsView& q, const PagedLayer& cache, float scale,
                        const HeadsView& out) override;

  // head.cu
  void head_logprobs(const Tensor& hidden, const PackedWeight& head, const std::vector<int32_t>& rows,
                     const std::vector<int32_t>& targets, const Tensor& logprobs, const Tensor& entropies,
                     float temperature) override;
  double head_loss(const Tensor& hidden, const PackedWeight& head, const std::vector<int32_t>& rows,
                   const std::vector<int32_t>& targets, const LossRows& loss_rows, const LossOptions& options,
                   const Tensor& logprobs, const Tensor& entropies, const Tensor& dhidden,
                   const Tensor& dhead) override;

  // policy_loss.cu
  double policy_loss(const Tensor& logprobs, const Tensor& entropies, const LossRows& loss_rows,
                     const LossOptions& options, const Tensor& coefficients) override;

  // sampling.cu
  void sample_tokens(const Tensor& logits, const Tensor& keys, const Tensor& positions,
                     const SamplingOptions& options, const Tensor& tokens, const Tensor& sampling_logprobs,
                     const Tensor& logprobs, const Tensor& entropies) override;

  // decode_step.cu
  void next_tokens(const Tensor& drawn, const Tensor& sources, const Tensor& ids) override;
  void store_rows(const std::vector<RowsCopy>& copies, const Tensor& place) override;

  // group_advantages.cu
  void group_advantages(const Tensor& rewards, const std::vector<int64_t>& group_offsets, AdvantageKind kind,
                        bool scale, float epsilon, const Tensor& advantages) override;

  // adamw.cu
  void adamw(const std::vector<AdamWTensor>& tensors, const AdamWOptions& options) override;
  double sum_of_squares(const std::vector<Tensor>& tensors) override;

 private:
  // rope.cu. What project_heads does behind the product: qkv = sums [T, N] f32 + bias, rounded, or as it stands where sums
  // is empty; queries and keys are rotated; keys and values are stored in the cache, in one pass.
  void place_heads(const Tensor& sums, const Tensor& bias, const ProjectedHeads& out);
  friend class GpuRecorder;

  // The plan for a forest: the last call's, where the forest is the same.
  AttentionPlan& plan_attention(const std::vector<int32_t>& visible_until, int64_t first_query);

  DeviceInfo info_;
  std::shared_ptr<Device> device_;
  std::shared_ptr<MatrixLibrary> products_;        // cuBLASLt, or null
  std::shared_ptr<AttentionPlan> attention_plan_;  // of the last forest
  std::shared_ptr<DecodeWork> decode_;             // of the last plan_decode
  Tensor arrivals_;                                // of decode_products.cu: 0 between launches
  // Changes whenever a recording made before would no longer be right, such as when decode_ moved.
  int64_t recording_generation_ = 0;
  std::vector<GpuRecorder*> recorders_;
};

}  // namespace merf::cuda
