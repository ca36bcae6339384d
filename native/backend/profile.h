// A backend that times every operator of another one.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "backend/backend.h"

namespace merf {

// All calls of one operator; a product's name has its weight's shape, outputs x inputs.
struct OperatorTime {
  std::string name;
  int64_t calls = 0;
  double seconds = 0.0;
  double operations = 0.0;  // additions and multiplications of its products; 0 where it is bound by memory
  double bytes = 0.0;       // of its operands, each once; 0 where `operations` says what bounds it
};

// Pairs of a key and a query from `first_query` on that sees it (visible_until as in backend.h).
double visible_pairs(const std::vector<int32_t>& visible_until, int64_t first_query = 0);

// What each operator takes, for reports. Waits for the device after each, so that a whole takes a little longer than
// without, and records nothing. Projections are timed as the operators that they are composed of.
class ProfiledBackend final : public Backend {
 public:
  explicit ProfiledBackend(std::shared_ptr<Backend> backend) : backend_(std::move(backend)) {}

  // The times since the last call, the longest first. Any thread may ask.
  std::vector<OperatorTime> take();

  const DeviceInfo& info() const override { return backend_->info(); }
  void set_interrupt(const std::atomic<bool>* flag) override { backend_->set_interrupt(flag); }
  Tensor allocate(DType dtype, std::initializer_list<int64_t> shape) override {
    return backend_->allocate(dtype, shape);
  }
  void upload(const Tensor& destination, const void* host, size_t bytes) override;
  void download(void* host, const Tensor& source, size_t bytes) override;
  std::unique_ptr<Download> make_download(size_t bytes) override { return backend_->make_download(bytes); }
  void copy(const Tensor& destination, const Tensor& source) override;
  void zero(const Tensor& destination) override;
  void cast(const Tensor& destination, const Tensor& source) override;
  void split_master(const Tensor& master, const Tensor& weight, const Tensor& lower) override;
  void join_master(const Tensor& weight, const Tensor& lower, const Tensor& master) override;
  void synchronize() override { backend_->synchronize(); }
  int64_t memory_free() const override { return backend_->memory_free(); }
  int64_t memory_used() const override { return backend_->memory_used(); }
  int64_t memory_peak() const override { return backend_->memory_peak(); }
  void reset_peak_memory() override { backend_->reset_peak_memory(); }
  std::optional<int64_t> memory_retries() const override { return backend_->memory_retries(); }

  std::unique_ptr<PackedWeight> pack_weight(const Tensor& weight, bool for_backward,
                                            bool for_lookup) override;
  void repack_weight(PackedWeight& packed, const Tensor& weight) override;
  void unpack_weight(const PackedWeight& packed, const Tensor& weight) override;
  Tensor packed_values(PackedWeight& packed) override { return backend_->packed_values(packed); }
  void linear(const Tensor& x, const PackedWeight& weight, const Tensor& bias, const Tensor& y,
              bool accumulate) override;
  void linear_backward_input(const Tensor& dy, const PackedWeight& weight, const Tensor& dx,
                             bool accumulate) override;
  void linear_backward_weight(const Tensor& dy, const Tensor& x, const Tensor& dw,
                              const Tensor& dbias) override;

  void embedding(const Tensor& ids, const PackedWeight& table, const Tensor& y) override;
  void embedding_backward(const Tensor& ids, const Tensor& dy, const Tensor& dtable,
                          int32_t padding) override;
  void gather_rows(const Tensor& x, const Tensor& rows, const Tensor& y) override;
  void store_rows(const std::vector<RowsCopy>& copies, const Tensor& place) override;
  void rms_norm(const Tensor& x, const Tensor& weight, float epsilon, const Tensor& y,
                const Tensor& rstd) override;
  void rms_norm_backward(const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& rstd,
                         const Tensor& dx, const Tensor& dweight) override;
  void add(const Tensor& y, const Tensor& x) override;
  void rope(const HeadsView& x, const Tensor& positions, const Tensor& inverse_frequencies, bool inverse,
            float attention_scale) override;
  void swiglu(const Tensor& gate_up, const Tensor& y) override;
  void swiglu_backward(const Tensor& dy, const Tensor& gate_up, const Tensor& dgate_up) override;

  void attention(const HeadsView& q, const HeadsView& k, const HeadsView& v, const Tensor& visible_until,
                 const std::vector<int32_t>& visible_until_host, float scale, const HeadsView& out,
                 const Tensor& lse, int64_t first_query) override;
  void attention_backward(const HeadsView& dout, const HeadsView& q, const HeadsView& k, const HeadsView& v,
                          const HeadsView& out, const Tensor& lse, const Tensor& visible_until,
                          const std::vector<int32_t>& visible_until_host, float scale, const HeadsView& dq,
                          const HeadsView& dk, const HeadsView& dv, int64_t first_query) override;
  void cache_write(const HeadsView& k, const HeadsView& v, const Tensor& slots,
                   const PagedLayer& cache) override;
  Tensor plan_decode(const DecodePlan& plan, int64_t batch, const std::vector<int32_t>& inputs) override;
  void attention_decode(const HeadsView& q, const PagedLayer& cache, float scale,
                        const HeadsView& out) override;

  void head_logprobs(const Tensor& hidden, const PackedWeight& head, const std::vector<int32_t>& rows,
                     const std::vector<int32_t>& targets, const Tensor& logprobs, const Tensor& entropies,
                     float temperature) override;
  double head_loss(const Tensor& hidden, const PackedWeight& head, const std::vector<int32_t>& rows,
                   const std::vector<int32_t>& targets, const LossRows& loss_rows, const LossOptions& options,
                   const Tensor& logprobs, const Tensor& entropies, const Tensor& dhidden,
                   const Tensor& dhead) override;
  double policy_loss(const Tensor& logprobs, const Tensor& entropies, const LossRows& loss_rows,
                     const LossOptions& options, const Tensor& coefficients) override;
  void sample_tokens(const Tensor& logits, const Tensor& keys, const Tensor& positions,
                     const SamplingOptions& options, const Tensor& tokens, const Tensor& sampling_logprobs,
                     const Tensor& logprobs, const Tensor& entropies) override;
  void next_tokens(const Tensor& drawn, const Tensor& sources, const Tensor& ids) override;
  void group_advantages(const Tensor& rewards, const std::vector<int64_t>& group_offsets, AdvantageKind kind,
                        bool scale, float epsilon, const Tensor& advantages) override;
  void adamw(const std::vector<AdamWTensor>& tensors, const AdamWOptions& options) override;
  double sum_of_squares(const std::vector<Tensor>& tensors) override;

 private:
  struct Work {
    double operations = 0.0;
    double bytes = 0.0;
  };
  template <class Run>
  auto timed(const std::string& name, const Work& work, const Run& run);
  void record(const std::string& name, const Work& work, double seconds);

  std::shared_ptr<Backend> backend_;
  double decode_pairs_ = 0.0;  // of queries and keys, by the last plan
  std::mutex mutex_;
  std::map<std::string, OperatorTime> times_;
};

}  // namespace merf
