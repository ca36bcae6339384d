// A model with its parameters: scores tokens, accumulates gradients, updates itself. Every method runs on the
// one thread that owns the backend.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "model/activation_cache.h"
#include "model/arena.h"
#include "model/batch.h"
#include "model/batch_loss.h"
#include "model/cancel.h"
#include "model/config.h"
#include "model/parameters.h"
#include "model/transformer.h"
#include "model/weights_file.h"

namespace merf {

struct LossResult {
  double loss = 0.0;
  bool finite = true;
  Scores scores;
  LossStatistics statistics;  // NaN where the loss is not finite
};

struct OptimizerOptions {
  float learning_rate = 1e-6f;
  float beta1 = 0.9f;
  float beta2 = 0.999f;
  float epsilon = 1e-8f;
  float weight_decay = 0.0f;
  float max_gradient_norm = 0.0f;  // 0: no clipping
};

struct OptimizerResult {
  double gradient_norm = 0.0;
  bool applied = false;
};

// merged: the value as a model without adapters has it, for reading.
enum class ParameterKind : uint8_t { value, gradient, adam_m, adam_v, merged };

class Model {
 public:
  // Models that run on one thread may share an arena.
  Model(Backend& backend, Arena& arena, ModelConfig config, const Training& training);
  Model(const Model&) = delete;
  Model& operator=(const Model&) = delete;

  const ModelConfig& config() const { return config_; }
  Parameters& parameters() { return parameters_; }
  Transformer& transformer() { return transformer_; }
  const Transformer& transformer() const { return transformer_; }
  Backend& backend() { return backend_; }
  Arena& arena() { return arena_; }
  // What runs the steps of this model's rollouts; its recordings outlive them.
  Recorder& recorder();

  // Where memory runs out, every method gives back what it took and throws OUT_OF_MEMORY; those that take a
  // batch say how many tokens would have fitted.

  // Fills every parameter but adapters from files. Throws INVALID_ARGUMENT where a parameter is missing,
  // given twice, unknown or of another shape, and what read_tensor throws. After a failure the model has to
  // be loaded again.
  void load(const std::vector<TensorSource>& sources, const Cancel& cancel);
  // Matrices from a normal distribution, norms 1, biases 0; a function of the seed alone.
  void initialize(uint64_t seed, float standard_deviation);
  std::vector<float> read(const std::string& name, ParameterKind kind);
  void write(const std::string& name, ParameterKind kind, const std::vector<float>& data);

  // How many tokens at once a scoring or a training pass is best given where its caller has no wish: so many
  // that activations take a fifth of the device's memory at most, and in training a quarter of what weights,
  // gradients and moments do (or 512 MiB where that is more).
  int64_t tokens_that_fit(bool trains) const;

  // [R, V] row-major, for tests and small uses.
  std::vector<float> logits(const Batch& batch, const Cancel& cancel);
  // `max_tokens` (0: no bound) is the most tokens that go through the model at once, as far as segments
  // divide the forest (micro_batches.h); every token is computed once all the same, and on an exact device
  // the scores do not depend on it. They are of softmax(logits / temperature).
  Scores score(const Batch& batch, int64_t max_tokens, const Cancel& cancel, float temperature = 1.0f);
  // Adds to the gradients. They are zero, those of earlier calls included, where the loss is not finite or
  // the call throws: cancelled, out of memory. `max_tokens` is as for score; the gradients depend on it in
  // their rounding alone.
  LossResult forward_backward(const Batch& batch, const BatchLoss& loss, int64_t max_tokens,
                              const Cancel& cancel);
  void zero_gradients();
  // A gradient pass says so before it first adds to the gradients.
  void begin_accumulating() { accumulates_ = true; }
  // Clips, updates and zeroes the gradients. Not applied where their norm is not finite. `step` is 1 at the
  // first update.
  OptimizerResult optim_step(const OptimizerOptions& options, int64_t step);

  // The activation cache is what a rollout leaves for forward_backward, which uses it for micro-batches all
  // of whose tokens it has. It is emptied at the next change of a weight, and where gradients whose memory it
  // borrows are wanted.
  void set_activation_cache(std::unique_ptr<ActivationCache> cache) { activation_cache_ = std::move(cache); }
  std::unique_ptr<ActivationCache> take_activation_cache() { return std::move(activation_cache_); }
  ActivationCache* activation_cache() { return activation_cache_.get(); }
  // By layer, the memory of gradients that are 0, for an activation cache to stand in; empty where they are
  // not.
  std::vector<Tensor> borrow_gradients();

  // Brings what operators read up to date with the values that were written; every method that needs it calls
  // it. Throws ABORTED where it was cancelled meanwhile; the next call then goes on with it.
  void prepare(const Cancel* cancel = nullptr);
  // Names the weights as they are: another number after every change.
  uint64_t weights_version() const { return weights_version_; }

  // Uploads into the arena.
  Tensor upload(const std::vector<int32_t>& data);
  Tensor upload(const std::vector<float>& data);
  Forest upload_forest(const std::vector<int32_t>& tokens, const std::vector<int32_t>& positions,
                       const std::vector<int32_t>& visible_until);
  // The batch's tokens, behind as many ancestors as visible_until has elements more.
  Forest upload_forest(const Batch& batch);
  // Downloads what the head gave into `scores`, at the batch's `rows`.
  void download_scores(const Tensor& logprobs, const Tensor& entropies, const std::vector<int32_t>& rows,
                       Scores& scores);

 private:
  // Runs work over so many tokens at once, which takes `bytes` of the arena; explains a lack of memory.
  // `trains` where activations are saved for a backward.
  template <class Work>
  auto within_memory(int64_t tokens, bool trains, int64_t bytes, const Work& work);
  void reclaim_gradients();
  void discard_gradients() noexcept;
  int64_t activation_bytes(int64_t tokens, SavedLayers saved, size_t first_layer = 0) const;
  int64_t cached_activation_bytes(const std::vector<MicroBatch>& micro_batches) const;
  Error out_of_memory(const Error& error, int64_t tokens, bool trains);
  LossResult compute_gradients(const Batch& batch, const BatchLoss& loss, int64_t max_tokens,
                               const Cancel& cancel);
  std::vector<float> compute_logits(const Batch& batch, const Cancel& cancel);
  Tensor hidden_of(const Forest& forest, const Cancel& cancel, const char* work);
  void require_trainable(const char* what) const;
  // Before a change of a weight: what was computed with it goes.
  void change_weights();
  void initialize_adapters(uint64_t seed);

  Backend& backend_;
  Arena& arena_;
  const ModelConfig config_;
  Parameters parameters_;
  Transformer transformer_;
  bool accumulates_ = false;  // the gradients are not 0
  std::unique_ptr<ActivationCache> activation_cache_;
  std::unique_ptr<Recorder> recorder_;
  bool stale_ = true;  // the packed weights do not hold `value`
  uint64_t weights_version_ = 0;
};

}  // namespace merf
